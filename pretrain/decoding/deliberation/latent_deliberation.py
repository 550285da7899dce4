"""Before it answers, the model's cache of the prompt gets latent embeddings from a coprocessor."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from pretrain.core.checkpoint import load
from pretrain.core.errors import PretrainError
from pretrain.core.folders import checkpoint_of
from pretrain.core.generation.cache import layers_of
from pretrain.core.generation.computed import count_too
from pretrain.core.generation.rows import continue_rows, mask_of, stepper
from pretrain.core.method import Ref
from pretrain.core.models.families import base, family
from pretrain.decoding import Decoding
from pretrain.decoding._beside import stamp

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pretrain.core.generation.options import Options


@dataclass(frozen=True)
class LatentDeliberation(Decoding):
    """Deliberation in Latent Space via Differentiable Cache Augmentation (arXiv:2412.17747).

    `coprocessor` is the stage that trained with the objective `cache_augmentation`, or the checkpoint in its folder
    `coprocessor`. It reads the model's cache of the prompt and its own soft tokens; its last states there are
    embeddings that the model reads after the prompt. It is asked once, at the prompt's end; then the model decodes as
    ever. No weight of the model is touched.
    """

    families: ClassVar[tuple[str, ...]] = ("llama", "gpt2")
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("coprocessor",)
    samples: ClassVar[bool] = True

    coprocessor: Ref

    def computed(self, reference: str = "") -> float:
        """The coprocessor is asked once, at the prompt's end."""
        return 0.0 if reference else 1.0

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts; returns `tokens_BN`, prompts included, padded with `pad` after the end."""
        mask_BL = mask_of(self.name, input_ids_BL, options.attention_mask_BL)
        folder = _folder(Path(self.coprocessor))
        coprocessor, latents = _open(folder, model.device, model.dtype, stamp(folder))
        count_too("method.coprocessor", coprocessor)
        self._check(model, coprocessor, mask_BL.shape[1] + latents + options.max_new_tokens)
        with torch.no_grad():
            logits_BV, cache, mask_BL = deliberate(model, coprocessor, latents, input_ids_BL, mask_BL)
            return continue_rows(input_ids_BL, logits_BV, stepper(model, cache, mask_BL), options)

    def _check(self, model: PreTrainedModel, coprocessor: PreTrainedModel, length: int) -> None:
        """Refuse a coprocessor of another model, and more positions than there are."""
        entry, config = family(model), model.config
        if entry.name not in self.families:
            raise PretrainError(f"{self.name}: family {entry.name!r}: accepted: {', '.join(self.families)}")
        names = ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        for name in (*names, "head_dim", "rope_parameters"):
            ours, theirs = (getattr(c, name, None) for c in (config, coprocessor.config))
            if ours != theirs:
                raise PretrainError(
                    f"{self.name}: coprocessor {self.coprocessor}: {name} {theirs}: accepted: the model's, {ours}"
                )
        limit = config.max_position_embeddings if entry.positions is not None else None
        for most in (limit, getattr(config, "sliding_window", None)):
            if most is not None and length > most:
                raise PretrainError(
                    f"{self.name}: {length} positions, prompt, latents and new tokens: accepted: at most {most}"
                )


def deliberate(
    model: PreTrainedModel, coprocessor: PreTrainedModel, latents: int, input_ids_BL: Tensor, mask_BL: Tensor
) -> tuple[Tensor, Cache, Tensor]:
    """The logits after left-padded prompts and their latents, the cache of both, and the mask of both."""
    rows, device = len(input_ids_BL), input_ids_BL.device
    cache = DynamicCache()
    position_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    base(model)(
        input_ids=input_ids_BL, attention_mask=mask_BL, position_ids=position_BL, past_key_values=cache, use_cache=True
    )
    whole_BN = torch.cat([mask_BL, mask_BL.new_ones(rows, latents)], 1)
    more = {"attention_mask": whole_BN, "position_ids": position_BL[:, -1:] + 1 + torch.arange(latents, device=device)}
    copied = DynamicCache([(layer.keys, layer.values) for layer in layers_of(cache)])
    soft_BN = torch.arange(latents, device=device).expand(rows, -1)
    z_BNE = base(coprocessor)(input_ids=soft_BN, past_key_values=copied, use_cache=True, **more).last_hidden_state
    logits_BNV = model(inputs_embeds=z_BNE, past_key_values=cache, logits_to_keep=1, use_cache=True, **more).logits
    return logits_BNV[:, -1], cache, whole_BN


def _folder(folder: Path) -> Path:
    """The coprocessor's checkpoint: in the folder of the stage that trained it, or at the folder itself."""
    return checkpoint_of(folder / "coprocessor" if (folder / "coprocessor").is_dir() else folder)


@functools.lru_cache(maxsize=1)
def _open(folder: Path, device: torch.device, dtype: torch.dtype, stamp: int) -> tuple[PreTrainedModel, int]:
    """A coprocessor in the model's type, kept for the next prompt, and how many latents it emits."""
    coprocessor, _ = load(folder, device=device, dtype=dtype)
    latents = getattr(coprocessor.config, "cache_augmentation_latents", None)
    if not isinstance(latents, int):
        raise PretrainError(
            f"latent_deliberation: coprocessor {folder}: an ordinary model: accepted: a stage that trained with "
            "the objective cache_augmentation, or its folder `coprocessor`"
        )
    return coprocessor, latents
