"""`train`: train a new model or a checkpoint on a corpus; writes a checkpoint, its log and its training state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, field_validator, model_validator

from pretrain.core.bounds import Count, Ge, NonNegative, OpenShare, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json
from pretrain.core.quick.declared import check_config, check_task, config_values
from pretrain.core.quick.hub import located
from pretrain.core.quick.positions import check_length, positions
from pretrain.core.quick.quantities import bare, figure, short
from pretrain.core.quick.table import listed
from pretrain.core.quick.vocabulary import check_alike, check_references, labels_of, numbers_of, stored_numbers
from pretrain.core.samples import write_samples
from pretrain.records import StageResult
from pretrain.stages import (
    Estimate,
    Given,
    Job,
    Misfit,
    ObjectiveField,
    OptimizerField,
    PolicyField,
    Record,
    Ref,
    ScheduleField,
    Stage,
    SurgeryField,
    build_dataclass,
    build_method,
    checkpoint_of,
)
from pretrain.stages._expected import expect, planned
from pretrain.training.budget import MOST_HELD_OUT, Budget, spent_before
from pretrain.training.compatible import check_averages, check_families, check_planned, ill_scheduled

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.core.processors import Processor
    from pretrain.stages._training_data import Splits
    from pretrain.training.running import Training


class Weighted(BaseModel):
    """An objective and its weight in the sum."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True)
    method: ObjectiveField
    weight: float = 1.0


def build_weighted(value: object) -> Weighted:
    """From `NAME` or `{method: NAME, weight: 0.5, …}`."""
    if isinstance(value, Weighted):
        return value
    given = {"method": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else value
    weight = bare(given.pop("weight", 1.0)) if isinstance(given, dict) else 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"weight {weight!r}: accepted: a number above 0")
    given = build_method(given, "objective")
    return Weighted(method=given, weight=weight)


def dump_weighted(value: Weighted) -> Record:
    """As a recipe says it."""
    return {"method": value.method.name} | asdict(value.method) | {"weight": value.weight}


TIMES = {"minutes", "minute", "min", "hours", "hour", "h", "second", "sec", "s", "days", "time"}  # asked for of budgets


def build_budget(given: object) -> Budget:
    """A budget from a mapping; words of time that are none of its fields are answered with how a time is written."""
    try:
        return given if isinstance(given, Budget) else build_dataclass(Budget, given, "budget")
    except Misfit as error:
        if isinstance(given, dict) and not TIMES & {str(name).lower() for name in given}:
            raise
        raise Misfit(f"{error}; a time is seconds: 30min, or 2h", error.place) from error


WeightedField = Annotated[Weighted, PlainValidator(build_weighted), PlainSerializer(dump_weighted)]
BudgetField = Annotated[
    Budget, PlainValidator(build_budget), PlainSerializer(lambda b: {b.unit: b.limit}),
]  # fmt: skip


