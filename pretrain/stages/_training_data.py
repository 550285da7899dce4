"""What a `train` stage trains and on what: the model with its processor, the corpus by split, the held-out measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeGuard, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from pretrain.core import checkpoint
from pretrain.core.batch import NO_VOCABULARY, Context, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.core.folders import checkpoint_of, corpus_of, tokenizer_of
from pretrain.core.models.families import at
from pretrain.core.models.heads import labels_of, with_language_head
from pretrain.core.processors import Processor, columns_of, load_processor, tokenizer_in
from pretrain.core.quick.plan import Plan
from pretrain.core.quick.vocabulary import check_alike, numbers_of
from pretrain.core.samples import Sample
from pretrain.corpus.examples import Examples
from pretrain.corpus.shards import Shards
from pretrain.corpus.sources import evenly
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizers import load_tokenizer
from pretrain.dial.configs import shape_from
from pretrain.evaluation.likelihood._shards import shard_loss
from pretrain.evaluation.tasks._objective import objective_loss
from pretrain.objectives import Objective
from pretrain.objectives._fine_tuning import named
from pretrain.objectives.labelled import FineTuning
from pretrain.stages import Job, Record, tokens_of
from pretrain.training.budget import Budget, held_out_tokens
from pretrain.training.distributed import World
from pretrain.training.loader import Loader
from pretrain.training.running import Trainee

SPLITS = ("train", "validation")  # those that training opens

Splits = Mapping[str, Shards | Examples]


class Weighted(Protocol):
    """An objective and its weight in the sum."""

    @property
    def method(self) -> Objective:
        """The objective."""

    @property
    def weight(self) -> float:
        """Its weight."""


class Measured(Protocol):
    """What of a `train` stage's fields says how much is measured."""

    length: int
    batch_rows: int
    evaluate_every: float
    evaluate_tokens: int | Literal["auto"]


class Asked(Protocol):
    """What of a `train` stage's fields this file reads."""

    name: str
    init: str | None
    tokenizer: str | None
    processor: str | None
    model: Record
    task: str
    length: int
    batch_rows: int
    micro_rows: int

    def new_model(self, processor: Processor, seed: int) -> PreTrainedModel:
        """The new model."""

    def weighted(self) -> Sequence[Weighted]:
        """The objectives with their weights."""


def open_model(stage: Asked, job: Job) -> tuple[PreTrainedModel, Processor]:
    """The model to train, and the processor of its inputs."""
    processor: Processor | None = None
    if "tokenizer" in job.inputs:
        processor = load_tokenizer(tokenizer_of(job.inputs["tokenizer"]))
    elif "processor" in job.inputs:
        processor = open_processor(job.inputs["processor"])
    if stage.init is not None:
        # Weights are trained in float32 whatever they are stored in: bfloat16 would lose small updates.
        model, saved_processor = checkpoint.load(checkpoint_of(job.inputs["init"]), dtype=torch.float32)
        names = (f"init {stage.init}", f"tokenizer {stage.tokenizer or stage.processor}")
        tables = (numbers_of(tokenizer_in(each)) for each in (saved_processor, processor))
        check_alike(f"stage {stage.name!r}", dict(zip(names, tables, strict=True)), ("tokenizer",))
        processor = processor or saved_processor
        if processor is None:
            raise PretrainError(f"stage {stage.name!r}: {stage.init} has no tokenizer; accepted: a tokenizer field")
        return _headed(stage, job, model), processor
    assert processor is not None, "a new model has a tokenizer or a processor: see the stage's check"
    return stage.new_model(processor, job.seed), processor


def _headed(stage: Asked, job: Job, model: PreTrainedModel) -> PreTrainedModel:
    """The model, with a new head where it has none and what is learnt from rows of text needs one."""
    objective = stage.weighted()[0].method
    task = stage.task if stage.task != "auto" else objective.task
    if objective.reads != "rows" or task not in ("causal", "masked", "seq2seq"):
        return model
    made = with_language_head(model, task, seed=job.seed)
    if made is not model:
        job.say(f"{stage.init} has no head: {type(made).__name__} with a new one")
    return made


