"""General compressors as a yardstick: bits per byte of `xz -9e` and `zstd -19` on the same held-out text.

The documents of a domain are compressed as one stream, the kindest way for a compressor. Like a model, it may learn
from what it has seen before, but only of the held-out text itself.
"""

from __future__ import annotations

import lzma
from collections import defaultdict
from collections.abc import Iterable
from typing import Any


def compressed_bits(documents: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """`{"xz -9e": {"all": bits per byte, DOMAIN: …}, "zstd -19": …}`."""
    import zstandard

    streams: dict[str, list[bytes]] = defaultdict(list)
    for document in documents:
        data = document["text"].encode("utf-8", "surrogatepass")
        streams["all"].append(data)
        streams[document.get("domain", "text")].append(data)
    tools = {
        "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
        "zstd -19": lambda data: zstandard.ZstdCompressor(level=19).compress(data),
    }
    result: dict[str, dict[str, float]] = {}
    for name, compress in tools.items():
        joined = {domain: b"".join(parts) for domain, parts in streams.items()}
        result[name] = {domain: 8 * len(compress(data)) / len(data) for domain, data in joined.items() if data}
    return result
