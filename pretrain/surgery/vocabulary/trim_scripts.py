"""Fewer tokens for a multilingual model: only those of some writing scripts.

Shape letter: V old tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.bounds import Whole
from pretrain.core.errors import PretrainError
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._tokens import state_of
from pretrain.surgery.vocabulary import _scripts
from pretrain.surgery.vocabulary._trim import check, counted, cut, of_bytes, stem


@dataclass(frozen=True)
class TrimScripts(Surgery):
    """Adapting Pre-trained Language Models to African Languages via Multilingual Adaptive Fine-Tuning
    (arXiv:2204.06487).

    Before a multilingual model is trained further on many languages at once (the recipe
    `multilingual-adaptive-fine-tuning`), tokens of other writing scripts than `scripts` are deleted, with their rows of
    the embeddings, of the head and of its bias: W' = W[kept], and logits of kept tokens are as before. Scripts are
    Unicode's, by name or code (`Latin`, `Ethi`); what they share (digits, punctuation, accents) belongs to all. A
    byte-level token that begins or ends within a character stays where one of those scripts has a character of such
    bytes. So every text of those scripts, in the form that the tokenizer's normaliser gives it, is split as before.

    Without a corpus all tokens of the scripts stay. With one, those that its training text uses, and of these the
    `keep` most frequent of each script (0: all), counted apart so that a script of little text is not crowded out.
    Special and other added tokens, those that the configuration names, bytes, and the parts of kept BPE tokens stay as
    in `trim_vocabulary`. The published code counts the tokens of each corpus; the choice follows the abstract.
    """

    new_vocabulary: ClassVar[bool] = True

    scripts: tuple[str, ...]
    keep: Whole = 0

    def __post_init__(self) -> None:
        """Refuse unknown scripts, and none."""
        super().__post_init__()
        if not self.scripts:
            raise PretrainError("trim_scripts: no scripts: accepted: one or more, as Latin", place=("scripts",))
        _scripts.check_scripts(self.name, self.scripts)

    @property
    def needs_text(self) -> bool:
        """What is most frequent is known of a text."""
        return self.keep > 0

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model with fewer rows; the tokenizer, and the text in its numbers, go back in `inputs.extra`."""
        inputs, tokenizer = check(self.name, model, inputs)
        with_text = inputs.counts is not None or bool(inputs.batches)
        if self.keep and not with_text:
            raise PretrainError(f"trim_scripts: keep {self.keep}: accepted: 0, or a surgery stage with `corpus`")
        count_V = counted(self.name, model, inputs, tokenizer) if with_text else None
        script = scripts_of(tokenizer, self.scripts)
        by_script: dict[str, list[int]] = defaultdict(list)
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if (its := script(token)) is not None:
                by_script[its].append(index)
        chosen = {name: self.chosen(ids, count_V) for name, ids in by_script.items()}
        report(inputs, **{f"{self.name}/tokens_{name}": len(ids) for name, ids in chosen.items()})
        every = [index for ids in chosen.values() for index in ids]
        return cut(self.name, model, inputs, every, count_V, lambda token: script(token) is not None)

    def chosen(self, ids: list[int], count_V: Tensor | None) -> list[int]:
        """Those of a script's tokens that stay; of equally frequent ones the first."""
        if count_V is None:
            return ids
        times = dict(enumerate(count_V.tolist()))
        used = [index for index in ids if times.get(index, 0)]
        return sorted(used, key=lambda index: -times[index])[: self.keep or None]


def scripts_of(tokenizer: PreTrainedTokenizerBase, scripts: tuple[str, ...]) -> Callable[[str], str | None]:
    """What tells of a token its script among these; None of one that text of these scripts never holds."""
    state = state_of(tokenizer)
    if not of_bytes(state):
        return lambda token: _scripts.script_of(stem(state, token), scripts)
    byte_of, of = _scripts.byte_of(), _scripts.of_bytes(scripts)

    def script(token: str) -> str | None:
        data = [byte_of.get(character) for character in stem(state, token)]
        return None if None in data else of(bytes(byte for byte in data if byte is not None))

    return script
