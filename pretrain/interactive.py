"""`pretrain` from Python, without a recipe: open a model, train it on texts, let it write, measure it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core import checkpoint
from pretrain.core.bounds import ProperShare, Whole, check_value
from pretrain.core.errors import PretrainError, nearest, warn
from pretrain.core.files import read_json_lines
from pretrain.core.folders import newest_checkpoint
from pretrain.core.foreign.code import brought, consenting, consenting_to, keep
from pretrain.core.models.families import family
from pretrain.core.processors import Processor
from pretrain.core.quick.quantities import counted
from pretrain.core.system.extras import extras_named
from pretrain.corpus.overlap import overlap_warning
from pretrain.corpus.sources import Document
from pretrain.corpus.sources._files import UNTOUCHED, given
from pretrain.corpus.store import write_corpus
from pretrain.engine import silent
from pretrain.inference.heads import evaluation_for
from pretrain.inference.rows import document_of
from pretrain.objectives import Objective
from pretrain.optim import Optimizer, Schedule
from pretrain.recipe import check
from pretrain.records import Metrics
from pretrain.stages import Job, Record, build_method, corpus_of
from pretrain.stages import evaluate as evaluating
from pretrain.stages.decode import continue_prompt
from pretrain.stages.train import Train

if TYPE_CHECKING:
    from pretrain.decoding import Decoding
    from pretrain.evaluation import Evaluation
    from pretrain.inference.predict import Opened

Method = str | Mapping[str, object]  # as a recipe names one: `"lion"`, `{"method": "lion", "lr": 3e-4}`
Texts = Iterable[str | Mapping[str, object] | None]  # documents, or their texts alone; None: there is none
IN_PYTHON = 'evaluations=["masked_loss"], or [{"method": "probe", "label": COLUMN}]'
OTHERWISE = {  # fields of a `train` stage that are said in another way
    "init": "a model, from pretrain.load", "corpus": "the folder as data", "processor": "it in the tokenizer's place",
    "surgeries": "the model that they have made: pretrain.methods.LoRA()(model)",
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What `train` gives. `metrics` are of held-out documents, none where none is; `log` has a row for each step."""

    model: PreTrainedModel
    tokenizer: Processor
    metrics: Metrics
    spent: Metrics  # tokens, steps, flops, seconds
    log: list[Record]


