"""A tiny student's architecture by a genetic algorithm: the most work in a given number of bytes."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Annotated, ClassVar, cast

import torch

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import Count, Ge, Positive, Share, Whole
from pretrain.core.encoding import text_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.heads import HEADS, labels_of, output
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._architecture import GENES, Shape, configured, flops, parameters, shape_of, size

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Genome = tuple[int, ...]  # a choice for each of `GENES`


@dataclass(frozen=True)
class Compressor(Surgery):
    """Compressing Pre-trained Models of Code into 3 MB (arXiv:2208.07120).

    A new student of the model's family, with random weights, of the architecture that a genetic algorithm finds in the
    space of the fields. It maximises, with T the `target_bytes`,

        GFLOPs of one input of `length` tokens - penalty · |T - size| in MB,

    and gives the best that it has met of at most T bytes (of weights in float32, without the file's header), of equals
    the one with the most heads. A MB buys about length / 2000 GFLOPs, and the attention's: with a `penalty` far above
    that only the size counts, with one below it the search leaves the target's neighbourhood. The head, its labels, the
    positions and all else that the configuration says stay. With choices of `vocabulary` the student has a tokenizer of
    its own, byte-level BPE trained on the stage's text (`calibration_rows` rows of `length` of its `corpus`: draw
    many), which may give fewer tokens than the search chose. `vocabulary: []` keeps the model's tokenizer, which
    `distillation` needs. Then train it: the paper's is `{method: well_read_students, teacher: …, temperature: 10,
    label: null}` for a classifier.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2", "bert")

    target_bytes: Annotated[float, Ge(1)] = 3e6
    vocabulary: tuple[Count, ...] = tuple(range(1000, 51000, 1000))
    heads: tuple[Count, ...] = (1, 2, 4, 8)
    width: tuple[Count, ...] = tuple(range(16, 769, 16))
    feed_forward: tuple[Count, ...] = tuple(range(32, 3072, 32))
    layers: tuple[Count, ...] = tuple(range(1, 13))
    length: Count = 514
    penalty: Positive = 1.0
    population: Annotated[int, Ge(2)] = 50
    generations: Whole = 100
    crossover: Share = 0.6  # else both parents mutate

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in GENES:
            if name != "vocabulary" and not getattr(self, name):
                raise PretrainError(f"compressor: {name} (): accepted: one choice or more", place=(name,))

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The student; its tokenizer, where it is a new one, goes back in `inputs.extra`, which then has no batches."""
        inputs = inputs or Inputs()
        before = shape_of(model.config, _labels(model))
        texts = self._texts(inputs)
        space = {name: getattr(self, name) for name in GENES}
        space["vocabulary"] = self.vocabulary or (before.vocabulary,)
        best = search(
            replace(before, itemsize=4), space, self.target_bytes, length=self.length, penalty=self.penalty,
            population=self.population, generations=self.generations, crossover=self.crossover, seed=inputs.seed,
        )  # fmt: skip
        chosen, old, tokenizer = best.vocabulary, inputs.tokenizer, None
        if self.vocabulary and old is not None:
            tokenizer = train_tokenizer(
                texts, vocab_size=chosen, mask=old.mask_token is not None, cls=old.cls_token is not None
            )
            inputs.extra.update(tokenizer=tokenizer, batches=[])
            best = replace(best, vocabulary=len(tokenizer))
        student = _built(model, best, tokenizer, inputs.seed)
        for suffix, shape in (("_before", before), ("", best)):
            numbers = {"bytes": size(shape), "parameters": parameters(shape), "flops": flops(shape, self.length)}
            report(inputs, **{f"compressor/{name}{suffix}": value for name, value in numbers.items()})
        report(inputs, **{f"compressor/{name}": getattr(best, name) for name in GENES})
        report(inputs, **{"compressor/vocabulary_chosen": chosen})
        return student

    @property
    def needs_text(self) -> bool:
        """A tokenizer is trained on text."""
        return bool(self.vocabulary)

    def _texts(self, inputs: Inputs) -> list[str]:
        """The stage's text, one piece a document and row; empty where the tokenizer stays."""
        if not self.vocabulary:
            return []
        if inputs.tokenizer is None or not inputs.batches:
            raise PretrainError(
                "compressor: it trains a tokenizer: accepted: a surgery stage with `corpus` and a checkpoint with a "
                "tokenizer, or vocabulary: [] to keep the model's",
                place=("vocabulary",),
            )
        texts: list[str] = []
        for batch in inputs.batches:
            for ids_L, document_L in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                pieces = [ids_L[document_L == number] for number in range(1, int(document_L.max()) + 1)]
                texts += [text_of(inputs.tokenizer, piece.tolist(), skip_special_tokens=True) for piece in pieces]
        return texts


def _labels(model: PreTrainedModel) -> int:
    """How many labels a classifier of documents has; 0 of a language model. Another model is an error."""
    if type(model) is HEADS["sequence"]._model_mapping.get(type(model.config), None):
        return len(labels_of(model))
    if output(model) is None and model.get_output_embeddings() is not None:
        return 0
    raise PretrainError(
        f"compressor: the checkpoint is a {type(model).__name__}: accepted: a causal or masked language model, or a "
        "classifier of documents"
    )


def _built(
    model: PreTrainedModel, shape: Shape, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> PreTrainedModel:
    """A model of the same class with random weights, its special tokens those of its tokenizer."""
    config = configured(model.config, shape)
    if tokenizer is not None:
        known = Vocabulary.of(tokenizer)
        ids = {"pad": known.pad, "bos": known.bos, "eos": known.eos, "cls": known.bos, "sep": known.eos}
        for name, number in ids.items():
            if hasattr(config, f"{name}_token_id"):
                setattr(config, f"{name}_token_id", number)
    config.dtype = torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = type(model)(config)
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    cast("nn.Module", student).to(model.device)  # transformers' stub of `to` takes no device
    return student.eval()


def search(
    shape: Shape, space: Mapping[str, Sequence[int]], target_bytes: float, *, length: int = 514, penalty: float = 1.0,
    population: int = 50, generations: int = 100, crossover: float = 0.6, seed: int = 0,
) -> Shape:  # fmt: skip
    """The best that was met of at most `target_bytes`: `shape` with a choice for each of `GENES`.

    Each generation adds as many children as there are genomes: of two parents, either crossed at one point or (with
    probability 1 - `crossover`) both mutated, from one gene on to the last; children already there are mutated until
    they are new. The best stay. Unlike the authors' code the first generation holds the smallest architecture, and
    what is larger than the target is not the result. Raises `PretrainError` where even the smallest is larger.
    """
    choices = [sorted({*space[name]}) for name in GENES]
    rng, most = random.Random(seed), prod(map(len, choices))
    alive = [_smallest(shape, choices, target_bytes)]
    known: dict[Genome, float] = {}
    within: set[Genome] = set()

    def order(genome: Genome) -> tuple[float, Genome]:
        """By fitness, equals by their genes, so that the seed alone decides the result."""
        if genome not in known:
            made = shape.changed(_named(genome))
            known[genome] = score(made, target_bytes, length, penalty)
            if fits(made, target_bytes):
                within.add(genome)
        return -known[genome], genome

    def fresh(genome: Genome, there: set[Genome]) -> Genome:
        while genome in there:
            genome = _mutated(genome, choices, rng)
        return genome

    while len(alive) < min(population, most):
        alive.append(fresh(tuple(rng.choice(options) for options in choices), {*alive}))
    alive.sort(key=order)
    for _ in range(generations):
        there = {*alive}
        for _ in range(0, population if len(alive) > 1 else 0, 2):
            for child in _children(rng.sample(alive, 2), choices, crossover, rng):
                if len(there) < most:
                    there.add(fresh(child, there))
        alive = sorted(there, key=order)[:population]
    best = _named(min(within, key=order))
    alike = [made for heads in space["heads"] if fits(made := shape.changed(best | {"heads": heads}), target_bytes)]
    return max(alike, key=lambda made: (score(made, target_bytes, length, penalty), made.heads))


def score(shape: Shape, target_bytes: float, length: int, penalty: float) -> float:
    """What the search maximises; what cannot be built is worst."""
    if not shape.valid:
        return -float("inf")
    return flops(shape, length) / 1e9 - penalty * abs(target_bytes - size(shape)) / 1e6


def fits(shape: Shape, target_bytes: float) -> bool:
    """Whether there is such a model and it has at most so many bytes."""
    return shape.valid and size(shape) <= target_bytes


def _named(genome: Genome) -> dict[str, int]:
    return dict(zip(GENES, genome, strict=True))


def _children(
    parents: Sequence[Genome], choices: Sequence[Sequence[int]], crossover: float, rng: random.Random
) -> list[Genome]:
    """Two of two parents: crossed at one point, or each mutated."""
    first, second = parents
    if rng.random() < crossover:
        cut = rng.randint(1, len(first) - 1)
        return [first[:cut] + second[cut:], second[:cut] + first[cut:]]
    return [_mutated(first, choices, rng), _mutated(second, choices, rng)]


def _mutated(genome: Genome, choices: Sequence[Sequence[int]], rng: random.Random) -> Genome:
    """Another choice for each gene from one of them, drawn, on to the last."""
    first = rng.randrange(len(genome))
    made = list(genome)
    for place in range(first, len(genome)):
        others = [option for option in choices[place] if option != genome[place]]
        made[place] = rng.choice(others) if others else genome[place]
    return tuple(made)


def _smallest(shape: Shape, choices: Sequence[Sequence[int]], target_bytes: float) -> Genome:
    """The architecture of the fewest bytes: the least of all genes but heads and width, which must suit each other."""
    least = {name: options[0] for name, options in zip(GENES, choices, strict=True)}
    pairs = product(*(choices[GENES.index(name)] for name in ("width", "heads")))
    made = [shape.changed(least | {"width": width, "heads": heads}) for width, heads in pairs]
    smallest = min((shape for shape in made if shape.valid), key=size, default=None)
    if smallest is None:
        raise PretrainError("compressor: width, heads: accepted: a width that some number of heads divides")
    if size(smallest) > target_bytes:
        raise PretrainError(
            f"compressor: target_bytes {target_bytes:.0f}: accepted: {size(smallest)} or more, the smallest there is",
            place=("target_bytes",),
        )
    return tuple(getattr(smallest, name) for name in GENES)