class Train(Stage):
    """Train a new model (`model`), or go on with a checkpoint (`init`), on a corpus; writes a checkpoint.

    Numbers may be written as `100k`, `2M`, `1B`, seconds as `30min`, `2h`. What `init` and `tokenizer` name may be a
    model of the Hugging Face hub, `org/name` or `org/name@REVISION`: its safetensors and JSON are fetched once, and the
    name stands for that revision from then on.

    corpus: Its training split is trained on, its validation split measured on.
    tokenizer: By default that of the checkpoint to go on with.
    processor: In place of a tokenizer, for other inputs than text.
    init: The checkpoint to go on with.
    model: A new model: `family`, and fields of that family's `transformers` configuration.
    size: `auto` chooses for the budget what the recipe does not say itself; see [size](../size.md).
    surgeries: What changes the model before training.
    task: The head: `causal`, `masked`, `seq2seq`, `base`, `pretraining` or an `AutoModelFor…` of `transformers`; by
        default what the objective needs.
    length: Tokens of a row; of whole examples at most so many tokens or samples.
    batch_rows: Rows, or examples, of an optimiser step, over all processes.
    micro_rows: How many of them are computed at a time; 0 is all. Fewer take less memory for the same gradient, but for
        other draws of random masks and dropout.
    objective: What is learnt.
    objectives: Several in place of `objective`, each with a `weight` in the sum.
    optimizer: What makes a step of a gradient; its `lr` is the peak.
    schedule: The rate's course over the budget.
    policies: What changes data or weights while training runs.
    mixture: Weights of the domains in what is trained on, by name; by default each row comes once an epoch.
    budget: When training ends: exactly one of the five fields below.
    clip: The gradient's norm is held below it; 0 does not clip.
    evaluate_every: Steps, or a share of the budget, between two measurements; 0 measures at the end alone. Of a budget
        of seconds they take a quarter beside it at most, what would take more is left out; of others all are made.
    evaluate_tokens: Held-out tokens of each measurement, the same; `auto`: as many as take a quarter of the time.
    save_every: Steps between two training states, from which an interrupted run goes on; 0 saves none.
    keep: How many training states stay.
    log_every: Steps between two lines of the log; 0 is each step on a CPU, each tenth on a GPU.
    max_skips: A step whose loss or gradient is not finite changes nothing; so many in a row are an error.
    workers: Threads that prepare batches while a step runs; 0 prepares them in between.
    compile: Whether each block is compiled with `torch.compile`.
    checkpointing: Whether activations are computed again in the backward pass in place of being kept.
    precision: Of matrix products; `auto` is bfloat16 where the hardware is quick at it.
    strategy: Under `torchrun`: copies of the model (`ddp`), or its parts spread over the processes (`fsdp`).
    """

    version = 1
    distributed: ClassVar[bool] = True
    neutral: ClassVar[tuple[str, ...]] = ("size", "save_every", "keep", "log_every", "max_skips", "workers")
    writes: ClassVar[str] = "checkpoint"
    stage: Literal["train"] = "train"
    corpus: Ref
    tokenizer: Ref | None = None
    processor: Ref | None = None
    init: Ref | None = None
    model: Record = {}
    size: str | dict[str, str] | None = None  # auto: what is not said here is chosen for the budget (docs/size.md)
    surgeries: list[SurgeryField] = []
    task: str = "auto"  # causal, masked, seq2seq, base, pretraining, or an AutoModelFor… of transformers
    length: Annotated[int, Ge(2)] = 512
    batch_rows: Count = 16
    micro_rows: Whole = 0
    objective: ObjectiveField = Field(default="causal_lm", validate_default=True)
    objectives: list[WeightedField] = []
    optimizer: OptimizerField = Field(default="adamw", validate_default=True)
    schedule: ScheduleField = Field(default="cosine", validate_default=True)
    policies: list[PolicyField] = []
    mixture: dict[str, NonNegative] | None = None
    budget: BudgetField
    clip: NonNegative = 1.0
    evaluate_every: Whole | OpenShare = 0  # steps, or a share of the budget: 0.04 is 25 times; 0: only at the end
    evaluate_tokens: Count | Literal["auto"] = MOST_HELD_OUT  # of each evaluation while training
    save_every: Whole = 200
    keep: Count = 2
    log_every: Whole = 0
    max_skips: Count = 10
    workers: Whole = 1
    compile: bool = False
    checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    strategy: Literal["ddp", "fsdp"] = "ddp"

    @field_validator("model")
    @classmethod
    def _model_quantities(cls, model: Record) -> Record:
        return {name: value if name == "family" else bare(value) for name, value in model.items()}

    @model_validator(mode="after")
    def _one_origin(self) -> Train:
        if (self.init is None) == (not self.model):
            raise ValueError("accepted: exactly one of init (a checkpoint) and model (a family and its fields)")
        if self.model and "family" not in self.model:
            raise ValueError(f"model {self.model}: accepted: {{family: llama, …}}")
        if self.model and not isinstance(self.model["family"], str):
            raise Misfit(f"model family {str(self.model['family'])[:80]!r}: accepted: a name", ("model", "family"))
        if self.init is None and self.tokenizer is None and self.processor is None:
            raise ValueError(
                "a new model needs a tokenizer or a processor; accepted: tokenizer: NAME of a stage, or a folder"
            )
        if self.tokenizer is not None and self.processor is not None:
            raise ValueError("accepted: one of tokenizer and processor")
        if self.task != "auto":
            try:
                check_task(self.task)
            except PretrainError as error:
                raise Misfit(str(error), ("task",)) from error
        if self.model:
            try:
                check_config(self.model["family"], self.fields())
            except PretrainError as error:
                raise Misfit(str(error), ("model", *(error.place or ("family",)))) from error
            if self.tokenizer is not None and not self.surgeries:
                remedy = f", or model.max_position_embeddings: {self.length}"
                count = positions(config_values(self.model["family"], self.fields()))
                try:
                    check_length(self.length, count, f"this {self.model['family']}", remedy)
                except PretrainError as error:
                    raise Misfit(str(error), error.place) from error
        return self

    def fields(self) -> Record:
        """The new model's fields, without the name of its family."""
        return {k: v for k, v in self.model.items() if k != "family"}

    def check_inputs(self, earlier: Mapping[str, Stage]) -> None:
        """Refuse a length beyond the positions of the checkpoint to go on from, and a tokenizer that is not its own."""
        super().check_inputs(earlier)
        given = self.tokenizer or self.processor
        if self.init and given and not {self.init, given} & earlier.keys():
            tables = {
                f"{name} {of}": stored_numbers(located(of)) for name, of in (("init", self.init), ("tokenizer", given))
            }
            check_alike("train", tables, ("tokenizer" if self.tokenizer else "processor",))
        count = None if self.surgeries else self._positions(earlier)
        check_length(self.length, count, f"{self.init or 'the model'}")

    def _positions(self, earlier: Mapping[str, Stage]) -> int | None:
        """Those of the model before any surgery; None where they are not known yet, or not told in tokens of text."""
        if self.processor is not None:
            return None
        if self.model:
            return positions(config_values(self.model["family"], self.fields())) if self.tokenizer else None
        before = earlier.get(self.init or "")
        if before is not None:
            return before._positions(earlier) if isinstance(before, Train) and not before.surgeries else None
        try:
            folder = checkpoint_of(located(self.init or ""))
        except PretrainError as error:
            raise PretrainError(str(error), place=("init",)) from error
        return positions(read_json(folder / "config.json"))

    def splits(self) -> dict[str, str]:
        """Training that keeps its best weights needs held-out text."""
        return {"corpus": "validation"} if any(policy.name == "keep_best" for policy in self.policies) else {}

    def weighted(self) -> list[Weighted]:
        """The objectives with their weights."""
        return self.objectives or [Weighted(method=self.objective)]

    @model_validator(mode="after")
    def _one_kind(self) -> Train:
        if len({w.method.reads for w in self.weighted()}) > 1:
            names = ", ".join(f"{w.method.name} ({w.method.reads})" for w in self.weighted())
            raise ValueError(f"objectives {names}: accepted: all on rows of text, or all on examples")
        return self

    @model_validator(mode="after")
    def _together(self) -> Train:
        batches = -(-self.batch_rows // (self.micro_rows or self.batch_rows))
        if self.batch_rows % min(self.micro_rows or 1, self.batch_rows):
            raise ValueError(f"batch_rows {self.batch_rows}: accepted: a multiple of micro_rows ({self.micro_rows})")
        try:
            check_planned([w.method for w in self.weighted()], self.policies, batches)
            check_averages(self.optimizer, self.policies)
            if self.model:
                check_families([*(w.method for w in self.weighted()), *self.policies], listed(self.model["family"]))
        except PretrainError as error:
            raise ValueError(str(error)) from error
        return self

    def _reads(self) -> str:
        """What the objectives read."""
        return self.weighted()[0].method.reads

    def _plain(self) -> bool:
        """Whether the loss is the text's likelihood, so that it can be told in bits a byte."""
        return [(w.method.name, w.weight) for w in self.weighted()] == [("causal_lm", 1.0)]

    def methods(self) -> list[str]:
        """Without the default objective where `objectives` says others."""
        unused = {self.objective.name} - {w.method.name for w in self.weighted()}
        return [name for name in super().methods() if name not in unused]

    def progress(self, folder: Path) -> str:
        """The step of the newest training state."""
        return f"at step {spent['steps']:,.0f}" if (spent := spent_before(folder)) else ""

    def done(self, folder: Path, whole: Estimate) -> float:
        """The share of the budget that the newest training state has spent."""
        spent, budget = spent_before(folder), self.budget
        if budget.unit == "epochs" and whole.plan is not None:
            budget = Budget(steps=max(1, round(whole.plan.steps)))
        return budget.progress(spent) if budget.unit in spent else 0.0

    def run(self, job: Job) -> StageResult:
        """Train, then write the checkpoint."""
        from pretrain.core import checkpoint
        from pretrain.core.processors import unit_of
        from pretrain.stages import _training_data as data
        from pretrain.surgery import Inputs, operate
        from pretrain.training.measuring import course
        from pretrain.training.pace import shortened, times

        model, processor = data.open_model(self, job)
        given = Inputs(tokenizer=cast("PreTrainedTokenizerBase", processor), seed=job.seed)
        model, inputs, surgery_flops = operate(self.surgeries, model, given)
        processor = cast("Processor", inputs.tokenizer)
        stored = None
        if self.init is not None and checkpoint.surgery_of(model):  # what an adapter has frozen
            stored = checkpoint.stored_dtype(checkpoint_of(job.inputs["init"]))
        if odd := ill_scheduled(self.optimizer, self.schedule):
            job.say(odd)
        training, splits = self.fit(job, model, processor, stored)
        spent = training.spent | training.lost
        spent["flops"] += surgery_flops
        if training.world.main:
            self._write(job, training, spent, processor, splits)
        for odd in filter(None, (training.guard.summary(training.step), shortened(training))):
            job.say(f"warning: {odd}")
        likely = f", {b:.3f} bits per byte of validation text" if (b := training.metrics.get("bits_per_byte")) else ""
        used = f"{figure(spent['tokens'])} {unit_of(processor)}, {short(spent['flops'])} FLOPs{likely}"
        for line in (used, times(training), *course(training)):
            job.say(line)
        result: StageResult = {"metrics": training.metrics | spent, "flops": int(spent["flops"])}
        if job.plan is not None:
            result["planned"] = planned(job.plan, self.budget, training.spent["flops"])
        return result

    def fit(
        self, job: Job, model: PreTrainedModel, processor: Processor, stored: torch.dtype | None = None
    ) -> tuple[Training, Splits]:
        """Train a model in place on the job's corpus; what is frozen is kept in the type that it is `stored` in."""
        from pretrain.core.hardware import pick_device
        from pretrain.core.models.storage import narrow
        from pretrain.core.processors import unit_of
        from pretrain.stages import _training_data as data
        from pretrain.training.distributed import join
        from pretrain.training.loader import Loader
        from pretrain.training.loop import Settings, train

        world = join(pick_device())
        data.check_entries(self, model, processor)
        for weighted in self.weighted():
            numbers = numbers_of(data.tokenizer_in(processor))
            check_references(weighted.method, numbers, "the model", labels=labels_of(model))
        if data.tokenizer_in(processor) is not None:
            check_length(self.length, positions(model.config.to_dict()), "the model")
        vocabulary, objectives = data.vocabulary_of(processor), [w.method for w in self.weighted()]
        splits: data.Splits
        if self._reads() == "examples":
            model, splits = data.open_examples(self, job, model, processor)
        else:
            splits = data.open_rows(self, job, processor, world)
        loader = Loader(
            splits["train"], objectives, vocabulary, length=self.length, batch_rows=self.batch_rows,
            micro_rows=self.micro_rows or None, seed=job.seed, rank=world.rank, world=world.size, workers=self.workers,
            mixture=self.mixture, pin=world.device.type == "cuda",
        )  # fmt: skip
        if stored is not None:
            narrow(model, stored)
        budget = self.budget.resolved(len(loader.plan), self.batch_rows)
        most = data.held_out_of(self, budget, model, job.plan if world.size == 1 else None, job.say)
        training = train(
            model, loader, objectives, self.optimizer, self.schedule,
            Settings(
                budget=budget, seed=job.seed, clip=self.clip, evaluate_every=self.evaluate_every,
                save_every=self.save_every, keep=self.keep, log_every=self.log_every, precision=self.precision,
                strategy=self.strategy, compile=self.compile, checkpointing=self.checkpointing,
                max_skips=self.max_skips, bar=job.bar, unit=unit_of(processor), plan=job.plan, begun=job.begun,
                stage=str(job.identity.get("address", "")),
            ),
            job.folder, weights=[w.weight for w in self.weighted()], policies=self.policies,
            evaluate=data.evaluation(self, splits["validation"], vocabulary, most),
            targets_per_byte=data.targets_per_byte(splits["train"]) if self._plain() else None, say=job.say,
        )  # fmt: skip
        return training, splits

    def new_model(self, processor: Processor, seed: int) -> PreTrainedModel:
        """The model that `model` describes, with random weights, for a processor's vocabulary."""
        from pretrain.core.models import families
        from pretrain.core.processors import tokenizer_in
        from pretrain.stages._training_data import vocabulary_of

        task = self.task if self.task != "auto" else self.weighted()[0].method.task
        vocabulary = None if tokenizer_in(processor) is None else vocabulary_of(processor)
        return families.new_model(self.model["family"], self.fields(), task=task, vocabulary=vocabulary, seed=seed)

    def _write(self, job: Job, training: Training, spent: Record, processor: Processor, splits: Splits) -> None:
        """The checkpoint with its lineage, what the objectives have trained beside it, and samples to look at."""
        from pretrain.core import checkpoint
        from pretrain.core.models.storage import stored_as
        from pretrain.core.processors import unit_of
        from pretrain.stages import _training_data as data

        init = checkpoint_of(job.inputs["init"]) if self.init is not None else None
        source = checkpoint.lineage(init) if init is not None else {}
        lineage = job.history({"metrics": training.metrics | spent, "flops": spent["flops"]}, source)
        lineage |= {"data": splits["train"].info["corpus"], "metrics": training.metrics} | spent
        lineage |= {name: spent[name] + source.get(name, 0) for name in ("tokens", "flops")}
        lineage |= {"length": self.length, "unit": unit_of(processor)}
        model = cast("PreTrainedModel", training.model)
        stored = None if init is None or checkpoint.surgery_of(model) else checkpoint.stored_dtype(init)
        if data.predicts(objective := self.weighted()[0].method):  # what it predicts, and from which columns
            lineage["objective"] = {"method": objective.name} | asdict(objective)
            stored = objective.end(model, stored)
        if stored is not None:
            stored_as(model, stored)
        checkpoint.save(model, processor, job.folder / "checkpoint", lineage, init)
        if shown := data.samples(self, model, splits, data.vocabulary_of(processor)):
            write_samples(job.folder, shown)
        for objective, modules in zip(training.trainee.objectives, training.trainee.beside, strict=True):
            for name, other in objective.export(modules).items():
                checkpoint.save(other, processor, job.folder / name / "checkpoint", lineage)

    def estimate(self, given: Given) -> Estimate:
        """From the shape of the model and the budget."""
        return expect(self, given)
