"""A chat template for a model that has none: how a conversation is written for it, and what ends an answer.

Shape letters: V rows of the embeddings, E width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core.encoding import ASSISTANT, BEGIN, END, framing, sequence_ends
from pretrain.core.encoding import frame as document_frame
from pretrain.core.errors import PretrainError
from pretrain.core.foreign import texts
from pretrain.core.foreign.reading import read_bytes
from pretrain.core.models.families import embeddings
from pretrain.dial.effort import Task, Work
from pretrain.surgery import Inputs, Surgery, report
from pretrain.surgery._tokens import resize
from pretrain.surgery.vocabulary.vocabulary_expansion import tables

LONGEST = 1 << 20  # bytes of a template
START, STOP = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADINGS = (
    "BEGIN{% for message in messages %}{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}END{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatTemplate(Surgery):
    """Chat Markup Language (OpenAI, 2023).

    The tokenizer gets the chat template `template`: "chatml", a message as `<|im_start|>role`, newline, content,
    `<|im_end|>`; "headings", as `### Role:`, newline, content, and after an answer the tokenizer's own end, so that no
    new token is needed; or a file of `transformers`' Jinja templates. Of the tokens of "chatml" those that the
    tokenizer lacks are added, each with the mean of the old rows; `<|im_end|>` becomes the end of a sequence, and
    documents stay framed as before. A tokenizer that has a template keeps it, unless `replace`.
    """

    new_vocabulary: ClassVar[bool] = True
    template: str = "chatml"
    replace: bool = False

    def work(self, task: Task) -> Work:
        """The tokenizer, and of tokens that it lacks the mean of the rows."""
        return task.listed()

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The same model, with rows for new tokens; the tokenizer is handed back in `inputs.extra`."""
        if inputs is None or inputs.tokenizer is None:
            raise PretrainError("chat_template: the checkpoint has no tokenizer; accepted: one that has")
        if getattr(inputs.tokenizer, "chat_template", None) and not self.replace:
            return model
        tokenizer = copy.deepcopy(inputs.tokenizer)
        new = self._marks(tokenizer) if self.template == "chatml" else []
        tokenizer.chat_template = self._written(tokenizer)
        framing(tokenizer, ("user", ASSISTANT, "user"), answering=True)  # that it can be filled in
        self._rows(model, new)
        settings = getattr(model, "generation_config", None)
        if settings is not None and self.template == "chatml":
            given = settings.eos_token_id
            ends = [] if given is None else [given] if isinstance(given, int) else list(given)
            settings.eos_token_id = [*dict.fromkeys([int(tokenizer.eos_token_id), *ends])]
        inputs.extra["tokenizer"] = tokenizer
        report(inputs, **{"chat_template/new_tokens": len(new)})
        return model

    def _marks(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Make the marks of turns special tokens, one of them the end; the numbers of those that are new."""
        begin, end = document_frame(tokenizer)
        known = tokenizer.get_vocab()
        tokenizer.add_special_tokens({"additional_special_tokens": [START, STOP]}, replace_extra_special_tokens=False)
        names = {number: name for name, number in tokenizer.get_vocab().items()}
        tokenizer.eos_token = STOP
        tokenizer.init_kwargs |= {
            BEGIN: None if begin is None else names[begin],
            END: None if end is None else names[end],
        }
        return [number for number, name in names.items() if name in (START, STOP) and name not in known]

    def _written(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The template as Jinja."""
        if self.template == "chatml":
            return CHATML
        if self.template == "headings":
            begin, end = (tokenizer.convert_ids_to_tokens(n) if n is not None else "" for n in sequence_ends(tokenizer))
            if not end:
                raise PretrainError("chat_template: headings: the tokenizer has no end of a sequence; accepted: chatml")
            return HEADINGS.replace("BEGIN", str(begin)).replace("END", str(end))
        path = Path(self.template)
        if not path.is_file():
            raise PretrainError(
                f"chat_template: template {self.template!r}: accepted: chatml, headings, or a file of Jinja"
            )
        try:
            return texts.decode(read_bytes(path, LONGEST))
        except (UnicodeDecodeError, OSError) as error:
            raise PretrainError(f"chat_template: {path} cannot be read: {error}; accepted: Jinja, in UTF-8") from error

    def _rows(self, model: PreTrainedModel, new: list[int]) -> None:
        """Rows for new tokens: the mean of the old ones."""
        if not new:
            return
        before = [table.double().mean(0) for table in tables(model)]
        if max(new) >= len(embeddings(model).weight):
            resize(model, max(new) + 1)
        for table, mean in zip(tables(model), before, strict=True):
            table[new] = mean.to(table)
