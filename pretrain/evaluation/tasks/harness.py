"""Tasks of lm-eval from local files."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np

from pretrain.core.bounds import Ge, Whole
from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject
from pretrain.core.foreign.paths import expanded
from pretrain.core.method import Ref
from pretrain.core.models.families import positions_of
from pretrain.evaluation import Evaluation, Measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
CONTEXT = 400  # characters before a cloze task's choices


@dataclass(frozen=True)
class Harness(Evaluation):
    """Lessons from the Trenches on Reproducible Evaluation of Language Models (arXiv:2405.14782).

    Runs tasks of the paper's library, lm-eval (the extra `eval`), on the loaded model. `folder` holds a task a file,
    `NAME.yaml`, whose `dataset_path` is json, csv, parquet or text and whose `data_files` lie beside it; `tasks` names
    some of them (by default all). Nothing is fetched, and no code of a task is run. Without a folder: the
    multiple-choice task that `write_cloze` makes of the documents. Every text begins as those that the model was
    trained on, and has at most `length` tokens, cut from the left (0: all that the model has positions for). `shots`,
    where it is not negative, and `limit`, above 0, are lm-eval's `num_fewshot` and `limit`. Metrics: `TASK_METRIC`,
    such as `cloze_acc`, and those of a filter `TASK_METRIC_FILTER`. Intervals: 1.96 of lm-eval's standard errors to
    either side; `resamples` are for metrics that are no mean.
    """

    estimated: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ("causal",)
    given: ClassVar[bool] = False

    folder: Ref | None = None
    tasks: tuple[str, ...] = ()
    shots: Annotated[int, Ge(-1)] = -1
    limit: Whole = 0
    length: Whole = 0
    resamples: Whole = 1000
    seed: Whole = 1234

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        super().__post_init__()
        if self.tasks and not self.folder:
            raise PretrainError(f"harness: tasks {', '.join(self.tasks)}: accepted: with a folder that holds them")

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The tasks' metrics; documents with `text` are needed without a folder."""
        with tempfile.TemporaryDirectory(prefix="pretrain-harness-") as made, _offline():
            try:
                import lm_eval
                from lm_eval.tasks import TaskManager

                from pretrain.evaluation.tasks._harness import OurModel, configurations, undisturbed
            except ImportError as error:
                raise PretrainError(
                    f"harness: {error}: accepted: lm-eval, of the extra eval: pip install 'pretrain[eval]'"
                ) from error
            folder = expanded(self.folder) if self.folder else Path(made)
            if not self.folder:
                write_cloze(documents, folder, seed=self.seed)
            read = configurations(folder, self.tasks, Path(made) / "cache")
            ours = OurModel(model, tokenizer, self._length(model), self.seed)
            with undisturbed():
                try:
                    results = lm_eval.simple_evaluate(
                        ours, tasks=read, task_manager=TaskManager(include_defaults=False), log_samples=False,
                        num_fewshot=self.shots if self.shots >= 0 else None, limit=self.limit or None,
                        bootstrap_iters=self.resamples, random_seed=self.seed, numpy_random_seed=self.seed,
                        torch_random_seed=self.seed, fewshot_random_seed=self.seed,
                    )  # fmt: skip
                except PretrainError:
                    raise
                except Exception as error:  # of any kind: lm-eval's own words on a task that it cannot run
                    names = ", ".join(task["task"] for task in read)
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    raise PretrainError(f"harness: {names}: {reason}; accepted: tasks that lm-eval can run") from error
        return measured(results)

    def _length(self, model: PreTrainedModel) -> int:
        limit = positions_of(model)
        if isinstance(limit, int) and self.length > limit:
            raise PretrainError(f"harness: length {self.length}: accepted: at most the model's {limit} positions")
        return self.length or (limit if isinstance(limit, int) else 2048)


def measured(results: JSONObject) -> Measured:
    """The numbers of what lm-eval returns."""
    metrics, intervals = {}, {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{task}_{metric}" + ("" if kept == "none" else f"_{kept}")
            metrics[name] = float(value)
            error = values.get(f"{metric}_stderr,{kept}")
            if isinstance(error, int | float):
                intervals[name] = (float(value - 1.96 * error), float(value + 1.96 * error))
        metrics[f"{task}_samples"] = float(results["n-samples"][task]["effective"])
    return Measured(metrics, intervals=intervals)


def write_cloze(
    documents: Sequence[Document], folder: Path, *, name: str = "cloze", choices: int = 4, items: int = 500,
    shortest: int = 20, seed: int = 0,
) -> Path:  # fmt: skip
    """Write an lm-eval task, `name.yaml` and `name.jsonl`: which of some sentences is a document's next.

    A sentence ends at a full stop, question or exclamation mark, or where its line does. The others are sentences of
    other documents, by preference as long as the true one. One item a document, at most `items`; each choice has the
    white space before the true sentence. Returns the YAML's path.
    """
    if choices < 2 or items < 1:
        raise PretrainError(f"write_cloze: choices {choices}, items {items}: accepted: 2 and 1 or more")
    rng = np.random.default_rng(seed)
    spans = [_sentences(d["text"], shortest) for d in documents]
    pool = [(i, d["text"][a:b]) for i, d in enumerate(documents) for a, b in spans[i]]
    rows = []
    for i in rng.permutation(len(documents)):
        text = documents[i]["text"]
        later = [span for span in spans[i] if text[: span[0]].strip()]
        if not later:
            continue
        start, end = later[int(rng.integers(len(later)))]
        before = text[:start].rstrip()
        true, space = text[start:end], text[len(before) : start]
        drawn = [pool[k] for k in rng.permutation(len(pool))[: 20 * choices]]
        others = list(dict.fromkeys(sentence for j, sentence in drawn if j != i and sentence not in text))
        others = sorted(others, key=lambda sentence: abs(len(sentence) - len(true)))[: choices - 1]
        if len(others) < choices - 1:
            continue
        gold = int(rng.integers(choices))
        shown = [*others[:gold], true, *others[gold:]]
        row = {"query": before[-CONTEXT:], "choices": [space + choice for choice in shown], "gold": gold}
        rows.append(row | {"domain": documents[i].get("domain", "text")})
        if len(rows) == items:
            break
    if not rows:
        raise PretrainError(
            f"write_cloze: {len(documents)} documents give no item; accepted: {choices} documents or more, one of them "
            f"with two sentences, of {shortest} characters or more"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {name}.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: query\ndoc_to_choice: choices\n"
        "doc_to_target: gold\ntarget_delimiter: ''\nmetric_list:\n"
        "  - metric: acc\n  - metric: acc_norm\nmetadata:\n  version: 1\n",
        encoding="utf-8",
    )
    return path


def _sentences(text: str, shortest: int) -> list[tuple[int, int]]:
    """Where its sentences of `shortest` characters or more begin and end."""
    matches = re.finditer(r"\S.*?(?:[.!?](?=\s)|$)", text, re.MULTILINE)
    return [match.span() for match in matches if len(match[0]) >= shortest]


@contextmanager
def _offline() -> Iterator[None]:
    """The hub is not asked, whatever was set before."""
    before = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
