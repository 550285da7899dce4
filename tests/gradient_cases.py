"""Every objective ready to be trained on a few uneven rows, with draws that no batch's make-up changes.

`Still` stands for numpy's generator: what it draws follows from what it is asked alone, so that rows are corrupted
alike in any micro-batch. `still` does the same for what objectives draw on the device.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import TASK, TINY
from torch import nn

from pretrain.core import checkpoint
from pretrain.core.batch import Batch, Context, Example, Row, Vocabulary, counts
from pretrain.core.encoding import Encoder
from pretrain.core.method import method_class
from pretrain.core.models.families import new_model
from pretrain.core.models.heads import labels_of, with_head
from pretrain.core.quick.table import KINDS
from pretrain.core.registry import methods
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.surgery import Inputs
from pretrain.training.budget import Budget
from pretrain.training.distributed import World, full
from pretrain.training.loop import _work as work_of
from pretrain.training.loop import exchange, forward_backward
from pretrain.training.running import Settings, Trainee, Training

LENGTH = 48
CUTS = (1, 4, 6)  # where seven rows are cut into micro-batches; of the last one nothing can be predicted
PIECES = ((30, 18), (12,), (44,), (9, 8, 7), (3, 40, 4), (25,), (1,))
TEXTS = (
    "import os",
    "class A: pass",
    "def f(): return 1",
    "import os, sys, re, json, abc",
    "x",
    "for a in b: print(a)",
    "",
)
# Variants of objectives beside the one that their defaults make, and the family that each is to train.
VARIANTS: list[tuple[str, dict[str, Any], str]] = [
    ("random_token_substitution", {"objective": "c_rts", "clusters": 5}, "bert"),
    ("random_token_substitution", {"objective": "slm"}, "bert"),
    ("drbert", {"attention": "unmasked"}, "bert"),
    ("autodistil", {"masked_lm": 0.5, "distance": "kl"}, "bert"),
    ("distillation", {"features": 1.0}, "llama"),
    ("distillation", {"features": 1.0, "objective": "masked_lm"}, "bert"),
    ("self_distillation", {"states": "all"}, "bert"),
    ("self_distillation", {"objective": "causal_lm"}, "llama"),
    ("deft", {"objective": "causal_lm"}, "llama"),
    ("deft", {"objective": "bag_of_words"}, "bert"),
    ("deft", {"objective": "mask_later"}, "bert"),
    ("deft", {"objective": "span_corruption"}, "t5"),
    ("deft", {"objective": "seq2seq"}, "t5"),
    ("deft", {"objective": "seq2seq"}, "llama"),
    ("seq2seq", {}, "t5"),
    ("smart", {"objective": "regression"}, "bert"),
    ("retromae_v2", {}, "modernbert"),
    ("dpo", {"loss_type": "ipo"}, "gpt2"),
    ("unlearning", {"mode": "random_labels"}, "llama"),
    ("unlearning", {"mode": "adversarial_samples", "retain": "kl_divergence"}, "llama"),
]
SURGERIES: dict[str, dict[str, Any]] = {
    "hedgehog_distillation": {"method": "hedgehog"}, "flexi_depth_lm": {"method": "flexi_depth", "reduction": 4},
    "pela_pretraining": {"method": "pela"},
    "codebook_lm": {"method": "codebook_features", "codes": 16, "k": 2, "initialisation": "normal"},
    "read_me_router": {"method": "read_me", "embedding_dim": 16},
}  # fmt: skip
FAMILY = {
    "seq2seq": "llama",
    "prompt_classification": "bert",
    "deft": "bert",
    "self_distillation": "bert",
    "native": "bert",
    "multiple_choice": "bert",
}
GENERATES = {
    "llama": "causal",
    "qwen3": "causal",
    "gpt2": "causal",
    "t5": "seq2seq",
}  # the task of a model that seq2seq is to train


def all_cases() -> list[tuple[str, dict[str, Any], str]]:
    """Each objective there is, with its defaults, then the variants: name, fields, family ("" for its first)."""
    return [(name, {}, "") for name, info in methods().items() if info.kind == "objective"] + VARIANTS


class Still(np.random.Generator):
    """Draws that are a function of their arguments."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def random(self, size: Any = None, **_: Any) -> Any:
        """0.37 · i mod 1 at place i of the last axis."""
        if size is None:
            return 0.37
        shape = (size,) if isinstance(size, int) else tuple(size)
        return np.broadcast_to(np.arange(shape[-1]) * 0.37 % 1, shape).copy()

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        """In the middle."""
        return (low + high) / 2

    def integers(self, low: Any, high: Any = None, *_: Any, **__: Any) -> Any:
        """In the middle."""
        return low // 2 if high is None else (low + high) // 2

    def permutation(self, x: Any, *_: Any) -> Any:
        """From the last to the first."""
        return np.asarray(range(x) if isinstance(x, int) else x)[::-1].copy()

    def choice(self, a: Any, size: Any = None, replace: bool = True, **_: Any) -> Any:
        """The last one each time or, without replacement, the last ones."""
        a = np.arange(a) if isinstance(a, int | np.integer) else np.asarray(a)
        return np.full(size, a[-1]) if replace else a[len(a) - int(size) :].copy()


