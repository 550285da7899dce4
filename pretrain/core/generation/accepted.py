"""What a `generation_config.json` may say: what no way of generating can do is refused where the file is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from pretrain.core.errors import PretrainError, brief

MOST = 1 << 31  # of whole numbers
Rule = tuple[Callable[[object], bool], str]


def _whole(value: object, least: int = 0, most: int = MOST) -> bool:
    return type(value) is int and least <= value <= most


def _number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return least <= value <= most and abs(value) < 1e300


def _tokens(value: object, least: int = 0) -> bool:
    return isinstance(value, list) and all(_whole(each, least) for each in value)


def _words(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _biases(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(each, list) and len(each) == 2 for each in value):
        return False
    return all(_tokens(tokens) and tokens and _number(bias) for tokens, bias in value)


COUNT: Rule = (_whole, "a whole number from 0")
PENALTY: Rule = (lambda value: _number(value, 1e-9), "a number above 0 (1: no penalty)")
SHARE: Rule = (lambda value: _number(value, 0, 1), "a number from 0 to 1")
PART: Rule = (lambda value: _number(value, 0, math.nextafter(1, 0)), "a number from 0 (none) to below 1")
TOKENS: Rule = (lambda value: _whole(value, -1) or _tokens(value, -1), "a token, or a list of tokens")
LIST: Rule = (lambda value: _tokens(value, -1), "a list of tokens")
FLAG: Rule = (lambda value: isinstance(value, bool), "true or false")
RULES: dict[str, Rule] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), COUNT),
    "top_k": (_whole, "a whole number from 0 (0: all tokens)"),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (COUNT[0], f"{COUNT[1]} (0: none)")),
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"),
                    (lambda value: _whole(value, 1, 1024), "a whole number from 1 to 1,024")),
    "temperature": (lambda value: _number(value, 0), "a number from 0 (0: the likeliest token)"),
    "top_p": (SHARE[0], f"{SHARE[1]} (0: the likeliest token, 1: all)"),
    "min_p": (SHARE[0], f"{SHARE[1]} (0: all tokens)"),
    "top_h": SHARE,
    "typical_p": (lambda value: _number(value, 1e-9, 1), "a number above 0, at most 1 (1: all tokens)"),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), PART),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), PENALTY),
    **dict.fromkeys(("length_penalty", "guidance_scale", "diversity_penalty", "max_time"), (_number, "a number")),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKENS),
    **dict.fromkeys(("eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"), TOKENS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), LIST),
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), FLAG),
    "bad_words_ids": (lambda v: isinstance(v, list) and all(map(_tokens, v)) and all(v), "lists of tokens in a list"),
    "sequence_bias": (_biases, "a list of [tokens, number]"),
    "stop_strings": (_words, "a text, or a list of texts"),
    "exponential_decay_length_penalty": (
        lambda v: isinstance(v, list) and len(v) == 2 and _whole(v[0]) and _number(v[1], 1e-9), "[tokens, number]",
    ),
}  # fmt: skip
WITHIN = ("bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id")  # of the vocabulary


def check_generation(path: Path, settings: Mapping[str, object], vocabulary: object = None) -> None:
    """Refuse fields that no model can generate by; the error names the file, the field and what is accepted."""
    for name, value in settings.items():
        inside, accepted = RULES.get(name, (None, ""))
        if inside is not None and value is not None and not inside(value):
            raise PretrainError(f"{path}: {name} {brief(value)}: accepted: {accepted}")
        if name in WITHIN and value is not None and type(vocabulary) is int:
            tokens = [each[0] for each in value] if name == "sequence_bias" and isinstance(value, list) else value
            beyond = next((token for token in _listed(tokens) if token >= vocabulary), None)
            if beyond is not None:
                raise PretrainError(
                    f"{path}: {name} {beyond}: accepted: tokens of the vocabulary, from 0 to {vocabulary - 1}"
                )


def _listed(value: object) -> list[int]:
    """The tokens in a value of a field."""
    if isinstance(value, list):
        return [token for each in value for token in _listed(each)]
    return [value] if type(value) is int else []
