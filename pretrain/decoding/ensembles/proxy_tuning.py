"""A large model decodes as if it had been tuned, by the difference that tuning made to a small one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from pretrain.core.bounds import AnyNumber
from pretrain.core.checkpoint import load
from pretrain.core.errors import PretrainError
from pretrain.core.generation.rows import continue_rows, mask_of, prefill, stepper
from pretrain.core.method import Ref
from pretrain.core.quick.vocabulary import Numbers, check_alike, numbers_of, stored_numbers
from pretrain.decoding import Decoding

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from pretrain.core.generation.options import Options


@dataclass(frozen=True)
class ProxyTuning(Decoding):
    """Tuning Language Models by Proxy (arXiv:2401.08565).

    The next token x is drawn from softmax(s_base(x) + alpha (s_expert(x) - s_anti_expert(x))), s the logits of the
    model, of a small tuned `expert` and of the same small model untuned, `anti_expert`. The paper's alpha is 1. All
    three read the same prompt and the same new tokens, each with a cache of its own, and need the same vocabulary; no
    weight of the model is touched.
    """

    samples: ClassVar[bool] = True
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("expert", "anti_expert")

    expert: Ref
    anti_expert: Ref
    alpha: AnyNumber = 1.0

    def logits(self, base_BV: Tensor, expert_BV: Tensor, anti_expert_BV: Tensor) -> Tensor:
        """The logits that tokens are chosen from."""
        return base_BV + self.alpha * (expert_BV - anti_expert_BV).to(base_BV.dtype)

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts with the three models; returns `tokens_BN`, padded with `pad` after the end."""
        mask_BL = mask_of(self.name, input_ids_BL, options.attention_mask_BL)
        three = [model, *self.proxies(model)]
        with torch.no_grad():
            begun = [prefill(member, input_ids_BL, mask_BL) for member in three]
            steps = [stepper(member, cache, mask_BL) for member, (_, cache) in zip(three, begun, strict=True)]
            return continue_rows(
                input_ids_BL,
                self.logits(*(logits_BV for logits_BV, _ in begun)),
                lambda token_B: self.logits(*(step(token_B) for step in steps)),
                options,
            )

    def proxies(self, model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The expert and the anti-expert on the model's device, read once; vocabularies that differ are an error."""
        proxies: list[PreTrainedModel] = []
        words: dict[str, Numbers | None] = {}
        folder = Path(model.config._name_or_path or "/none")
        if folder.is_dir():
            words["the model"] = stored_numbers(folder)
        _check_causal("the model", model)
        wanted = _size(model)
        for field in ("expert", "anti_expert"):
            folder = Path(getattr(self, field))
            proxy, vocabulary = _open(folder, model.device, _stamp(folder))
            _check_causal(f"{field} {folder}", proxy)
            if _size(proxy) != wanted:
                raise PretrainError(
                    f"proxy_tuning: {field} {folder}: a vocabulary of {_size(proxy)} tokens: "
                    f"accepted: the model's {wanted}"
                )
            words[f"{field} {folder}"] = vocabulary
            proxies.append(proxy)
        check_alike(self.name, words)
        return proxies[0], proxies[1]


def _check_causal(what: str, model: PreTrainedModel) -> None:
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise PretrainError(f"proxy_tuning: {what}: {type(model).__name__}: accepted: a causal language model")


def _size(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().weight.shape[0]


def _stamp(folder: Path) -> int:
    """When the checkpoint was last written; one that is not there is an error of `load`."""
    return max((path.stat().st_mtime_ns for path in folder.glob("*.json")), default=0)


@functools.lru_cache(maxsize=2)
def _open(folder: Path, device: torch.device, _: int) -> tuple[PreTrainedModel, Numbers | None]:
    """A checkpoint and its vocabulary, kept for the next prompt."""
    model, tokenizer = load(folder, device=device)
    return model, numbers_of(tokenizer)