@contextmanager
def still() -> Iterator[None]:
    """While open, what is drawn on the device does not depend on the batch."""
    was = torch.multinomial, torch.rand, torch.randn_like
    # The least likely of what can be drawn: what was drawn before is not drawn again where draws are counted.
    torch.multinomial = lambda p, number: p.where(p > 0, 2).argmin(-1, keepdim=True)  # type: ignore[assignment]
    torch.rand = lambda *size, **_: torch.full(size, 0.5)  # type: ignore[assignment]
    torch.randn_like = lambda x: torch.arange(x.shape[-1]).cos().expand_as(x).to(x)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.multinomial, torch.rand, torch.randn_like = was


@dataclass
class Case:
    """An objective, what it trains, and what it is trained on."""

    objective: Any
    trainee: Trainee
    rows: list[Any]
    context: Context
    buffers: dict[str, torch.Tensor]  # as they are at first

    def batch(self, start: int = 0, stop: int | None = None) -> Batch:
        """Some of the rows as the loader would hand them on."""
        chosen = self.rows[start:stop]
        batch = self.objective.prepare(chosen, replace(self.context, rng=Still()))
        return {"tokens": torch.tensor(sum(row.tokens for row in chosen))} | batch

    def micro_batches(self) -> list[list[Batch]]:
        """The rows in uneven micro-batches."""
        return [[self.batch(a, b)] for a, b in zip((0, *CUTS), (*CUTS, None), strict=True)]

    def gradients(
        self, micro_batches: list[list[Batch]], world: World, wrapped: nn.Module | None = None, targets: Any = None,
        precision: str = "float32",
    ) -> Any:  # fmt: skip
        """What the loop leaves in the parameters, by name, and the loss that it would log.

        `targets` are the numbers of the whole that the micro-batches are part of, if it is not they together.
        """
        settings = Settings(budget=Budget(steps=1), precision=precision)
        nothing: Any = None
        training = Training(
            self.trainee, wrapped or self.trainee, nothing, nothing, nothing, (), settings, world, Path()
        )  # fmt: skip
        works = [work_of(training.model, batches) for batches in micro_batches]
        with still():
            totals = exchange(training, micro_batches, works, {})
            totals = replace(totals, targets=targets or totals.targets, flops={})  # which test_meter.py counts
            _, record = forward_backward(training, micro_batches, works, {}, totals)
        for name, buffer in self.trainee.named_buffers():  # what is averaged or counted begins anew
            buffer.copy_(self.buffers[name])
        found = {n: full(p.grad).clone() for n, p in self.trainee.named_parameters() if p.grad is not None}
        self.trainee.zero_grad(set_to_none=True)
        return found, float(record["loss"])


def first(families: tuple[str, ...]) -> str:
    """A family of the table that a method accepts which declares these."""
    return KINDS.get(families[0]) or families[0] if families else "llama"


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """How far apart two gradients are, against the length of the first."""
    assert a.keys() == b.keys() and a
    off = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
    return (off / sum(float(g.double().square().sum()) for g in a.values())) ** 0.5


def build(
    name: str, given: dict[str, Any], family: str, prepared: Path, folder: Path, make: Callable[..., Any] | None = None
) -> Case:
    """A case; `folder` is where teachers' checkpoints are made.

    `make(family, task, vocabulary, seed=0)` gives models in place of tiny ones: of seeds 1 and 7 what is trained, and
    its teacher.
    """
    make = make or _model
    tokenizer = load_tokenizer(prepared / "tokenizer")
    vocabulary = Vocabulary.of(tokenizer)
    cls: Any = method_class(name, "objective")
    family = family or FAMILY.get(name) or first(cls.families)
    needed = {item.name for item in fields(cls) if item.default is item.default_factory is MISSING}
    if name == "ul2":  # the tokenizer has no mode tokens
        given = given | {"modes": vocabulary.tokens[30:33]}
    if name == "cache_augmentation":  # its defaults make thousands of positions of each row
        given = {"latents": 2, "ahead": 4, "traces": 6} | given
    if name == "deft":  # a sharper count than this one makes much of rounding
        given = given | {"epsilon": 1e-2}
    if name == "autodistil":  # students that a tiny model holds
        sizes = {
            "hidden_size": (16, 32),
            "num_attention_heads": (2, 4),
            "num_hidden_layers": (1, 2),
            "mlp_ratio": (1.5,),
        }
        given = sizes | {"head_size": 8} | given
    if name == "smart":  # the direction of a tiny step is rounding's
        given = given | {"sigma": 0.1}
    if name == "chat":
        given = {"answer": 4} | given
    if name == "chat" and not tokenizer.chat_template:
        inputs = Inputs(tokenizer=tokenizer)
        template: Any = method_class("chat_template", "surgery")(template="headings")
        template(nn.Identity(), inputs)
        tokenizer = inputs.extra["tokenizer"]
    values = _needed(name, needed - given.keys(), family, vocabulary, tokenizer, folder, make)
    objective = cls(**values, **given)
    torch.manual_seed(0)
    generates = "seq2seq" in (name, given.get("objective"))
    task = GENERATES[family] if generates else TASK[family] if name == "native" else objective.task
    model: Any = make(family, task, vocabulary, seed=1)
    if name in SURGERIES:
        surgery = dict(SURGERIES[name])
        made: Any = method_class(surgery.pop("method"), "surgery")(**surgery)
        ids_BL = torch.randint(3, vocabulary.size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        text = [{"input_ids": ids_BL, "domain_B": torch.arange(2)}] if made.needs_text else []
        model = made(copy.deepcopy(model), Inputs(batches=text))
    context = Context(vocabulary, LENGTH, Still(), encoder=Encoder(tokenizer), domains=("kept", "forgotten"))
    rows: list[Any] = _rows(vocabulary)
    if objective.reads == "examples":
        rows = _examples()
        model.config.architectures = [type(model).__name__]
        context = replace(context, processor=tokenizer, config=model.config)
    if hasattr(objective, "predict"):
        labels = objective.labels([row.columns[objective.columns[-1]] for row in rows])
        model = objective.ready(model, labels, vocabulary, 0)
        context = replace(context, labels=labels_of(model))
    trainee = Trainee(model, [objective], [1.0]).train()
    for module in trainee.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    buffers = {name: buffer.clone() for name, buffer in trainee.named_buffers()}
    return Case(objective, trainee, rows, context, buffers)


def _model(family: str, task: str, vocabulary: Vocabulary, seed: int) -> Any:
    """A tiny model without dropout, its weights large enough that they matter."""
    still_fields = {
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "t5": {"dropout_rate": 0.0},
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    }.get(family, {})  # fmt: skip
    model = new_model(family, TINY[family] | still_fields, task=task, vocabulary=vocabulary, seed=seed)
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=source)
    return model


