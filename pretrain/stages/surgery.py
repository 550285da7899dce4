"""`surgery`: change a checkpoint's model by surgeries, one after another; writes a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.core.bounds import Count, Ge
from pretrain.core.errors import PretrainError
from pretrain.core.quick.hub import located
from pretrain.core.quick.quantities import counted, short
from pretrain.core.quick.vocabulary import check_alike, check_labels, stored_labels, stored_numbers
from pretrain.dial.configs import shape_from
from pretrain.records import StageResult
from pretrain.stages import Estimate, Given, Job, Ref, Stage, SurgeryField, checkpoint_of, tokens_of
from pretrain.stages._estimates import (
    FLOOR,
    OPENED,
    OPENING,
    RECORDS,
    Left,
    operated,
    operating,
    tokenizer_bytes,
    training_seconds,
)
from pretrain.surgery import Surgery as Method

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.core.batch import Batch
    from pretrain.corpus.shards import Shards

CALIBRATED = 8  # rows of calibration in a batch


class Surgery(Stage):
    """Change a checkpoint's model by surgeries: grow, prune, quantise, merge, adapt; writes a checkpoint.

    checkpoint: The model to change.
    surgeries: What changes it, one after another.
    models: The other models of a merge, or a teacher.
    corpus: Whose documents a surgery that calibrates is shown, drawn by the seed: training ones, or held-out ones to
        choose by.
    calibration_rows: Rows of them that it is shown.
    length: Tokens of such a row.
    """

    writes: ClassVar[str] = "checkpoint"
    stage: Literal["surgery"] = "surgery"
    checkpoint: Ref
    surgeries: list[SurgeryField] = Field(min_length=1)
    models: list[Ref] = []
    corpus: Ref | None = None
    calibration_rows: Count = 128
    length: Annotated[int, Ge(2)] = 512

    def check_inputs(self, earlier: Mapping[str, Stage]) -> None:
        """Refuse surgeries that need text where there is none, and models of other tokens than the checkpoint's."""
        super().check_inputs(earlier)
        for number, surgery in enumerate(self.surgeries):
            if surgery.needs_text and self.corpus is None:
                raise PretrainError(
                    f"{surgery.name} needs text to calibrate on; accepted: a surgery stage with `corpus`",
                    place=("surgeries", number),
                )
        known = [n for n in self.models if n not in earlier and self.checkpoint not in earlier]
        if known and not any(surgery.new_vocabulary for surgery in self.surgeries):
            tables = {f"models.{self.models.index(name)} {name}": stored_numbers(located(name)) for name in known}
            ours = {f"checkpoint {self.checkpoint}": stored_numbers(located(self.checkpoint))}
            check_alike("surgery", ours | tables, ("models",))
            labels = {f"models.{self.models.index(name)} {name}": stored_labels(located(name)) for name in known}
            whose = {f"checkpoint {self.checkpoint}": stored_labels(located(self.checkpoint))}
            check_labels("surgery", whose | labels, ("models",))

    def splits(self) -> dict[str, str]:
        """The one whose rows the surgeries are shown."""
        return {"corpus": self._split()} if self.corpus is not None and self._split() != "train" else {}

    def _split(self) -> str:
        """The split that surgeries which need text want; an error where they want several."""
        splits = {surgery.split: surgery.name for surgery in self.surgeries if surgery.needs_text}
        if len(splits) > 1:
            wanted = " and ".join(f"{name} the {split} split" for split, name in splits.items())
            raise PretrainError(f"surgeries: {wanted} of the corpus: accepted: a stage of its own for each")
        return next(iter(splits), "train")

    def estimate(self, given: Given) -> Estimate:
        """What the surgeries compute, and the forward passes of calibration."""
        return operation(given, self.surgeries, self.calibration_rows if self.corpus else 0, self.length)

    def run(self, job: Job) -> StageResult:
        """Operate and save."""
        import torch

        from pretrain.core import checkpoint
        from pretrain.core.models.storage import stored_as
        from pretrain.surgery import Inputs, operate

        source = checkpoint_of(job.inputs["checkpoint"])
        model, tokenizer = checkpoint.load(source)
        merged = [checkpoint_of(folder) for folder in job.inputs.get("models", [])]
        others = [checkpoint.load(folder) for folder in merged]
        shards = self._shards(job, model, tokenizer) if self.corpus is not None else None
        inputs = Inputs(
            tokenizer=tokenizer,
            batches=[] if shards is None or tokenizer is None else self._batches(job, shards, tokenizer),
            domains=[] if shards is None else shards.domain_names,
            counts=None if shards is None else lambda: torch.from_numpy(shards.counts()),
            models=[opened for opened, _ in others],
            tokenizers=[its for _, its in others],
            seed=job.seed,
        )
        before = {"parameters_before": model.num_parameters(), "bytes_before": _bytes(model)}
        model, inputs, flops = operate(self.surgeries, model, inputs)
        if not checkpoint.surgery_of(model):
            stored_as(model, checkpoint.stored_dtype(source))
        after = {"parameters": model.num_parameters(), "bytes": _bytes(model)}
        few = _few_bits(model)
        if few:  # `parameters` of packed weights are what packs them
            after["parameters"] = _numbers(model)
        share = {"quantised_share": sum(few.values()) / max(1, _numbers(model))} if few else {}
        metrics = after | before | share | inputs.extra.get("metrics", {})
        lineage = checkpoint.lineage(source)
        result = {"metrics": metrics, "flops": flops} | self._adapted(source)
        history = job.history(result, lineage, *map(checkpoint.lineage, merged))
        lineage |= history | {"flops": lineage.get("flops", 0) + flops}
        checkpoint.save(model, inputs.tokenizer, job.folder / "checkpoint", lineage, source)
        if few:
            metrics |= {"disk_bytes": _on_disk(job.folder / "checkpoint"), "disk_bytes_before": _on_disk(source)}
            job.say(_quantised(few, metrics))
        job.say(
            f"{before['parameters_before']:,} -> {after['parameters']:,} parameters, "
            f"{short(before['bytes_before'], 'B')} -> {short(after['bytes'], 'B')}"
        )
        return {"metrics": metrics, "flops": flops}

    def _adapted(self, source: Path) -> dict[str, str]:
        """What the adapter of the result goes on, as `peft` is to find it; empty where that lies nowhere as it is."""
        from pretrain.core import checkpoint
        from pretrain.core.exchange.peft_out import base_name

        before = any(checkpoint.recorded(entry).adapts for entry in checkpoint.read_record(source).get("surgery", []))
        adapts = [surgery.adapts for surgery in self.surgeries]
        if all(adapts):
            return {} if before else {"base": base_name(source)}
        return {"base": ""} if before or any(adapts) else {}

    def _shards(self, job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Shards:
        """The documents of the split in tokens."""
        from pretrain.core.models.families import family, positions_of

        if tokenizer is None:
            raise PretrainError(
                f"checkpoint {self.checkpoint} has no tokenizer; accepted, with a corpus: one with tokenizer.json"
            )
        most = positions_of(model)
        if family(model).positions is not None and most is not None and self.length > most:
            raise PretrainError(f"length {self.length}: accepted: 2 to {most}, the positions of the model")
        return tokens_of(job, tokenizer, splits=(self._split(),))[self._split()]

    def _batches(self, job: Job, shards: Shards, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
        """Rows of packed documents, in batches."""
        import numpy as np
        import torch

        from pretrain.core.batch import Vocabulary, rows_to_tensors
        from pretrain.corpus.packing import plan_for

        plan = plan_for(shards, self.length)
        if not len(plan):
            raise PretrainError(f"{shards.folder}: no documents to calibrate on")
        numbers = np.random.default_rng((job.seed, 4)).permutation(len(plan))[: self.calibration_rows]
        if len(numbers) < self.calibration_rows:
            job.say(f"calibration on {counted(len(numbers), 'row')}: the corpus has no more")
        pad = Vocabulary.of(tokenizer).pad
        names = {"input_ids": "tokens_BL", "attention_mask": "document_BL", "position_ids": "position_BL"}
        batches = []
        for start in range(0, len(numbers), CALIBRATED):
            rows = [plan.row(shards, int(number)) for number in numbers[start : start + CALIBRATED]]
            tensors = rows_to_tensors(rows, self.length, pad)
            batch = {theirs: tensors[ours] for theirs, ours in names.items()}
            batches.append(batch | {"domain_B": torch.tensor([row.domain for row in rows])})
        return batches


def operation(given: Given, surgeries: Sequence[Method], rows: int, length: int) -> Estimate:
    """Of surgeries on a checkpoint: two models in memory, a pass over the rows of calibration, what each computes."""
    before = given.get("checkpoint", Left())
    left, shape = operated(before, surgeries), shape_from(before.config)
    if shape is None:
        return Estimate(left=left)
    blocks, after = shape.with_blocks(before.blocks), shape.with_blocks(left.blocks)
    passed = rows * length * replace(blocks, density=1.0).forward(length, 0.0)
    work = operating(before, blocks, surgeries, rows * length, passed)
    known = all(each.estimated for each in surgeries)
    weights = blocks.weights + after.weights
    weights += sum(_weights(other) for name, other in given.items() if name != "checkpoint")  # those of its merges too
    memory = FLOOR + 4.0 * weights + 16.0 * rows * length * shape.width
    if rows and any(each.backward for each in surgeries):  # their squares, and what goes back through one block
        tokens = min(rows, CALIBRATED) * length
        memory += 4.0 * blocks.weights + 4.0 * tokens * blocks.depth * blocks.width
        memory += replace(blocks, depth=1).memory(tokens, length, 0.0)
    seconds = training_seconds(work.flops, shape.width) + work.seconds + OPENING + OPENED * weights
    return Estimate(
        work.flops if known else None, memory, seconds if known else None,
        RECORDS + 4.0 * after.weights + tokenizer_bytes(after.vocabulary), left=left,
    )  # fmt: skip


def _weights(model: Left) -> int:
    """Of a model, or none where it is not known."""
    shape = shape_from(model.config)
    return shape.weights if shape else 0


def _few_bits(model: nn.Module) -> dict[int, int]:
    """How many weights are held in so many bits: those of layers that say their `bits` and hold them packed."""
    counts: dict[int, int] = {}
    for module in model.modules():
        bits, size = getattr(module, "bits", None), getattr(module, "in_features", 0)
        size *= getattr(module, "out_features", 0)
        if isinstance(bits, int) and size and not hasattr(module, "weight"):
            counts[bits] = counts.get(bits, 0) + size
    return counts


def _numbers(model: nn.Module) -> int:
    """The weights of a model, those that are packed as well."""
    return sum(_few_bits(model).values()) + sum(parameter.numel() for parameter in model.parameters())


def _on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _quantised(few: dict[int, int], metrics: dict[str, float]) -> str:
    """How much of a model is quantised, and what that saves: of a small one embeddings and head are much."""
    held = " and ".join(f"{bits} bits for {count:,}" for bits, count in sorted(few.items()))
    saved = 1 - metrics["disk_bytes"] / max(1, metrics["disk_bytes_before"])
    return (
        f"{held} weights, {metrics['quantised_share']:.0%} of all; the others, embeddings and head among them, stay as "
        f"they were; the files take {short(metrics['disk_bytes'], 'B')}, {abs(saved):.0%} "
        f"{'less' if saved >= 0 else 'more'} than before"
    )


def _bytes(model: nn.Module) -> int:
    """What the weights take on disk: tied ones once."""
    tensors = model.state_dict(keep_vars=True).values()
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
