"""From LayerNorm to RMSNorm without changing what the model computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Model, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from pretrain.core.checkpoint import record, surgery_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import base, blocks, family, set_module
from pretrain.core.models.fast import _RMSNorm
from pretrain.core.models.layers import like
from pretrain.surgery import Inputs, Surgery

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class PreRMSNorm(Surgery):
    """Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers (arXiv:2305.14858).

    What a Pre-LN block reads of the main branch is always recentred, so the branch may as well have zero mean: the
    embeddings and the output projections are recentred, W ← (I - 11ᵀ/d) W, and LayerNorm of a zero-mean vector is
    RMSNorm: γ ⊙ x / √(‖x‖²/d + ε) + β. With `training` this is done in each forward pass and the parameters stay those
    of the LayerNorm model: gradients and any optimiser's steps are its own. Without, it is done once: quicker to
    decode, but training would leave the zero mean. A model converted with `training` can be converted again, without;
    do so before a surgery that replaces output projections, which would take the recentring with them.

    With `crms` the branch keeps d - 1 entries, the last being minus their sum: γ and β are folded into the projections
    that follow, W ← W_:,<d - W_:,d, and the norm is x / √((‖x‖² + (Σx)²)/d + ε). A tied head is untied and gets a bias;
    the function is that of the LayerNorm model, but the parameters are others, and so are training steps.
    ModernBERT does not qualify: its first attention reads the branch without a norm.
    """

    families: ClassVar[tuple[str, ...]] = ("gpt2",)

    crms: bool = False
    training: bool = True

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with other norms, changed in place."""
        _undo(model)
        self._check(model)
        weights = self._compressed(model) if self.crms else None if self.training else _recentred(model)
        self.restore(model)
        if weights is not None:
            with torch.no_grad():
                for name, value in weights.items():
                    model.get_parameter(name).copy_(value)
        record(model, self)
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put in the norms, the recentring, and for `crms` the smaller tables and projections."""
        core = cast(GPT2Model, base(model))
        if self.crms:
            return self._shrink(model, core)
        core.drop = _swapped(core.drop, Recentred)
        core.ln_f = _swapped(core.ln_f, RMSNorm)
        for block in _blocks(core):
            block.ln_1, block.ln_2 = _swapped(block.ln_1, RMSNorm), _swapped(block.ln_2, RMSNorm)
            block.attn.resid_dropout = _swapped(block.attn.resid_dropout, RecentredDropout)
            block.mlp.dropout = _swapped(block.mlp.dropout, RecentredDropout)
            if self.training:
                for part, dropout in ((block.attn, block.attn.resid_dropout), (block.mlp, block.mlp.dropout)):
                    projection = _swapped(part.c_proj, RecentredConv1D)
                    projection.dropout, part.c_proj = dropout.p, projection
        return model

    def _check(self, model: PreTrainedModel) -> None:
        if family(model).name not in self.families:
            raise PretrainError(
                f"pre_rmsnorm: family {family(model).name!r}: accepted: {', '.join(self.families)} "
                "(LayerNorm before each part of a block)"
            )
        if getattr(model.config, "add_cross_attention", False):
            raise PretrainError("pre_rmsnorm: add_cross_attention true: accepted: a model without cross-attention")
        if self.crms and type(getattr(model, "lm_head", None)) is not nn.Linear:
            raise PretrainError(f"pre_rmsnorm: crms of {type(model).__name__}: accepted: a model with a language head")
        core = cast(GPT2Model, base(model))
        plain = [core.ln_f, *(n for block in blocks(model) for n in (block.ln_1, block.ln_2))]
        outputs = [b.get_submodule(path) for b in blocks(model) for path in ("attn.c_proj", "mlp.c_proj")]
        if {type(m) for m in plain} != {nn.LayerNorm} or {type(m) for m in outputs} != {Conv1D}:
            done = ", ".join(e["method"] for e in surgery_of(model)) or "none recorded"
            raise PretrainError(
                f"pre_rmsnorm: the norms or output projections are no longer GPT-2's own (surgeries: {done}); "
                "accepted: a plain model"
            )

    @torch.no_grad()
    def _compressed(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """All weights that change, with one entry less of the main branch."""
        prefix, recentred = ("" if base(model) is model else f"{model.base_model_prefix}."), _recentred(model)
        old = {n: p.double() for n, p in model.named_parameters(remove_duplicate=False)}
        weights = {n: v[..., :-1] for n, v in recentred.items()}
        for table in ("wte", "wpe"):
            name = f"{prefix}{table}.weight"
            weights[name] = _centre(old[name])[..., :-1]
        readers = [(f"{prefix}h.{i}.{n}", f"{prefix}h.{i}.{r}") for i in range(len(blocks(model))) for n, r in _READERS]
        for norm, reader in [*readers, (f"{prefix}ln_f", "lm_head")]:
            gain_E, shift_E = old[f"{norm}.weight"], old[f"{norm}.bias"]
            weight_EO = old[f"{reader}.weight"]
            weight_EO = weight_EO.T if reader == "lm_head" else weight_EO
            bias_O = old.get(f"{reader}.bias", 0)
            scaled_EO = gain_E[:, None] * weight_EO
            compressed_EO = scaled_EO[:-1] - scaled_EO[-1:]
            weights[f"{reader}.weight"] = compressed_EO.T if reader == "lm_head" else compressed_EO
            weights[f"{reader}.bias"] = bias_O + shift_E @ weight_EO
        return weights

    def _shrink(self, model: PreTrainedModel, core: GPT2Model) -> PreTrainedModel:
        """The modules of a main branch of d - 1 entries, with room for the weights."""
        width = core.embed_dim
        model.config.tie_word_embeddings = False
        alike = like(core.wte.weight)
        for table in ("wte", "wpe"):
            old = getattr(core, table)
            setattr(core, table, nn.Embedding(old.num_embeddings, width - 1, **alike))
        set_module(core, "ln_f", CRMSNorm(width, core.ln_f.eps))
        for block in _blocks(core):
            for name, norm in (("ln_1", block.ln_1), ("ln_2", block.ln_2)):
                set_module(block, name, CRMSNorm(width, norm.eps))
            for part, inner, outer in ((block.attn, "c_attn", "c_proj"), (block.mlp, "c_fc", "c_proj")):
                setattr(part, inner, Conv1D(getattr(part, inner).nf, width - 1).to(**alike))
                setattr(part, outer, Conv1D(width - 1, getattr(part, outer).nx).to(**alike))
        head = nn.Linear(width - 1, model.lm_head.out_features, bias=True, **alike)
        model.set_output_embeddings(head)
        return model.train(model.training)


_READERS = (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc"))  # a norm, and the projection that reads it


def _centre(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _undo(model: PreTrainedModel) -> None:
    """Take back a conversion with `training`, whose parameters are the LayerNorm model's."""
    done = surgery_of(model)
    if not done or (done[-1]["method"], done[-1]["config"]) != (
        "pre_rmsnorm",
        {"crms": False, "training": True},
    ):
        return
    vars(model)["pretrain_surgery"] = done[:-1]
    for module in base(model).modules():
        if isinstance(module, _CHANGED):
            module.__class__ = type(module).__mro__[1]