def two_words(vocabulary: Vocabulary) -> dict[str, str]:
    """Two classes, each with a word that is one token."""
    start = "Ġ" if any(token.startswith("Ġ") for token in vocabulary.tokens) else ""  # WordPiece marks what goes on
    words = (token.removeprefix(start) for token in vocabulary.tokens if token.startswith(start))
    first, second = itertools.islice((word for word in words if word.isascii() and word.isalpha()), 2)
    return {"0": first, "1": second}


def _needed(
    name: str, missing: set[str], family: str, vocabulary: Vocabulary, tokenizer: Any, folder: Path,
    make: Callable[..., Any],
) -> Any:  # fmt: skip
    """Values for the fields that have no default."""
    values: dict[str, Any] = {}
    if "words" in missing:
        values["words"] = two_words(vocabulary)
    if "teacher" in missing:
        task = "base" if name == "well_read_students" else TASK[family]
        model: Any = make(family, task, vocabulary, seed=1 if name == "pela_pretraining" else 7)
        if name == "well_read_students":
            model = with_head(model, "sequence", ("0", "1"), vocabulary)
        place = folder / f"{name}-{family}"
        if not place.exists():
            checkpoint.save(model, tokenizer, place / "checkpoint")
        values["teacher"] = str(place)
    if "languages" in missing:
        values["languages"] = {"kept": "deu_Latn", "forgotten": "rus_Cyrl"}
    if "tags" in missing:
        values["tags"] = {"tags": ("B-a", "O")}
    if "forget" in missing:
        values["forget"] = "forgotten"
    assert missing == values.keys(), f"no value for {missing - values.keys()} of {name}: give one here"
    return values


def _rows(vocabulary: Vocabulary) -> list[Row]:
    rng = np.random.default_rng(5)
    ordinary, found = np.flatnonzero(~vocabulary.special_V), []
    for index, pieces in enumerate(PIECES):
        tokens = [[vocabulary.bos, *rng.choice(ordinary, max(n - 2, 0)), vocabulary.eos][:n] for n in pieces]
        starts = np.concatenate([[0], np.cumsum(pieces)[:-1]]).astype(np.int32)
        found.append(Row(np.concatenate(tokens).astype(np.int32), starts, np.arange(len(pieces)), index % 2, index))
    return found


def _examples() -> list[Example]:
    return [
        Example({
            "text": text, "label": str(number % 2), "target": "yes" if number % 2 else "it is not so",
            "tags": ["B-a" if place % 2 else "O" for place, _ in enumerate(text.split())],
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "so" * (1 + number % 3)}],
            "pair": TEXTS[number - 1], "relation": ("random", "linked", "grouped")[number % 3],
            "entity_start": [0, 3][: number % 3], "entity_end": [2, 6][: number % 3], "entity_sign": [-1, 1][: number % 3],
            "entity_relation": ["is", "of"][: number % 3], "entity_other": ["a thing", "it"][: number % 3],
            "choices": ["it is so", "no" * (1 + number), text][: 2 + number % 2],
            "chosen": "it is so", "rejected": "no" * (1 + number),
        }, 0, number)
        for number, text in enumerate(TEXTS)
    ]  # fmt: skip


__all__ = ["Case", "all_cases", "build", "counts", "distance", "two_words", "work_of"]
