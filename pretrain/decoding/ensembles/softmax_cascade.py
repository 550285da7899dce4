"""A token leaves the model at the first exit that is sure enough; how sure that is, held-out text decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pretrain.core.bounds import Count, NonNegative
from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json, sealed, write_json
from pretrain.core.foreign.paths import expanded
from pretrain.core.generation.options import OptionFields, Options
from pretrain.core.method import Ref
from pretrain.core.models.exits import HEADS, check_exits, thirds
from pretrain.core.models.families import blocks, family
from pretrain.decoding import Decoding
from pretrain.decoding._tree import prompts
from pretrain.decoding.ensembles._cascade import Cascade, Trace, bounded_thresholds, cascaded, measure, paper_threshold

if TYPE_CHECKING:
    from pretrain.core.batch import Batch

FILE = "softmax_cascade.json"
NEVER = 2.0  # a threshold that no probability reaches


@dataclass(frozen=True)
class SoftmaxCascade(Decoding):
    """Dynamically Sacrificing Accuracy for Reduced Computation: Cascaded Inference Based on Softmax Confidence
    (arXiv:1805.10982).

    After `exits` blocks stands a classifier: the model's final norm and head (behind the model's `exit_heads`, where
    the surgery of that name trained some). A token leaves at the first exit m whose greatest probability is δ_m or
    more. `calibrate` finds δ for an acceptable drop ε on held-out text: with α_m(δ) the accuracy of exit m on the
    tokens of which it is at least δ sure, δ_m is the least δ with α_m(δ) ≥ max α_m - ε. Here the classes are the next
    tokens. The prompt is read by all blocks, and the first token is the whole model's. The blocks that a token skips
    still need its keys and values: they are computed from the state that it left with. `trace` counts operations.
    `exits` None: a third and two thirds of the blocks. `thresholds`, one an exit, or `calibration`, the file of them.
    """

    exits: tuple[Count, ...] | None = None
    thresholds: tuple[NonNegative, ...] = ()  # above 1: never
    calibration: Ref = ""

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    samples: ClassVar[bool] = True

    def depths(self, model: PreTrainedModel) -> tuple[int, ...]:
        """The exits: after how many blocks each stands."""
        layers, maps = len(blocks(model)), getattr(model, HEADS, None)
        trained = () if maps is None else tuple(sorted(map(int, maps)))
        exits = self.exits or trained or thirds(layers)
        check_exits(self.name, exits, layers)
        if trained and not set(exits) <= set(trained):
            raise PretrainError(f"softmax_cascade: exits {exits}: accepted: the trained ones among {trained}")
        return exits

    def trace(self, model: PreTrainedModel, input_ids_BL: Tensor, **options: Unpack[OptionFields]) -> Trace:
        """As `generate`, with the depth of each new token and the operations done and spared."""
        return self._trace(model, input_ids_BL, Options(**options))

    def _trace(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Trace:
        prompts_1L = prompts(input_ids_BL, options.attention_mask_BL)
        exits = self.depths(model)
        thresholds = self._thresholds(exits)
        uniform_NB = options.draws(len(prompts_1L))
        result, rows = Trace(torch.empty(0)), []
        with torch.inference_mode():
            for row, ids_1L in enumerate(prompts_1L):
                cascade = Cascade(model, ids_1L.shape[1] + options.max_new_tokens, exits, thresholds)
                logits_1V, depth = cascade.prefill(ids_1L), len(cascade.blocks)
                new: list[int] = []
                depths: list[int] = []
                while True:
                    uniform_1 = None if uniform_NB is None else uniform_NB[len(new), row : row + 1]
                    before_1N = torch.cat([ids_1L, ids_1L.new_tensor([new])], 1)
                    new.append(int(options.pick(logits_1V, uniform_1, before_1N)))
                    depths.append(depth)
                    if len(new) == options.max_new_tokens or options.at_end(new):
                        break
                    logits_1V, depth = cascade.token(new[-1])
                rows.append(new)
                result.depths.append(depths)
                result.macs, result.full = result.macs + cascade.trace.macs, result.full + cascade.trace.full
        result.tokens_BN = options.stacked(input_ids_BL, rows)
        return result

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts, row by row; returns `tokens_BN`."""
        return self._trace(model, input_ids_BL, options).tokens_BN

    def calibrate(
        self,
        model: PreTrainedModel,
        batches: Iterable[Batch],
        accuracy_drop: float,
        *,
        rule: Literal["paper", "bound"] = "paper",
        file: Path | str | None = None,
    ) -> tuple[float, ...]:
        """The exits' thresholds for a drop of next-token accuracy (0.01: one in a hundred) on these batches.

        The paper's rule compares an exit with itself alone, on all tokens, so what the cascade loses as a whole may be
        more or less than the drop. "bound" looks at the cascade: the least thresholds, exit after exit, with which it
        stays within the drop on the batches, against the whole model. Batches are those that surgeries are given, read
        whole, without skipped blocks. With `file`, a JSON file or a folder, they are written for `calibration`.
        """
        if not 0 <= accuracy_drop <= 1:
            raise PretrainError(f"softmax_cascade: accuracy_drop {accuracy_drop}: accepted: from 0 to 1")
        if rule not in ("paper", "bound"):
            raise PretrainError(f"softmax_cascade: rule {rule!r}: accepted: paper, bound")
        if family(model).name not in self.families:
            raise PretrainError(
                f"softmax_cascade: model family {family(model).name!r}: accepted: {', '.join(self.families)}"
            )
        exits = self.depths(model)
        confidence_MN, correct_MN = measure(model, batches, exits)
        if confidence_MN.numel() == 0:
            raise PretrainError(
                "softmax_cascade: calibration without text: accepted: batches of at least two tokens a row"
            )
        if rule == "paper":
            pairs = zip(confidence_MN[:-1], correct_MN[:-1], strict=True)
            thresholds = tuple(paper_threshold(sure_N, right_N, accuracy_drop) for sure_N, right_N in pairs)
        else:
            thresholds = bounded_thresholds(confidence_MN, correct_MN, accuracy_drop, NEVER)
        if file is not None:
            accuracy, leaving = cascaded(confidence_MN, correct_MN, thresholds)
            calibration = {"exits": exits, "thresholds": thresholds, "accuracy_drop": accuracy_drop, "rule": rule}
            whole = float(correct_MN[-1].double().mean())
            measured = {"accuracy": accuracy, "whole_accuracy": whole, "leaving": leaving}
            write_json(_file(file), sealed(calibration | measured))
        return thresholds

    def _thresholds(self, exits: tuple[int, ...]) -> tuple[float, ...]:
        thresholds = self.thresholds
        if self.calibration:
            if thresholds:
                raise PretrainError("softmax_cascade: thresholds and calibration: accepted: one of them")
            path = _file(self.calibration)
            calibration = read_json(path)
            try:
                written, thresholds = tuple(calibration["exits"]), tuple(map(float, calibration["thresholds"]))
            except (TypeError, KeyError, ValueError) as error:
                raise PretrainError(f"{path}: {error!r}: accepted: a file that `calibrate` wrote") from error
            if written != exits:
                raise PretrainError(f"{path}: thresholds of exits {written}: accepted: those of exits {exits}")
        if len(thresholds) != len(exits):
            raise PretrainError(
                f"softmax_cascade: thresholds {thresholds}: accepted: one for each of the exits {exits}"
            )
        return thresholds


def _file(place: Path | str) -> Path:
    path = expanded(place)
    return path if path.suffix == ".json" else path / FILE
