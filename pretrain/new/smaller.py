"""What makes a checkpoint small at little loss: 4 bits for its blocks, 8 for all of it, fewer entries.

By how many of its weights are its vocabulary's. The surgery of 4 bits (GPTQ) leaves the embeddings as they are stored,
and a GGUF file keeps every matrix in 8 bits. Measured on Python's library, with weights and tokenizer counted: of a
llama of width 32 whose vocabulary is 91% of its weights the one saved 5% (2.016 bits a byte became 2.019), the other
66% (2.016); of one of width 160 where it is 12% the one saved 74%, the other 69% (2.412 both, as before). Without the
entries that 0.3 MB of licences do not use the first became 88% smaller (2.701 bits a byte of them became 2.711).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pretrain.core.encoding.merges import closed
from pretrain.core.files import read_object
from pretrain.core.foreign.gguf import splitting
from pretrain.corpus.sources._files import evenly
from pretrain.dial.configs import shape_from
from pretrain.dial.shapes import Shape
from pretrain.new.look import Look
from pretrain.new.start import Start
from pretrain.new.texts import opened

TYPES = ("llama", "mistral", "qwen3", "gpt2")  # of models that a GGUF file takes without more to look at
BLOCK = 32  # values that share a scale in 8 bits
EIGHT = 8.5 / 8  # bytes of a weight in blocks of 32 with a scale
ENTRY = 33.0  # bytes of an entry and its merge in a GGUF file
LISTED = 70.0  # and in a tokenizer.json
FOUR, SCALE = 0.5, 4.5  # bytes of a weight in 4 bits; and of what a group of them has: its scale and its zero
LOOKED, FILES = 2_000_000, 400  # bytes of the text that are split into tokens, of so many files
USED = 0.8  # of a vocabulary: where the text uses less, the rest is taken away
ALPHABET = 260  # entries that stay in any case: bytes and special ones


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights and tokenizer: as they are, with 4 bits for the blocks, with 8 for all."""

    before: float
    four: float
    eight: float | None  # None where a GGUF file does not take the model

    @property
    def exports(self) -> bool:
        """Whether 8 bits for all take less."""
        return self.eight is not None and self.eight < self.four

    @property
    def saved(self) -> float:
        """The share that the better way saves."""
        return max(0.0, 1 - min(self.four, self.eight or math.inf) / self.before)


@dataclass(frozen=True)
class Smaller:
    """A checkpoint that is to be made smaller for a text."""

    start: Start
    look: Look
    group: int  # weights that share a scale; -1: a whole row

    @cached_property
    def shape(self) -> Shape | None:
        """Of what is known of it."""
        return shape_from(self.start.config)

    @cached_property
    def kept(self) -> int | None:
        """Entries that stay where those are taken away that the text does not use; None where it uses nearly all."""
        shape = self.shape
        file = self.start.folder / "tokenizer.json" if self.start.folder is not None else None
        if shape is None or file is None or not file.is_file() or self.start.kind != "causal":
            return None
        used = used_entries(file, texts_of(self.look), self.look.text or self.look.bytes)
        kept = min(shape.vocabulary, round(ALPHABET + used)) if used else shape.vocabulary
        return kept if kept < USED * shape.vocabulary else None

    @cached_property
    def sizes(self) -> Sizes | None:
        """What each way leaves; None where nothing is known of the checkpoint."""
        shape = self.shape
        if shape is None or not shape.vocabulary:
            return None
        stored, listed = self._stored(shape)
        entries = self.kept or shape.vocabulary
        table = entries * shape.width * (1 if shape.tied else 2)
        rest = shape.weights - shape.body - shape.vocabulary * shape.width * (1 if shape.tied else 2)
        group = shape.width if self.group == -1 else self.group
        four = shape.body * (FOUR + SCALE / group) + (table + rest) * stored + listed * entries / shape.vocabulary
        odd = shape.depth * shape.width * shape.intermediate if shape.intermediate % BLOCK else 0  # these in 16 bits
        eight = (shape.body + table) * EIGHT + odd * (2.0 - EIGHT) + rest * 4.0 + ENTRY * entries
        return Sizes(shape.weights * stored + listed, four, eight if self._exported(shape) else None)

    def _exported(self, shape: Shape) -> bool:
        """Whether a GGUF file takes it, with its matrices in 8 bits: all, or all but those of odd rows."""
        config, folder = self.start.config, self.start.folder
        file = folder / "tokenizer.json" if folder is not None else None
        if file is None or not file.is_file() or shape.width % BLOCK:
            return False
        odd = any(config.get(name) for name in ("attention_bias", "mlp_bias", "sliding_window", "quantization_config"))
        plain = config.get("model_type") in TYPES and self.start.kind == "causal" and not odd
        return plain and splitting(read_object(file)) is not None

    def _stored(self, shape: Shape) -> tuple[float, float]:
        """Bytes of a weight, and of the tokenizer: of the files that are there, else as they usually are."""
        kind = str(self.start.config.get("dtype") or self.start.config.get("torch_dtype") or "float32")
        usual = 2.0 if kind in ("bfloat16", "float16") else 4.0, LISTED * shape.vocabulary
        folder = self.start.folder
        if folder is None:
            return usual
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        file = folder / "tokenizer.json"
        return weights / shape.weights or usual[0], float(file.stat().st_size) if file.is_file() else usual[1]


def texts_of(look: Look) -> list[str]:
    """Some of the texts, about `LOOKED` bytes of them."""
    if look.table is not None:
        return list(evenly(look.table.texts, FILES))
    inside, _ = opened.texts_of(tuple(filter(opened.is_opened, look.files)))
    files: Sequence[Path] = evenly(opened.plain(look.files), FILES)
    texts = [text for _, text in evenly(inside, FILES)]
    for path in files:
        with path.open("rb") as file:
            texts.append(file.read(LOOKED // max(1, len(files))).decode("utf-8", "ignore"))
    return texts


def used_entries(file: Path, texts: Sequence[str], size: float) -> float:
    """How many entries `size` bytes of such text use, with those that these are merged of.

    Those that some texts use, and more by Heaps' law: the entries that are used grow by a power of the text, which the
    two halves of the texts tell.
    """
    from tokenizers import Tokenizer

    from pretrain.core.encoding import numbers
    from pretrain.core.encoding.stored import check_stored

    check_stored(file.parent)
    backend = Tokenizer.from_file(str(file))
    backend.no_truncation()
    backend.no_padding()
    ids = numbers(backend, texts)
    half, whole = set[int]().union(*ids[::2]), set[int]().union(*ids)
    read = sum(len(text.encode()) for text in texts)
    if not half or not read:
        return 0.0
    power = min(1.0, max(0.0, math.log2(len(whole) / len(half))))
    tokens = {token for number in whole if (token := backend.id_to_token(number)) is not None}
    return len(closed(read_object(file).get("model") or {}, tokens)) * max(1.0, size / read) ** power
