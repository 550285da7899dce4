"""How a checkpoint's makers meant it to generate: its `generation_config`, as options of the loops here.

Shape letters: B rows, N tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from pretrain.core.batch import Vocabulary
from pretrain.core.encoding import text_of
from pretrain.core.foreign.code import brought
from pretrain.core.foreign.parsing import parsing
from pretrain.core.generation.healing import Healing
from pretrain.core.generation.options import COLDEST, Options, SettingFields
from pretrain.core.models.families import at

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

TEMPERATURE, TOP_P = 0.8, 0.95  # of sampling, where neither a person nor the checkpoint says them
SLACK = 8  # tokens that a stop string is looked for in, beyond one a byte: of no text, or cut by the first of them


def settings_of(model: PreTrainedModel) -> GenerationConfig | None:
    """The model's `generation_config`; None of a model that does not generate."""
    return getattr(model, "generation_config", None)


def ends(model: PreTrainedModel, vocabulary: Vocabulary) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those that the `generation_config` lists."""
    given = getattr(settings_of(model), "eos_token_id", None)
    listed = [] if given is None else [given] if isinstance(given, int) else given
    frame = vocabulary.frame or ()  # a chat model's documents end with what the next begins with
    return frozenset([*listed, *(token for token in (vocabulary.eos, *frame) if token is not None)])


def sampling(model: PreTrainedModel, temperature: float | None, top_p: float | None) -> tuple[float, float]:
    """The temperature and top_p that are asked for; what is not asked for is as the `generation_config` has it.

    One that samples and says no more means 1; where nothing says anything they are 0.8 and 0.95.
    """
    settings = settings_of(model)
    samples, warmth, nucleus = (getattr(settings, name, None) for name in ("do_sample", "temperature", "top_p"))
    usual = (TEMPERATURE, TOP_P) if not samples and warmth is None else (1.0, 1.0)
    if temperature is None:
        temperature = 0.0 if samples is False else usual[0] if warmth is None else float(warmth)
    if top_p is None:
        top_p = usual[1] if nucleus is None else float(nucleus)
    if top_p == 0:  # the likeliest token alone
        return 0.0, 1.0
    return 0.0 if 0 < temperature < COLDEST else temperature, top_p


@dataclass(frozen=True)
class StopStrings:
    """Whether the text of new tokens has one of the strings in it, ended by the last of them."""

    tokenizer: PreTrainedTokenizerBase
    strings: tuple[str, ...]
    again: str = ""  # what the new tokens write first of the prompt, where none is looked for

    def __call__(self, new: Sequence[int]) -> bool:
        """Look at as many of the last tokens as the longest string may have."""
        tail = max(len(string.encode()) for string in self.strings) + SLACK
        if len(new) <= tail + len(self.again.encode()):
            text = text_of(self.tokenizer, new)[len(self.again) :]
        else:
            text = text_of(self.tokenizer, new[-tail:])
        return any(string in text for string in self.strings)


def options_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, *, max_new_tokens: int,
    temperature: float = 0.0, top_p: float = 1.0, stop: Sequence[str] = (), healing: Healing | None = None,
    vocabulary: Vocabulary | None = None, **more: object,
) -> SettingFields:  # fmt: skip
    """The fields of `Options` to continue prompts of `length` tokens as the `generation_config` has it.

    Its end tokens and stop strings, and all that `transformers` makes logits processors of (top_k, min_p, penalties,
    suppressed tokens, …); beams, guidance and assistants are not followed. `stop` are further stop strings, looked for
    behind what `healing` writes again; `vocabulary` is the tokenizer's, where it is read already; `more` are fields to
    set in place of the file's.
    """
    vocabulary = vocabulary or Vocabulary.of(tokenizer)
    strings = getattr(settings_of(model), "stop_strings", None) or ()
    strings = tuple(filter(None, (*([strings] if isinstance(strings, str) else strings), *stop)))
    end = ends(model, vocabulary)
    again = "" if healing is None else text_of(tokenizer, healing.again)
    return {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "eos": end,
        "pad": vocabulary.pad, "stop": StopStrings(tokenizer, strings, again) if strings else None,
        "healing": healing,
        "processors": processors(model, length, max_new_tokens, temperature, top_p, end, **more),
    }  # fmt: skip


def processors(
    model: PreTrainedModel, length: int, new: int, temperature: float, top_p: float, end: frozenset[int],
    **more: object,
) -> Callable[[Tensor, Tensor], Tensor] | None:  # fmt: skip
    """`transformers`' own list of logits processors; None where it has none besides temperature and top_p."""
    given = settings_of(model)
    if given is None:
        return None
    settings = copy.deepcopy(given)
    settings.update(**more)
    settings.do_sample, settings.num_beams, settings.guidance_scale = temperature > 0, 1, None
    settings.temperature = settings.top_p = None
    settings.max_length = length + new
    if end:
        settings._eos_token_tensor = torch.tensor(sorted(end), device=model.device)
    generator: Any = model  # transformers' types know no model that generates
    with parsing("the model's generation_config", "one that transformers generates by"):
        made = generator._get_logits_processor(settings, length, device=str(model.device))
        if not made:
            return None
        if temperature:
            settings.temperature, settings.top_p = temperature, top_p
            made = generator._get_logits_processor(settings, length, device=str(model.device))
    return cast("Callable[[Tensor, Tensor], Tensor]", made)


@dataclass(frozen=True)
class _Stopping:
    """A condition on new tokens as `transformers` asks for it, of rows with `given` tokens before them."""

    stop: Callable[[Sequence[int]], bool]
    given: int

    def __call__(self, tokens_BN: Tensor, scores: object, **_: object) -> Tensor:
        ended = [self.stop(row[self.given :]) for row in tokens_BN.tolist()]
        return torch.tensor(ended, dtype=torch.bool, device=tokens_BN.device)


def generate(model: PreTrainedModel, input_ids_BL: Tensor, attention_mask_BL: Tensor, given: SettingFields) -> Tensor:
    """`transformers`' own `generate` with options as `options_of` makes them, for models that no loop here runs.

    What it does besides (beams, a decoder's first token, an encoder's penalties) is as the `generation_config` has it.
    """
    options, settings = Options(**given), settings_of(model)
    sampled: dict[str, Any] = {}
    if options.temperature:  # transformers takes 50 for a top_k that is not given
        top_k = getattr(settings, "top_k", None) or 0
        sampled = {"temperature": options.temperature, "top_p": options.top_p, "top_k": top_k}
    stopped: dict[str, Any] = {}
    if isinstance(options.stop, StopStrings):
        stopped = {"stop_strings": list(options.stop.strings), "tokenizer": options.stop.tokenizer}
    elif options.stop is not None:
        before = 1 if model.config.is_encoder_decoder else input_ids_BL.shape[1]
        stopped = {"stopping_criteria": [_Stopping(options.stop, before)]}
    if options.healing is not None:
        stopped["logits_processor"] = [options.healing]
    accepted = "code that generates" if brought(model) else "a configuration and a generation_config that go together"
    with parsing(f"{type(model).__name__}.generate", accepted):
        tokens_BN: Tensor = at(model, "generate")(
            input_ids_BL, attention_mask=attention_mask_BL, max_new_tokens=options.max_new_tokens,
            eos_token_id=sorted(options.ends) or None, pad_token_id=options.pad, do_sample=options.temperature > 0,
            **sampled, **stopped,
        )  # fmt: skip
    return tokens_BN
