"""A mixture's routers are kept from sending all tokens to few experts.

Shape letters: B rows, L positions, N = B·L tokens, X experts.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from pretrain.core.batch import Batch
from pretrain.core.bounds import NonNegative
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import apart
from pretrain.core.models.unlisted.apart import Apart
from pretrain.objectives import Loss, summed
from pretrain.policies import Policy, State, Training

TAKEN = ("gate_logits", "num_experts", "top_k", "attention_mask")  # by transformers' functions
_watching: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()


@dataclass(frozen=True)
class RouterBalance(Policy):
    """Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity (arXiv:2101.03961).

    To the loss of a mixture of experts `weight` · X · Σ_x f_x P_x is added: of the choices that all routers make, f_x
    is how many a token makes of expert x, and P_x the mean of its probability. It is least where all experts are
    chosen alike, and then as large as the number of experts that a token is sent to. It is the loss that `transformers`
    adds with `output_router_logits`, by its own function for the model's type, on each micro-batch; padding does not
    count. `weight` is by default the checkpoint's `router_aux_loss_coef`. The log has the sum, before `weight`, as
    `router_balance`; the log's `loss` is without it, as held-out losses are.
    """

    weight: NonNegative | None = None

    def added(self, model: nn.Module) -> Callable[[Loss, Batch], Loss]:
        """The loss with the sum over its routers; an error for a model that `transformers` has no such loss of."""
        measure, config = _measure(self.name, model), cast("PreTrainedModel", model).config
        held = (getattr(config, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef"))
        weight = next((each for each in (self.weight, *held) if each is not None), None)
        if weight is None:
            raise PretrainError(f"{self.name}: weight: the checkpoint has no router_aux_loss_coef; accepted: a number")
        seen: dict[int, Tensor] = {}  # logits_NX of the newest pass, by router
        _forget(model)
        _watching[model] = [*_watch(cast("PreTrainedModel", model), seen)]

        def add(loss: Loss, batch: Batch) -> Loss:
            if not seen or "document_BL" not in batch:
                raise PretrainError(f"{self.name}: this objective passes no rows of text; accepted: as causal_lm does")
            mask_BL = _tokens(model, batch)
            logits = tuple(logits_NX.reshape(-1, logits_NX.shape[-1]) for logits_NX in seen.values())
            seen.clear()
            if any(len(logits_NX) != mask_BL.numel() for logits_NX in logits):
                raise PretrainError(
                    f"{self.name}: the model was given other positions than those of its rows; accepted: an objective "
                    "that passes each row once, as causal_lm, and a model that keeps packed documents apart"
                )
            balance = measure(logits, mask_BL)
            terms = loss.terms or {"": loss.value}
            return summed(
                {**terms, self.name: balance.to(loss.value) * weight}, {**loss.parts, self.name: balance.detach()},
                loss.nll_BL, loss.measured or terms,
            )  # fmt: skip

        return add

    def finish(self, training: Training, state: State) -> None:
        """Watch the routers no more."""
        _forget(training.model)


def _tokens(model: nn.Module, batch: Batch) -> Tensor:
    """Which positions that the model was given are tokens: of the batch's rows, or of its documents one by one."""
    if not apart(model):
        return batch["document_BL"] != 0
    sizes = cast("tuple[int, int]", tuple(batch["sizes_2"].tolist())) if "sizes_2" in batch else None
    return Apart(batch["document_BL"], sizes).mask() != 0


def _measure(name: str, model: nn.Module) -> Callable[[tuple[Tensor, ...], Tensor], Tensor]:
    """The function of `transformers` for a model: of the routers' logits, and of the tokens that count."""
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    experts, top_k = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    known = function is not None and tuple(inspect.signature(function).parameters) == TAKEN
    if not known or not isinstance(experts, int) or not isinstance(top_k, int):
        raise PretrainError(
            f"{name}: {type(model).__name__}: accepted: a mixture of experts that transformers has a load-balancing "
            "loss for, as mixtral, qwen2_moe, qwen3_moe, olmoe"
        )
    return lambda logits, mask_BL: cast("Tensor", cast("Any", function)(logits, experts, top_k, mask_BL))


def _watch(model: PreTrainedModel, seen: dict[int, Tensor]) -> Iterator[RemovableHandle]:
    """Have the routers, as `transformers` knows them for the model, leave their logits in `seen`."""
    recorders = (type(model)._can_record_outputs or {}).get("router_logits", [])
    for recorder in recorders if isinstance(recorders, list) else [recorders]:
        kept = recorder if isinstance(recorder, OutputRecorder) else OutputRecorder(recorder)
        for name, module in model.named_modules():
            if isinstance(module, kept.target_class or ()) and (kept.layer_name or "") in name:
                yield module.register_forward_hook(_keeper(seen, kept.index))


def _keeper(seen: dict[int, Tensor], index: int) -> Callable[..., None]:
    def keep(module: nn.Module, _: object, out: Tensor | tuple[Tensor, ...]) -> None:
        seen[id(module)] = out if isinstance(out, Tensor) else out[index]

    return keep


def _forget(model: nn.Module) -> None:
    for handle in _watching.pop(model, []):
        handle.remove()