@torch.no_grad()
def _recentred(model: PreTrainedModel) -> dict[str, Tensor]:
    """The output projections, each of whose outputs sums to zero over the width; Conv1D stores (in, out)."""
    return {
        name: _centre(p.double()) for name, p in model.named_parameters() if name.rpartition(".")[0].endswith("c_proj")
    }


def _swapped(module: nn.Module, kind: type[M]) -> M:
    """The same module, with its parameters, as one of a class that only computes otherwise."""
    module.__class__ = kind
    return cast(M, module)


def _blocks(core: GPT2Model) -> list[GPT2Block]:
    return cast("list[GPT2Block]", list(core.h))


class RMSNorm(nn.LayerNorm):
    """y = γ ⊙ x / √(‖x‖²/d + ε) + β."""

    def forward(self, x_BLE: Tensor) -> Tensor:
        """LayerNorm's result on vectors of zero mean."""
        if x_BLE.device.type == "cpu" and x_BLE.dtype == self.weight.dtype == torch.float32:
            return _RMSNorm.apply(x_BLE, self.weight, self.eps) + self.bias  # half the time of torch's there
        return functional.rms_norm(x_BLE, self.normalized_shape, self.weight, self.eps) + self.bias


class CRMSNorm(nn.Module):
    """x / √((‖x‖² + (Σx)²)/d + ε): the norm of the zero-mean vector of which x lacks the last entry."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x_BLE: Tensor) -> Tensor:
        """E is d - 1."""
        wide_BLE = x_BLE.float() if x_BLE.dtype in (torch.bfloat16, torch.float16) else x_BLE
        squares_BL1 = wide_BLE.square().sum(-1, keepdim=True) + wide_BLE.sum(-1, keepdim=True).square()
        return (wide_BLE * torch.rsqrt(squares_BL1 / self.width + self.eps)).to(x_BLE.dtype)


class RecentredConv1D(Conv1D):
    """A projection whose outputs have zero mean, whatever its weight."""

    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        """Recentres the weight and bias, which are fewer than the activations, unless dropout changes these after."""
        if self.training and self.dropout > 0:
            return super().forward(x)
        flat = torch.addmm(_centre(self.bias), x.reshape(-1, x.shape[-1]), _centre(self.weight))
        return flat.view(*x.shape[:-1], self.nf)


class Recentred(nn.Dropout):
    """The sum of the embeddings, after its dropout, recentred."""

    def forward(self, x_BLE: Tensor) -> Tensor:
        """Also for embeddings that the caller gives."""
        return _centre(super().forward(x_BLE))


class RecentredDropout(nn.Dropout):
    """Dropout, whose result is recentred: it leaves a mean even in zero-mean activations."""

    def forward(self, x_BLE: Tensor) -> Tensor:
        """In evaluation there is nothing to do."""
        return _centre(super().forward(x_BLE)) if self.training and self.p > 0 else x_BLE


_CHANGED = (RMSNorm, RecentredConv1D, Recentred, RecentredDropout)
