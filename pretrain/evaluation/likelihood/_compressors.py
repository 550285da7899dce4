"""General compressors as a yardstick: bits per byte of `xz -9e` and `zstd -19` on the same held-out text.

The documents of a domain are compressed as one stream, the kindest way for a compressor. Like a model, it may learn
from what it has seen before, but only of the held-out text itself.
"""

from __future__ import annotations

import lzma
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TypedDict

from pretrain.corpus.sources import Document


class Compressed(TypedDict):
    """What a compressor makes of the documents: bits per byte of all of them, and of each domain's."""

    metrics: dict[str, float]
    domains: dict[str, dict[str, float]]


def compressed_bits(documents: Iterable[Document]) -> dict[str, Compressed]:
    """`{"xz -9e": {"metrics": {"bits_per_byte": …}, "domains": {DOMAIN: {"bits_per_byte": …}}}, "zstd -19": …}`.

    Text of no bytes has no bits per byte and no entry.
    """
    import zstandard

    parts: dict[str, list[bytes]] = defaultdict(list)
    everything = []
    for document in documents:
        data = document["text"].encode("utf-8", "surrogatepass")
        everything.append(data)
        parts[document.get("domain", "text")].append(data)
    tools: dict[str, Callable[[bytes], bytes]] = {
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "zstd -19": lambda data: zstandard.ZstdCompressor(level=19).compress(data),
    }
    streams = {domain: b"".join(pieces) for domain, pieces in sorted(parts.items())}
    return {
        name: {
            "metrics": _bits(compress, b"".join(everything)),
            "domains": {domain: _bits(compress, data) for domain, data in streams.items() if data},
        }
        for name, compress in tools.items()
    }


def _bits(compress: Callable[[bytes], bytes], data: bytes) -> dict[str, float]:
    return {"bits_per_byte": 8 * len(compress(data)) / len(data)} if data else {}
