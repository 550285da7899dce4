"""`pretrain chat`: a conversation with a checkpoint, in its chat template, its answers shown as they are written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.core.bounds import Count, NonNegative, Seed, Share
from pretrain.core.errors import PretrainError
from pretrain.core.folders import has_chat_template, newest_checkpoint
from pretrain.core.foreign.code import TRUST
from pretrain.core.quick.imports import opening
from pretrain.inference.measuring import TEMPERATURE, TOP_P, methods_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.decoding import Decoding

HELP = "/reset forgets the conversation, /system TEXT begins one with TEXT, /quit or Ctrl-D ends; Ctrl-C ends an answer"
ORDERS = ("/reset", "/system", "/quit", "/exit")
HALF = "\ufffd"  # what a character looks like of which not all tokens are there


@dataclass
class Conversation:
    """What was said so far with a model, and how it answers.

    `answer` writes what the model says next and takes both into `turns`; of turns that the model's positions have no
    room for the earliest are left out, the system's message never.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    method: Decoding | None = None
    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)  # role and content
    left_out: int = 0  # turns of the last prompt that found no room

    def answer(self, message: str, write: Callable[[str], None] = lambda text: None) -> str:
        """The model's answer to a message; `write` gets it piece by piece as it is written.

        An interrupt ends it where it is. Raises `PretrainError` for a message that leaves no room for an answer.
        """
        import torch

        from pretrain.core.generation.settings import options_of
        from pretrain.stages.decode import continued, sampled

        temperature, top_p = sampled(self.model, self.method, self.temperature, self.top_p)
        ids = self._prompt(message)
        input_1L = torch.tensor([ids], device=self.model.device)
        shown = Shown(self.tokenizer, write)
        options = options_of(
            self.model, self.tokenizer, len(ids), max_new_tokens=self.max_new_tokens, temperature=temperature,
            top_p=top_p,
        )  # fmt: skip
        options["stop"] = shown.watching(options.get("stop"), options.get("eos"))
        torch.manual_seed(self.seed + len(self.turns))
        try:
            new_1N = continued(self.model, input_1L, options, self.method)[:, len(ids) :]
            shown.show([token for token in new_1N[0].tolist() if token not in shown.ends])  # what is not shown yet
        except KeyboardInterrupt:
            write(" …")
        text = shown.text.strip()
        self.turns += [("user", message), ("assistant", text)]
        return text

    def _prompt(self, message: str) -> list[int]:
        """The tokens up to where the answer begins, of as many turns as there is room for."""
        from pretrain.core.encoding import Encoder
        from pretrain.core.models.families import positions_of

        encoder, room = Encoder(self.tokenizer), positions_of(self.model)
        first = [("system", self.system)] if self.system else []
        for start in range(0, len(self.turns) + 1, 2):
            turns = [*first, *self.turns[start:], ("user", message)]
            ids, _ = encoder.conversation(turns, answering=True)
            if room is None or len(ids) + self.max_new_tokens <= room:
                self.left_out = start
                return ids
        raise PretrainError(
            f"a message of {len(ids):,} tokens and an answer of {self.max_new_tokens:,} are more than the model's "
            f"{room:,} positions; accepted: a shorter message, or fewer max_new_tokens"
        )


class Shown:
    """The text of new tokens, shown as they come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        self.tokenizer, self.write, self.text, self.ends = tokenizer, write, "", set[int]()

    def watching(
        self, stop: Callable[[Sequence[int]], bool] | None, eos: int | Collection[int] | None
    ) -> Callable[[Sequence[int]], bool]:
        """A condition that shows each row of new tokens that it is asked about."""
        self.ends = {eos} if isinstance(eos, int) else {*(eos or ())}

        def stops(new: Sequence[int]) -> bool:
            self.show([token for token in new if token not in self.ends])
            return stop is not None and stop(new)

        return stops

    def show(self, new: Sequence[int]) -> None:
        """Write what these tokens say beyond what was written, up to the last whole character."""
        from pretrain.core.encoding import text_of

        text = text_of(self.tokenizer, new, skip_special_tokens=True).lstrip().rstrip(HALF)
        if len(text) > len(self.text) and text.startswith(self.text):
            self.write(text[len(self.text) :])
            self.text = text


def chat(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a stage that wrote one, or a run.")],
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    method: Annotated[str | None, typer.Option(help="Decoding: NAME, or {method: NAME, field: value}.")] = None,
    max_new_tokens: Annotated[Count, typer.Option(help="Of an answer at most.")] = 512,
    temperature: Annotated[NonNegative | None, typer.Option(help=TEMPERATURE)] = None,
    top_p: Annotated[Share | None, typer.Option(help=TOP_P)] = None,
    seed: Annotated[Seed, typer.Option()] = 0,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
) -> None:
    """Talk to a chat model; from a pipe, each line is a message.

    What else its generation_config.json says of tokens (top_k, min_p, penalties) holds.
    """
    chosen = [method] if method else []
    methods_of(chosen, "decoding", "--method: ")  # what is wrong is said before anything large is imported
    place = newest_checkpoint(checkpoint)
    if not has_chat_template(place):
        raise PretrainError(
            f"chat: the tokenizer of {place} has no chat template; accepted: a chat model, or a base with the surgery "
            "chat_template (pretrain generate continues a text)"
        )
    with opening(place, trust_remote_code):
        from pretrain.stages.evaluate import load_text

        decoding = next(iter(methods_of(chosen, "decoding", "--method: ")), None)
        model, tokenizer = load_text(place, decoding.load if decoding else None)
    talk = Conversation(
        model, tokenizer, decoding, max_new_tokens, temperature, top_p, seed, system
    )  # fmt: skip
    if sys.stdin.isatty():
        typer.echo(HELP, err=True)
    for message in _messages():
        if message in ("/quit", "/exit"):
            break
        if message.startswith("/") and message.split()[0] not in ORDERS:
            typer.echo(f"{message.split()[0]}: accepted: {', '.join(ORDERS)}", err=True)
            continue
        if message.startswith(("/reset", "/system")):
            talk.turns.clear()
            talk.system = message.partition(" ")[2].strip() if message.startswith("/system") else talk.system
            continue
        talk.answer(message, lambda text: typer.echo(text, nl=False))
        typer.echo("")
        if talk.left_out:
            typer.echo(f"note: the first {talk.left_out} turns found no room and were left out", err=True)


def _messages() -> Iterator[str]:
    """What is typed, or the lines of a pipe, but for empty ones."""
    asked = sys.stdin.isatty()
    while True:
        try:
            line = in_utf8((lambda: input("> ")) if asked else sys.stdin.readline, "chat")
        except EOFError:
            return
        if not asked and not line:
            return
        if line.strip():
            yield line.strip()


def in_utf8(read: Callable[[], str], what: str) -> str:
    """What is read of standard input; raises `PretrainError` where that is not UTF-8."""
    try:
        text = read()
        text.encode()  # halves stand for bytes where the system's language is none
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) & 0xFF
    else:
        return text
    raise PretrainError(f"{what}: byte 0x{byte:02x} of standard input is not UTF-8; accepted: text in UTF-8")
