"""The one error type that users see."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

LONGEST = 4000  # characters of a message
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
LISTED, LETTERS = 24, 600  # words that an error names at most, and letters of them
LONG = 40  # letters of a word that is a label or a file's own
HERE = f"{Path(__file__).parents[1]}/"  # this package


class PretrainError(Exception):
    """A mistake that the user can mend: the message names the thing, its value and what is accepted.

    `place` says where in a stage of a recipe it is, where that is known: `("sources", 1)`.
    """

    def __init__(self, message: str = "", *, place: tuple[str | int, ...] = ()) -> None:
        super().__init__(_one_line(message))
        self.place = place


def _one_line(message: str) -> str:
    """A message that any terminal takes, whatever foreign text it names: one line, and no halves of characters."""
    text = message if message.isprintable() else _UNPRINTABLE.sub(_escaped, message)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


def _escaped(match: re.Match[str]) -> str:
    return " " if match[0].isspace() else match[0].encode("unicode_escape").decode("ascii")


def steps_of(place: str) -> tuple[str | int, ...]:
    """The steps of a place that is written with dots: `policies.1.teacher`."""
    return tuple(int(step) if step.isdigit() else step for step in place.split("."))


def brief(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


class Terminated(SystemExit):
    """A signal asks the program to end, with this status: no exit of code from outside, which may be an error."""


class PretrainWarning(UserWarning):
    """What the user should know, though work goes on; the command line prints it as one line."""


def warn(message: str) -> None:
    """Say that something was damaged, or passed over, and what is done instead."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _between(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, PretrainWarning, stacklevel=level)


def _between(file: str) -> bool:
    """Whether a file lies between a mistake and the user's line: of this package, or of context managers."""
    return file.startswith(HERE) or file == contextlib.__file__


class Diverged(PretrainError):
    """A training whose loss or gradient is no number any more, step after step."""


# Words for one thing, in transformers and other trainers: of the accepted ones the first of a row is guessed.
SYNONYMS = (
    ("n_embd", "hidden_size", "d_model", "width", "embed_dim", "hidden_dim", "model_dim"),
    ("n_layer", "num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers"),
    ("n_head", "num_attention_heads", "num_heads", "n_heads", "heads", "encoder_attention_heads"),
    ("n_inner", "intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "mlp_dim", "feed_forward_size"),
    ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_head_kv"),
    ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "context_length", "seq_length"),
    ("vocab_size", "n_vocab", "vocabulary", "vocabulary_size"),
    ("length", "max_length", "max_seq_length", "seq_len", "block_size", "context", "context_length", "context_size"),
    ("lr", "learning_rate", "peak_lr", "max_lr"),
    ("weight_decay", "wd"),
    ("beta1", "adam_beta1"),
    ("beta2", "adam_beta2"),
    ("eps", "epsilon", "adam_epsilon"),
    ("batch_rows", "batch_size", "per_device_train_batch_size", "batch"),
    ("micro_rows", "micro_batch_size", "gradient_accumulation_steps", "accumulate"),
    ("budget", "max_steps", "num_train_epochs", "epochs", "steps", "duration"),
    ("evaluate_every", "eval_steps", "eval_every", "validate_every"),
    ("init", "checkpoint", "pretrained", "from_pretrained", "model_name_or_path"),
    ("rank", "r", "lora_r"),
    ("alpha", "lora_alpha", "scaling"),
    ("files", "path", "folder", "directory", "text", "glob"),
    ("text", "column", "text_column", "content", "field"),
    ("domain", "language", "category"),
)
# What is called so here, and other words from which it is guessed.
MEANT = (
    ("objective", "loss", "criterion"),
    ("schedule", "scheduler", "lr_scheduler", "lr_scheduler_type"),
    ("policies", "callbacks"),
    ("operations", "filters", "transforms", "processing"),
    ("data", "corpus", "dataset", "prepare", "preprocess"),
    ("train", "pretrain", "finetune", "fine_tune", "tune", "continue", "fit"),
    ("surgery", "quantize", "prune", "grow", "merge", "adapt", "lora", "compress", "expand"),
    ("decode", "generate", "sample", "samples", "inference", "predict"),
    ("evaluate", "eval", "test", "measure", "benchmark", "validate"),
    ("run", "train", "start", "pretrain"),
    ("generate", "sample", "decode", "complete", "chat", "infer"),
    ("new", "init", "create", "start"),
)
_BRITISH = (("isation", "ization"), ("ise", "ize"), ("ising", "izing"), ("yse", "yze"), ("our", "or"), ("tre", "ter"))


def nearest(word: str, accepted: Iterable[str], cutoff: float = 0.6) -> str:
    """`" (did you mean 'x'?)"` when an accepted word is meant by `word` or spelled much like it, else an empty string.

    Meant is the same word in another spelling (British or American, plural, hyphens), or another word for the thing;
    never the very word. The hyphens that options begin with make two words no more alike.
    """
    given = str(word)
    words = {plain(each).lstrip("-"): each for each in reversed(list(accepted)) if each != given}
    same = {stem(each): each for each in words}.get(stem(given))
    meant = [each for row in SYNONYMS if stem(given) in map(stem, row) for each in row if each in words]
    meant += [row[0] for row in MEANT if stem(given) in map(stem, row[1:]) and row[0] in words]
    close = [same] if same else meant[:1]
    close = close or difflib.get_close_matches(plain(given).lstrip("-"), words, n=1, cutoff=cutoff)
    return f" (did you mean {words[close[0]]!r}?)" if close else ""


def plain(word: str) -> str:
    """A word whatever its case and blanks."""
    return " ".join(word.casefold().split())


def stem(word: str) -> str:
    """A word whatever its case, its hyphens, its number and on which side of the ocean it is spelled."""
    text = re.sub(r"[\s_-]+", "_", plain(word).strip("-"))
    for british, american in _BRITISH:
        text = text.replace(british, american)
    return text if len(text) < 4 or text.endswith("ss") else text.removesuffix("s")


def unknown(kind: str, word: str, accepted: Iterable[str]) -> PretrainError:
    """The error for a word that is not among those accepted."""
    words = sorted(accepted)
    return PretrainError(f"unknown {kind} {word!r}{nearest(word, words)}; accepted: {listed(words, word)}")


def listed(words: Sequence[str], word: str) -> str:
    """The accepted words; of very many those that are spelled most like `word`, and how many there are.

    Of long ones the beginnings, and fewer of them.
    """
    shown = [_beginning(each) for each in words]
    if len(words) <= LISTED and sum(map(len, shown)) <= LETTERS:
        return ", ".join(shown) or "none"
    like = difflib.get_close_matches(_beginning(word), dict.fromkeys(shown), n=LISTED // 2, cutoff=0.0)
    while sum(map(len, like)) > LETTERS / 2:
        like.pop()
    return f"{', '.join(sorted(like))}, … ({len(words):,} in all)"


def _beginning(word: str) -> str:
    return word if len(word) <= LONG else f"{word[: LONG - 1]}…"
