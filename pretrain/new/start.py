"""What a recipe begins with: a checkpoint, as far as its configuration tells, or the size of a new model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.files import JSON, read_json
from pretrain.core.folders import checkpoint_of, newest_checkpoint, place_of, stage_folders
from pretrain.core.quick.hub import located, looks_like
from pretrain.core.quick.machine import efficiency, likely_rate
from pretrain.core.quick.positions import positions
from pretrain.core.quick.table import FAMILIES
from pretrain.dial.choose import BYTES_AN_ENTRY, LEAST_ENTRIES
from pretrain.dial.law import REPEATS
from pretrain.records import read_stage

TOKENS_A_WEIGHT = 20.0  # arXiv:2203.15556
# Width and blocks of encoders: heads of 32 on the way up.
ENCODERS = ((64, 2), (96, 3), (128, 4), (192, 4), (256, 6), (384, 6), (512, 8), (768, 12))
ENOUGH_PASSES = 1 + round(REPEATS)  # over the text: the last of them is worth a third of new text
BYTES = 256
WIDE = 512  # from this width on what is tuned is a LoRA: all weights are too many for an evening


@dataclass(frozen=True)
class Start:
    """A checkpoint: its name in the recipe, and its configuration, empty of a hub's that has not been fetched."""

    name: str
    config: Mapping[str, JSON] = field(default_factory=dict)
    held: tuple[float, float] | None = None  # of a run of ours: the shares that it held out, validation and test
    corpus: str = ""  # of such a run: the stage that made it, as another recipe names it
    folder: Path | None = None  # where its files lie

    @property
    def kind(self) -> str:
        """What its head is: causal (and where it is not known), masked, seq2seq, or another class of `transformers`."""
        given = self.config.get("architectures")
        named = str(given[0]) if isinstance(given, list) and given else ""
        ends = {"ForCausalLM": "causal", "LMHeadModel": "causal", "ForMaskedLM": "masked",
                "ForConditionalGeneration": "seq2seq"}  # fmt: skip
        return next((kind for end, kind in ends.items() if named.endswith(end)), named or "causal")

    @property
    def family(self) -> str | None:
        """Its family here, None of others; llama of what is not known."""
        kind = str(self.config.get("model_type", "llama")).rpartition("-")[2].partition(":")[0]
        return next((family.name for family in FAMILIES if kind in family.types), None)

    @property
    def width(self) -> int | None:
        """Of its states."""
        sizes = [self.config.get(name) for name in ("hidden_size", "n_embd", "d_model", "dim")]
        return next((size for size in sizes if isinstance(size, int)), None)

    @property
    def blocks(self) -> int | None:
        """How many it has."""
        sizes = [self.config.get(name) for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers")]
        return next((size for size in sizes if isinstance(size, int)), None)

    @property
    def embedded(self) -> float:
        """The share of its weights that are its vocabulary's; 0 where the configuration does not say."""
        entries, tied = self.config.get("vocab_size"), bool(self.config.get("tie_word_embeddings", True))
        if not isinstance(entries, int) or not self.width or not self.blocks:
            return 0.0
        vocabulary = entries * self.width * (1 if tied else 2)
        return vocabulary / (vocabulary + 12 * self.blocks * self.width**2)

    @property
    def wide(self) -> bool:
        """Whether it is large, or not known."""
        return self.width is None or self.width >= WIDE

    def length(self, wanted: int) -> int:
        """At most what it has positions for."""
        return min(wanted, positions(self.config) or wanted)


def start_of(name: str) -> Start:
    """What `--init` names: a checkpoint, a stage, a run (its last checkpoint), or a model of the hub."""
    place = located(name)
    if (place / "run.json").exists():
        checkpoint = newest_checkpoint(place)
        stage = next(stage for stage, folder in stage_folders(place).items() if folder == checkpoint.parent)
        stays = (
            f"{name.rstrip('/')}/{stage}@{checkpoint.parent.name.rpartition('-')[2]}"  # whatever the run shows later
        )
        return Start(stays, read_json(checkpoint / "config.json"), *_corpus(place, name.rstrip("/")), checkpoint)
    if place.exists():
        homes = [home for home in place.absolute().parents[:2] if (home / "run.json").exists()]
        folder = checkpoint_of(place_of(place))
        made = _corpus(homes[0], os.path.relpath(homes[0])) if homes else (None, "")
        return Start(name, read_json(folder / "config.json"), *made, folder)
    here = [path.parent.as_posix() for path in sorted(Path().glob("*/*/run.json"))]
    meant = nearest(name, here, cutoff=0.88)
    if looks_like(name) and name.count("/") <= 1 and not name.startswith("runs/") and not meant:
        return Start(name)
    raise PretrainError(
        f"--init {name!r}: no such folder{meant}; accepted: a checkpoint, a stage or a run, or a name of the hub"
    )


def _corpus(run: Path, name: str) -> tuple[tuple[float, float] | None, str]:
    """The shares of the documents that a run's corpus holds out, and the stage; None and nothing where it made none."""
    folders = {name: home for name, home in stage_folders(run).items() if (home / "corpus" / "corpus.json").exists()}
    for stage, folder in reversed([pair for pair in folders.items() if (pair[1] / "stage.json").exists()]):
        config = read_stage(folder / "stage.json")["config"]
        validation, test = config.get("validation"), config.get("test")
        if isinstance(validation, float | int) and isinstance(test, float | int) and validation + test > 0:
            return (float(validation), float(test)), f"{name}/{stage}@{folder.name.rpartition('-')[2]}"
    return None, ""


def encoder(seconds: float, text: float, vocabulary: int) -> tuple[int, int]:
    """Width and blocks of the largest encoder that an evening's tokens, or the text's, are enough for."""
    best = ENCODERS[0]
    for width, blocks in ENCODERS:
        weights = 12 * blocks * width**2
        tokens = seconds * likely_rate() * efficiency(width) / (6 * (weights + 0.15 * vocabulary * width))
        if min(tokens, ENOUGH_PASSES * text) >= TOKENS_A_WEIGHT / 2 * weights:
            best = (width, blocks)
    return best


def vocabulary(text: float) -> int:
    """Entries that so many bytes of text can fill, at 100 bytes an entry; 256 stands for bytes alone."""
    if text < LEAST_ENTRIES * BYTES_AN_ENTRY:
        return BYTES
    return min(
        16384, 2 ** math.floor(math.log2(text / BYTES_AN_ENTRY)) if text >= 512 * BYTES_AN_ENTRY else LEAST_ENTRIES
    )
