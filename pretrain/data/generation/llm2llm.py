"""LLM2LLM: of the seed examples that a student gets wrong, a teacher writes more."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from pretrain.core import checkpoint
from pretrain.core.batch import Context, Example, Vocabulary
from pretrain.core.bounds import Count, NonNegative, PositiveShare, Whole
from pretrain.core.checkpoint import lineage
from pretrain.core.encoding import Encoder
from pretrain.core.errors import PretrainError
from pretrain.core.files import JSONObject, digest
from pretrain.core.folders import checkpoint_of, corpus_of
from pretrain.core.hardware import pick_device
from pretrain.core.meter import count_flops
from pretrain.core.method import InnerObjective, Ref
from pretrain.core.models.heads import labels_of
from pretrain.corpus.store import Corpus
from pretrain.data._answers import Answer
from pretrain.data._columns import check_columns, check_filled
from pretrain.data._generating import Generating, Prompt, filled, read_prompts
from pretrain.data._work import Desk, desk, stamps
from pretrain.data.generation._rouge import Words, alike

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from pretrain.objectives.labelled import FineTuning

ROUND = "llm2llm_round"  # the column that tells seeds (0) from what the rounds have added
SHARD = 256  # documents that the student answers at once
_ITEM = re.compile(r"(?:^|\n)\s*\d{1,2}\.\s+Question:")
_ANSWER = re.compile(r"\bAnswer:")
Document = dict[str, object]


@dataclass(frozen=True)
class LLM2LLM(Generating):
    """LLM2LLM: Boosting LLMs with Novel Iterative Data Enhancement (arXiv:2403.15042).

    One round: the `student`, tuned on this corpus by the labelled `task`, answers its seed examples, and for each that
    it gets wrong the teacher (`generator` or `server`) writes `per_seed` new ones like it, which stand after it. Errors
    are taken from the seeds alone, never from what a teacher wrote: the column `llm2llm_round` is 0 of seeds, and the
    number of the round of what was added. Tune a fresh copy of the model on the result, give it to the next round as
    `student`, and so on (10 rounds in the authors' configuration, 3 epochs each; recipes/papers/llm2llm.yaml). Of the
    task's columns one is read and one is the answer.

    An answer of the teacher is read as numbered questions with answers; left out are those without both, of classes
    those whose answer is none of the labels, and those whose question has a ROUGE-L above `rouge` to an example that
    is there (the authors look at the wrong seeds and the round's own). A seed with too few is asked for again, up to
    `attempts` times. A student's free answer is wrong where it is not the true one; with `compared` where what
    its first group finds in both is neither the same number nor the same text (GSM8K's: `#+ (.*)`).

    For trials without a teacher, `pool` is a corpus of other examples of the task: for each wrong seed the nearest one
    with the same answer, by words in common, is taken. `seeds: any` takes as many seeds by chance as are wrong.
    """

    adds: ClassVar[tuple[str, ...]] = (ROUND,)

    student: Ref = ""
    task: InnerObjective = "classification"
    per_seed: Count = 1
    rouge: PositiveShare = 0.95
    attempts: Count = 5
    compared: str = ""
    seeds: Literal["wrong", "any"] = "wrong"
    pool: Ref = ""
    length: Whole = 0
    max_new_tokens: Count = 2048
    temperature: NonNegative = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.student:
            raise PretrainError("llm2llm: student '': accepted: a checkpoint that was tuned on it", place=("student",))
        if not hasattr(self.objective, "predict") or len(self.objective.columns) != 2:
            raise PretrainError(
                f"llm2llm: task {self.objective.name!r}: accepted: one that learns from labels, of one column and its "
                "answer", place=("task",),
            )  # fmt: skip
        for name in ("domain", "only"):
            if getattr(self, name):
                raise PretrainError(f"llm2llm: {name} {getattr(self, name)!r}: accepted: none", place=(name,))
        try:
            groups = re.compile(self.compared).groups
        except re.error as error:
            raise PretrainError(f"llm2llm: compared {self.compared!r}: {error}", place=("compared",)) from error
        if self.compared and not groups:
            raise PretrainError(
                f"llm2llm: compared {self.compared!r}: accepted: a regular expression with a group", place=("compared",)
            )

    def _check_writer(self) -> None:
        if not self.pool:
            super()._check_writer()
        elif self.generator or self.server:
            raise PretrainError("llm2llm: pool: accepted: without a generator and a server", place=("pool",))

    @cached_property
    def objective(self) -> FineTuning[object]:
        """What the student learnt."""
        return self.held()["task"]

    @cached_property
    def template(self) -> Prompt:
        """What the teacher is asked."""
        shipped = Path(__file__).with_suffix(".yaml")
        return read_prompts(self.name, self.prompts, shipped, ("similar",), ("text", "target"))["similar"]

    def fault(self, answer: Answer, prompt: Prompt, text: str | None, final: bool = True) -> str:
        """Why an answer is not used; what is like an example is told question by question."""
        return super().fault(answer, prompt, text, False)

    def __call__(self, corpus: Dataset) -> Dataset:
        """Each document, and after a seed what was written for its sake."""
        import datasets

        check_columns(self.name, corpus, self.objective.columns)
        documents: list[Document] = corpus.to_list()
        for number, document in enumerate(documents):
            check_filled(self.name, number, document, self.objective.columns)
        rounds = [int(str(document.get(ROUND) or 0)) for document in documents]
        seeds = [number for number, earlier in enumerate(rounds) if not earlier]
        now = 1 + max(rounds, default=0)
        with desk() as here:
            wrong = self.wrong([documents[number] for number in seeds], here)
            meant = [seed for seed, chosen in zip(seeds, self._chosen(wrong), strict=True) if chosen]
            counts: dict[str, object] = {"seeds": len(seeds), "wrong": sum(wrong), "round": now}
            made, facts = (self._pooled if self.pool else self._taught)(documents, meant, here)
            here.reports.append({"method": self.name, **counts, **facts, "added": sum(map(len, made.values()))})
        rows = []
        for number, document in enumerate(documents):
            rows.append(document | {ROUND: rounds[number]})
            for each, (text, target) in enumerate(made.get(number, ())):
                *_, read, answer = self.objective.columns
                new = {read: text, answer: target, ROUND: now}
                new |= {"id": f"{document['id']}#llm2llm-{now}-{each}"} if "id" in document else {}
                rows.append(document | new)
        features = datasets.Features({**corpus.features, ROUND: datasets.Value("int64")})
        columns = {name: [row[name] for row in rows] for name in features}
        return datasets.Dataset.from_dict(columns, features=features)

    def _chosen(self, wrong: Sequence[bool]) -> list[bool]:
        if self.seeds == "wrong":
            return list(wrong)
        drawn = np.random.default_rng(self.seed).permutation(len(wrong))[: sum(wrong)]
        return [number in {*drawn.tolist()} for number in range(len(wrong))]

    def wrong(self, documents: Sequence[Document], here: Desk) -> list[bool]:
        """Which documents the student answers otherwise than they do; what is on the desk is not asked again."""
        path = checkpoint_of(Path(self.student))
        length = self.length or lineage(path).get("length") or 512
        opened: list[tuple[PreTrainedModel, Context]] = []
        answers: list[bool] = []
        for start in range(0, len(documents), SHARD):
            shard = [{n: document[n] for n in self.objective.columns} for document in documents[start : start + SHARD]]

            def work(shard: Sequence[Document] = shard) -> JSONObject:
                if not opened:
                    opened.append(_opened(path, int(length)))
                judged, flops = count_flops(lambda: self._judged(*opened[0], shard))
                return {"wrong": judged, "flops": flops}

            key = [str(path.resolve()), stamps(path), length, asdict(self.objective), self.compared, shard]
            answers += here.kept(digest(key)[:32], work)["wrong"]
        return answers

    def _judged(self, model: PreTrainedModel, context: Context, documents: Sequence[Document]) -> list[bool]:
        examples = [Example(document, 0, number) for number, document in enumerate(documents)]
        answers = self.objective.predictions(model, examples, context)
        true = self.objective.expected(examples, context)
        return [not self.same(first, second) for first, second in zip(answers, true, strict=True)]

    def same(self, answer: object, true: object) -> bool:
        """Whether an answer is the true one; of free answers what `compared` finds, numbers as numbers."""
        if not isinstance(answer, str) or not isinstance(true, str) or self.objective.classes([true]):
            return answer == true
        first, second = (self._compared(text) for text in (answer, true))
        if first is None or second is None:
            return first == second
        numbers = [_number(text) for text in (first, second) if self.compared]
        if numbers and None not in numbers:
            return numbers[0] == numbers[1]
        return first.lower().replace(",", "").strip() == second.lower().replace(",", "").strip()

    def _compared(self, text: str) -> str | None:
        match = re.search(self.compared, text) if self.compared else None
        return match[1] if match else None if self.compared else text

    def _taught(
        self, documents: Sequence[Document], meant: Sequence[int], here: Desk
    ) -> tuple[dict[int, list[tuple[str, object]]], dict[str, object]]:
        """What the teacher writes for seeds, by their numbers."""
        asking = self.asking(here)
        known = [Words.of(str(document[self.objective.columns[0]])) for document in documents]
        labels = self._labels(documents)
        made: dict[int, list[tuple[str, object]]] = {number: [] for number in meant}
        left: Counter[str] = Counter()
        for attempt in range(self.attempts if self.temperature > 0 else 1):
            open_seeds = [number for number in meant if len(made[number]) < self.per_seed]
            for number, answer in asking.texts(self._asked(documents, open_seeds, attempt)):
                for text, target in questions(answer):
                    words = Words.of(text)
                    reason = "" if not labels or target in labels else "no label of the task"
                    reason = reason or ("too alike" if alike(words, known, self.rouge) else "")
                    if reason:
                        left[reason] += 1
                    elif len(made[number]) < self.per_seed:
                        known.append(words)
                        made[number].append((text, labels.get(target, target)))
        facts: dict[str, object] = {
            "asked": asking.asked, "used": asking.used, "dropped": dict(sorted(asking.dropped.items())),
            "prompt_tokens": asking.prompt_tokens, "new_tokens": asking.new_tokens, "left": dict(sorted(left.items())),
            "examples": asking.examples, "left_out": asking.left_out,
        }  # fmt: skip
        return made, facts

    def _asked(self, documents: Sequence[Document], seeds: Sequence[int], attempt: int) -> Iterator[tuple[int, Prompt]]:
        text, target = self.objective.columns
        for number in seeds:
            values = {"text": str(documents[number][text]), "target": str(documents[number][target])}
            prompt = filled(self.template, values | {"number": str(min(10, self.per_seed + attempt))})
            yield number, prompt._replace(number=attempt)

    def _labels(self, documents: Sequence[Document]) -> Mapping[str, object]:
        """The labels of a task of classes, as they are written and as they stand in the corpus."""
        values = {document[self.objective.columns[1]] for document in documents}
        return {str(value): value for value in values} if self.objective.classes(["a"]) else {}

    def _pooled(
        self, documents: Sequence[Document], meant: Sequence[int], here: Desk
    ) -> tuple[dict[int, list[tuple[str, object]]], dict[str, object]]:
        """In a teacher's place the nearest of other examples with the same answer; none is taken twice."""
        text, target = self.objective.columns
        known = [Words.of(str(document[text])) for document in documents]
        pool = Corpus(corpus_of(Path(self.pool))).split("train").select_columns([text, target]).to_list()
        words = [Words.of(str(each[text])) for each in pool]
        free = {n for n, each in enumerate(words) if not alike(each, known, self.rouge)}
        made: dict[int, list[tuple[str, object]]] = {}
        for number in meant:
            like = [n for n in sorted(free) if pool[n][target] == documents[number][target]]
            like.sort(key=lambda n: -words[n].shared(known[number]))
            made[number] = [(pool[n][text], pool[n][target]) for n in like[: self.per_seed]]
            free -= {*like[: self.per_seed]}
        return made, {"pool": len(pool)}


def questions(answer: str) -> list[tuple[str, str]]:
    """The questions and answers of a teacher's text, `1. Question: … Answer: …`; those without both are left out."""
    made = []
    for item in _ITEM.split(f"\n{answer}")[1:]:
        parts = _ANSWER.split(item)
        if len(parts) == 2 and all(part.strip() for part in parts):
            made.append((parts[0].strip(), parts[1].strip()))
    return made


def _number(text: str) -> float | None:
    try:
        return float("".join(letter for letter in text if letter.isdigit() or letter == "."))
    except ValueError:
        return None


def _opened(path: Path, length: int) -> tuple[PreTrainedModel, Context]:
    model, tokenizer = checkpoint.load(path, device=pick_device())
    if tokenizer is None:
        raise PretrainError(f"{path} has no tokenizer; accepted: a checkpoint that holds one")
    context = Context(
        Vocabulary.of(tokenizer), length, np.random.default_rng(0), encoder=Encoder(tokenizer), labels=labels_of(model)
    )
    return model, context