@extras_named()
def load(
    place: Path | str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:  # fmt: skip
    """The model (in evaluation mode) and its processor: a tokenizer for a model of text; None where there is none.

    `place` is a checkpoint, a stage that wrote one, a run, whose last checkpoint it is, or a run's report. `dtype` is
    that of the weights, by default the one they are stored in. `trust_remote_code` lets the code that the checkpoint
    brings be run, after a warning that says which files it is. Raises `PretrainError` for what is missing, damaged, or
    does not fit its configuration, and for pickled weights, which are never read.
    """
    folder = newest_checkpoint(place)
    with consenting_to(folder, trust_remote_code):
        return checkpoint.load(folder, device=device, dtype=dtype)


@extras_named()
def train(
    model: PreTrainedModel | Mapping[str, object],
    tokenizer: Processor,
    data: Texts | Path,
    *,
    budget: Mapping[str, object],
    objective: Objective | Method = "causal_lm",
    optimizer: Optimizer | Method = "adamw",
    schedule: Schedule | Method = "cosine",
    length: int = 128,
    batch_rows: int = 16,
    validation: float = 0.1,
    seed: int = 0,
    bar: bool = False,
    **fields: object,
) -> Trained:
    """Train a model in memory, by the loop that recipes use, until the budget is spent.

    `model` is one of `transformers`, which is trained in place, or `{"family": "llama", "hidden_size": 64, …}`, one
    that is made anew for the tokenizer. `data` are texts, documents (`{"text": …, "label": …}`) or the folder of a
    corpus; a share `validation` of the documents is held out, of a corpus its own. `budget` is one of tokens, steps,
    epochs, flops, seconds: `{"seconds": 30}`. `fields` are further ones of a `train` stage: `policies`, `clip`, `task`,
    … Nothing is kept on the disk. Raises `PretrainError` for a field or value that is not accepted.
    """
    for name in OTHERWISE.keys() & fields.keys():
        raise PretrainError(f"train.{name}: accepted here: {OTHERWISE[name]}")
    check_value("validation", validation, ProperShare)
    if objective == "causal_lm" and not isinstance(model, Mapping):
        _check_causal(model)
    with TemporaryDirectory(prefix="pretrain-") as work:
        folder = Path(work)
        corpus = corpus_of(data) if isinstance(data, Path) else _corpus(data, folder, validation)
        new = isinstance(model, Mapping)
        given: Record = {"budget": budget, "objective": objective, "optimizer": optimizer, "schedule": schedule}
        given |= {"length": length, "batch_rows": batch_rows, "seed": seed, "save_every": 0} | fields
        given |= {"model": dict(model), "tokenizer": work} if isinstance(model, Mapping) else {"init": work}
        if not isinstance(model, Mapping):  # for what is checked by a checkpoint's configuration
            model.config.save_pretrained(work)
            keep(folder, model, model.config)
            if brought(model) and (trusted := given.get("trust_remote_code")) is not True:
                given["trust_remote_code"] = ["init", *(trusted or [])]
        stage = _stage(given | {"corpus": str(corpus)})
        inputs = {place: Path(str(value)) for place, value in stage.references().items()}
        stage = stage.pointing_to(inputs)
        job = Job(folder / "train", inputs, seed=seed, name="train", say=silent, bar=bar)
        trained = stage.new_model(tokenizer, seed) if new else cast("PreTrainedModel", model).float()
        with consenting(stage.consents(inputs)):
            training, _ = stage.fit(job, trained, tokenizer)
        log = read_json_lines(job.folder / "log.jsonl")
    ended = cast("PreTrainedModel", training.model).eval()
    return Trained(ended, tokenizer, dict(training.metrics), dict(training.spent), log)


def _check_causal(model: PreTrainedModel) -> None:
    """Refuse by the words of `train` a model that the default objective is not for."""
    kind = family(model).kind
    if kind != "causal":
        fitting = {"masked": "masked_lm", "seq2seq": "span_corruption"}[kind]
        raise PretrainError(
            f"a {type(model).__name__} does not predict the next token: accepted: "
            f'objective="{fitting}", or one that learns labels'
        )


def _stage(given: Record) -> Train:
    """The checked `train` stage; errors name the field, not a recipe."""
    try:
        stage = check({"stages": [{"stage": "train"} | given]}).stages[0]
    except PretrainError as error:
        raise PretrainError(str(error).removeprefix("recipe: "), place=error.place) from error
    assert isinstance(stage, Train)
    return stage


def _documents(texts: Texts) -> list[Document]:
    if isinstance(texts, str | Mapping):
        raise PretrainError(f"texts {str(texts)[:40]!r}: accepted: a list of texts, or of documents with a text")
    whole = [document_of(text, "text", number) for number, text in enumerate(texts)]
    return [{"id": str(number), "domain": "texts"} | document for number, document in enumerate(whole)]


def _whole(documents: list[Document], columns: Sequence[str]) -> list[Document]:
    """The documents that have something in all of the columns, as of a file; a warning counts those left out."""
    whole = [document for document in documents if all(given(document, column) for column in columns)]
    if documents and not whole:
        raise PretrainError(f"no document has {' and '.join(map(repr, columns))}; accepted: at least one")
    if lost := len(documents) - len(whole):
        warn(f"left out: {lost:,} of {counted(len(documents), 'document')}, without {' or '.join(map(repr, columns))}")
    return whole


def _needed(documents: Sequence[Document], methods: Sequence[Evaluation]) -> list[str]:
    """The columns that each document has to have: its text, where it is one of text, and what is true of it."""
    labelled = [method.columns for method in methods if hasattr(getattr(method, "method", None), "expected")]
    of_text = all(name not in document for document in documents for name in UNTOUCHED)
    texts = ["text"] if of_text and any("text" in document for document in documents) else []
    return [*dict.fromkeys([*texts, *(column for columns in labelled for column in columns)])]


def _corpus(texts: Texts, folder: Path, validation: float) -> Path:
    documents = _documents(texts)
    documents = _whole(documents, _needed(documents, ()))
    write_corpus(iter(documents), folder / "corpus", validation=validation, test=0.0, near_duplicates=None)
    return folder / "corpus"


@extras_named()
def generate(
    model: PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tokenizer: PreTrainedTokenizerBase | str = "",
    prompt: str = "",
    *,
    method: Decoding | Method | None = None,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_p: float | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    token_healing: bool = True,
) -> str:
    """What the model writes after a prompt, up to and with the first text of `stop`.

    `generate(model, tokenizer, prompt)`, or with both of them as one, `(model, tokenizer)`, as `load` gives them.
    Temperature (0 is greedy), top_p and all else are the model's `generation_config`'s unless given; where that says
    nothing it samples at temperature 0.8 with top_p 0.95. With `token_healing` the prompt's last word is written anew,
    in tokens that go on with it: after "def " stands " main", which is one.
    """
    if isinstance(model, str | Path):
        raise PretrainError(
            f"model {str(model)!r}: accepted: model, tokenizer = pretrain.load({str(model)!r}), and then both of them"
        )
    if isinstance(model, tuple):
        prompt = tokenizer if isinstance(tokenizer, str) and tokenizer else prompt
        model, tokenizer = model
    if isinstance(tokenizer, str):
        raise PretrainError(f"tokenizer {tokenizer[:40]!r}: accepted: generate(model, tokenizer, prompt)")
    if not isinstance(prompt, str):
        raise PretrainError(f"prompt {str(prompt)[:40]}: accepted: one text; of several call this for each")
    chosen: Decoding | None = None if method is None else _method(method, "decoding")
    sample = continue_prompt(
        model, tokenizer, prompt, method=chosen, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        stop=stop, seed=seed, token_healing=token_healing,
    )  # fmt: skip
    return str(sample["continuation"])


@extras_named()
def evaluate(
    model: PreTrainedModel | Opened,
    tokenizer: Processor | Texts | None = None,
    texts: Texts | Sequence[Evaluation | Method] | None = None,
    evaluations: Sequence[Evaluation | Method] | None = None,
    *,
    length: int | None = None,
    compressors: bool = False,
) -> Record:
    """Measure a model on texts or documents: `metrics`, the same in `domains`, and 95% `intervals`, as a stage does.

    `evaluate(model, tokenizer, texts)`, or as `predict` takes it `evaluate(checkpoint, texts)`: the folder of a
    checkpoint, a stage or a run, or `(model, tokenizer)`. `evaluations` come after the texts in both. Documents whose
    text, or what is true of it, is empty or missing are left out, with a warning; texts that the checkpoint was trained
    on are counted in one (`seen` in what is returned), where its corpora lie beside it.

    `evaluations` are by default what fits the model's head: the likelihood of texts, or the labels (numbers, tags,
    answers) that documents have beside their text. `length` is the window for evaluations that leave theirs open: by
    default that of the checkpoint's training, as in a stage.
    `compressors` adds what xz and zstd make of the same texts. Raises `PretrainError` for an evaluation that does not
    fit the model, and for documents without the column that it reads.
    """
    check_value("length", 0 if length is None else length, Whole)
    model, tokenizer, texts, evaluations = _opened(model, tokenizer, texts, evaluations)
    made = checkpoint.lineage(model.config._name_or_path or "/none")
    try:
        by_head = [evaluation_for(model, made)] if evaluations is None else evaluations
    except PretrainError as error:
        option = "--evaluation, for example {method: probe, label: COLUMN}"
        raise PretrainError(str(error).replace(option, IN_PYTHON)) from error
    chosen = [_method(entry, "evaluation") for entry in by_head]
    documents = _documents(texts)
    for column in (column for method in chosen for column in method.columns):
        known = dict.fromkeys(name for each in documents for name in each if name not in ("domain", "id"))
        if column not in ("text", "domain", "id") and column not in known:
            raise PretrainError(
                f"no document has a {column!r}{nearest(column, known)}, which a {type(model).__name__} is measured by; "
                f"accepted: documents with it beside {', '.join(known)}"
            )
    window = length or made.get("length")
    documents = _whole(documents, _needed(documents, chosen))
    place = Path(model.config._name_or_path or "/none")
    seen = overlap_warning(documents, place) if place.is_dir() else ""
    if seen:
        warn(seen)
    result = evaluating.evaluate(model, tokenizer, documents, chosen, compressors=compressors, length=window)
    return result | ({"seen": seen} if seen else {})


def _opened(
    model: object, tokenizer: object, texts: object, evaluations: object
) -> tuple[PreTrainedModel, Processor, Texts, Sequence[Evaluation | Method] | None]:
    """The model and its tokenizer, the texts and the evaluations, in whichever way `evaluate` is given them."""
    if isinstance(model, Path | str | tuple):
        if tokenizer is not None:  # the texts, in second place
            texts, evaluations = tokenizer, texts if evaluations is None else evaluations
        model, tokenizer = model if isinstance(model, tuple) else evaluating.load_both(newest_checkpoint(model))
    if not isinstance(model, torch.nn.Module):
        raise PretrainError(f"model {type(model).__name__}: accepted: a model, a path, or (model, tokenizer)")
    if texts is None:
        raise PretrainError("evaluate: no texts; accepted: (model, tokenizer, texts), or (checkpoint, texts)")
    chosen = cast("Sequence[Evaluation | Method] | None", evaluations)
    return cast("PreTrainedModel", model), cast("Processor", tokenizer), cast("Texts", texts), chosen


def _method(value: object, kind: str) -> Any:
    try:
        return build_method(dict(value) if isinstance(value, Mapping) else value, kind)
    except ValueError as error:
        raise PretrainError(str(error)) from error