def open_processor(folder: Path) -> Processor:
    """The processor that a stage wrote, or of a checkpoint."""
    place = next(
        (folder / name for name in ("processor", "tokenizer", "checkpoint") if (folder / name).is_dir()), folder
    )
    processor = load_processor(place)
    if processor is None:
        raise PretrainError(f"no processor at {folder}; accepted: a processor stage, a tokenizer stage or a checkpoint")
    return processor


def check_entries(stage: Asked, model: PreTrainedModel, processor: Processor) -> None:
    """Each of the tokenizer's entries must have an embedding."""
    tokenizer = tokenizer_in(processor)
    if tokenizer is None:
        return
    entries, rows = len(tokenizer), len(at(model.get_input_embeddings(), "weight"))
    if entries > rows:
        raise PretrainError(
            f"stage {stage.name!r}: the tokenizer has {entries} entries, the model embeddings of {rows}; accepted: "
            "the checkpoint's own tokenizer, or one that the surgery vocabulary_expansion has put in"
        )


def open_rows(stage: Asked, job: Job, processor: Processor, world: World) -> dict[str, Shards]:
    """The corpus in tokens by split, which the first process makes."""
    tokenizer = tokenizer_in(processor)
    if tokenizer is None:
        names = ", ".join(w.method.name for w in stage.weighted())
        raise PretrainError(
            f"stage {stage.name!r}: {names} reads rows of text, which a {type(processor).__name__} does not make; "
            "accepted: a tokenizer, or an objective that reads examples"
        )
    if world.main:
        tokens_of(job, tokenizer, splits=SPLITS, verify=True)
    world.wait()
    return tokens_of(job, tokenizer, splits=SPLITS, verify=False)


def open_examples(
    stage: Asked, job: Job, model: PreTrainedModel, processor: Processor
) -> tuple[PreTrainedModel, dict[str, Examples]]:
    """The model, with its objective's head where it has one, and the corpus as examples by split."""
    objectives = [w.method for w in stage.weighted()]
    objective, corpus = objectives[0], Corpus(corpus_of(job.inputs["corpus"]))
    columns = [name for method in objectives for name in (method.columns or columns_of(processor))]
    examples_by_split = {split: Examples(corpus, split, processor, columns) for split in SPLITS}
    if predicts(objective):
        labels = _labels(objective, examples_by_split["train"])
        before, model = model, objective.ready(model, labels, vocabulary_of(processor), job.seed)
        values = examples_by_split["train"].split[objective.columns[-1]]
        objective.begin(model, values, fresh=model is not before)
        _leave_unlearnt(objective, labels, examples_by_split["validation"], job)
    model.config.architectures = [type(model).__name__]  # so that the configuration says the whole kind of the model
    for examples in examples_by_split.values():
        examples.given |= {"labels": labels_of(model), "pool": examples_by_split["train"], "config": model.config}
    return model, examples_by_split


def _labels(objective: FineTuning[object], train: Examples) -> tuple[str, ...]:
    """The names of the classes; an error that one document is to blame for names it."""
    values = train.split[objective.columns[-1]]
    try:
        return objective.labels(values)
    except PretrainError as error:
        blamed = [number for number, value in enumerate(values) if _refuses(objective, value, str(error))]
        if 0 < len(blamed) < len(values):
            raise PretrainError(f"{named(train.row(None, blamed[0]))}: {error}") from error
        raise


def _refuses(objective: FineTuning[object], value: object, words: str) -> bool:
    """Whether a label is refused by itself, with these words."""
    try:
        objective.labels([value])
    except PretrainError as error:
        return str(error) == words
    return False


def _leave_unlearnt(objective: FineTuning[object], labels: Sequence[str], held_out: Examples, job: Job) -> None:
    """Leave out held-out documents of classes that no training document has: nothing can be learnt of them."""
    column = objective.columns[-1]
    values = held_out.split[column] if len(held_out) else []
    known = [number for number, value in enumerate(values) if objective.learnt(value, labels)]
    if len(known) < len(values):
        unlearnt = {str(value) for value in values if not objective.learnt(value, labels)}
        what = f"{len(values) - len(known)} held-out documents have a {column!r} that no training document has"
        job.say(f"warning: {what} ({', '.join(sorted(unlearnt)[:3])}): they are passed over")
        held_out.keep(known)


def targets_per_byte(split: Shards | Examples) -> float | None:
    """Tokens to predict for each byte of text; None of what is not rows of text."""
    return split.targets_per_byte() if isinstance(split, Shards) else None


def predicts(objective: Objective) -> TypeGuard[FineTuning[object]]:
    """Whether the objective learns labels, which it can predict."""
    return hasattr(objective, "predict")


def vocabulary_of(processor: Processor) -> Vocabulary:
    """That of the processor's tokenizer, or an empty one."""
    tokenizer = tokenizer_in(processor)
    return NO_VOCABULARY if tokenizer is None else Vocabulary.of(tokenizer)


def held_out_of(
    stage: Measured, budget: Budget, model: PreTrainedModel, plan: Plan | None, say: Callable[[str], None] = print
) -> int:
    """Held-out tokens of a measurement: of `auto`, which is said, by the budget, and of one of seconds by the plan."""
    step, shape = float(stage.batch_rows * stage.length), shape_from(model.config.to_dict())
    steps = {
        "steps": budget.limit,
        "tokens": budget.limit / step,
        "flops": budget.limit / (shape.flops(stage.length) * step) if shape is not None else None,
        "seconds": plan.steps if plan is not None else None,
    }[budget.unit]
    tokens = held_out_tokens(stage.evaluate_tokens, stage.evaluate_every, steps, step)
    if not isinstance(stage.evaluate_tokens, int):
        say(f"measured on {tokens:,} validation tokens at most each time")
    return tokens


def evaluation(
    stage: Asked, held_out: Shards | Examples, vocabulary: Vocabulary, most: int
) -> Callable[[Trainee], dict[str, float]] | None:
    """What is measured while training, on `most` tokens: the likelihood of held-out text, or the objective's loss."""
    objective = stage.weighted()[0].method
    if not len(held_out):
        return None
    if isinstance(held_out, Shards) and objective.task == "causal" and not objective.own_evaluation:
        return lambda trainee: shard_loss(trainee.model, held_out, length=stage.length, max_tokens=most)
    rows = stage.micro_rows or stage.batch_rows
    loader = Loader(held_out, [objective], vocabulary, length=stage.length, batch_rows=rows)

    def measure(trainee: Trainee) -> dict[str, float]:
        metrics = objective_loss(trainee.model, trainee.beside[0], objective, loader, most)
        if isinstance(held_out, Examples) and predicts(objective):
            model = cast("PreTrainedModel", trainee.model)
            metrics |= _answers(stage, objective, model, held_out, vocabulary, max(1, most // stage.length))
        return metrics

    return measure


def _answers(
    stage: Asked, objective: FineTuning[object], model: PreTrainedModel, held_out: Examples, vocabulary: Vocabulary,
    most: int,
) -> dict[str, float]:  # fmt: skip
    """The fine-tuning objective's metrics on at most so many held-out documents."""
    examples = [held_out.row(held_out, number) for number in evenly(range(len(held_out)), most)]
    context = Context(vocabulary, stage.length, np.random.default_rng(0), **held_out.given)
    predicted = objective.predictions(model, examples, context)
    return objective.metrics(predicted, objective.expected(examples, context))


def samples(
    stage: Asked, model: PreTrainedModel, splits: Splits, vocabulary: Vocabulary, count: int = 8
) -> list[Sample]:
    """What the first objective shows of held-out examples, of training ones where there are none held out."""
    objective = stage.weighted()[0].method
    shown = splits["validation"] if len(splits["validation"]) else splits["train"]
    if not isinstance(shown, Examples):
        return []
    examples = [shown.row(shown, number) for number in evenly(range(len(shown)), count)]
    context = Context(vocabulary, stage.length, np.random.default_rng(0), **shown.given)
    return objective.show(model, examples, context)
