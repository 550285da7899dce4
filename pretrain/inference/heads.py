"""What a checkpoint's head predicts, and how: a class, several, a number, a tag a word, an answer.

Shape letters: B texts, L tokens, C classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from pretrain.core import checkpoint
from pretrain.core.batch import Batch, Context, Example, Vocabulary, to_device
from pretrain.core.encoding import Encoder, encoded, text_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import at, in_table, is_causal
from pretrain.core.models.features import evaluating
from pretrain.core.models.heads import LOGARITHMS, labels_of
from pretrain.core.processors import Processor, tokenizer_in
from pretrain.core.quick.positions import positions
from pretrain.corpus.sources import Document
from pretrain.inference.beforehand import no_answers, no_labels
from pretrain.objectives._fine_tuning import classified, read
from pretrain.objectives._metrics import entities
from pretrain.objectives.efficiency.deft import Deft
from pretrain.objectives.labelled import FineTuning
from pretrain.objectives.labelled.prompt_classification import PromptClassification
from pretrain.objectives.labelled.seq2seq import Seq2Seq
from pretrain.objectives.labelled.smart import Smart
from pretrain.objectives.labelled.tagging import Tagging
from pretrain.stages import build_method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 512  # tokens of a text, where the checkpoint does not say what it was trained at
ANSWER = 64  # tokens of an answer
HALF = 0.5  # a label of several is given from this probability on
Predicted: TypeAlias = dict[str, object]  # the columns that are added to a row


@dataclass(frozen=True)
class Head:
    """A model that is ready to predict. `kind` is single, several, number, tags, answer or words (of a prompt)."""

    kind: str
    model: PreTrainedModel
    context: Context
    objective: FineTuning[object] | None  # that the checkpoint was trained with, where it is known
    text: str
    pair: str | None = None
    scores: bool = False  # every label's
    answer: int = ANSWER
    ours: bool = True  # trained here; what was elsewhere has its texts framed as its tokenizer does it
    tally: Counter[str] = field(default_factory=Counter)  # `cut`: texts of more tokens than are read

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of text that it reads."""
        if self.kind in ("answer", "words") and isinstance(self.objective, Seq2Seq | PromptClassification):
            names = self.objective.columns[:-1]
            return tuple(dict.fromkeys(self.text if name == "text" else name for name in names))
        return (self.text, self.pair) if self.pair else (self.text,)

    @property
    def adds(self) -> tuple[str, ...]:
        """The columns that it adds."""
        names = {"single": ("label", "score"), "several": ("labels", "scores"), "number": ("value",), "tags": ("tags",),
                 "answer": ("prediction",), "words": ("label",)}[self.kind]  # fmt: skip
        return (*names, "scores") if self.kind == "single" and self.scores else names


def head_of(
    folder: Path, model: PreTrainedModel, processor: Processor, *, text: str = "text", pair: str | None = None,
    scores: bool = False, answer: int | None = None,
) -> Head:  # fmt: skip
    """How the checkpoint of a folder predicts. Raises `PretrainError` for one that only continues text."""
    tokenizer, lineage = tokenizer_in(processor), checkpoint.lineage(folder)
    if tokenizer is None:
        raise PretrainError(f"{folder} has a {type(processor).__name__}; accepted: a checkpoint that reads text")
    objective = _objective(lineage.get("objective"))
    kind = kind_of(model, objective)
    if kind is None:
        raise PretrainError(no_answers(folder, type(model).__name__))
    length = int(lineage.get("length") or LENGTH)
    length = min(length, positions(model.config.to_dict()) or length)
    context = Context(
        Vocabulary.of(tokenizer), length, np.random.default_rng(0), encoder=Encoder(tokenizer),
        labels=labels_of(model), predicting=True,
    )  # fmt: skip
    if pair and objective is not None and not getattr(objective, "pair", None):
        raise PretrainError(f"--pair {pair}: {folder} was trained on single texts; accepted: no --pair")
    pair = pair or getattr(objective, "pair", None)
    trained = objective.answer if isinstance(objective, Seq2Seq) else ANSWER
    if model.config.pad_token_id is None:  # by which a causal model finds a text's last token
        model.config.pad_token_id = context.vocabulary.pad
    return Head(kind, model, context, objective, text, pair, scores, answer or trained, ours="made_by" in lineage)


def kind_of(model: PreTrainedModel, objective: object = None) -> str | None:
    """What a model predicts; None of one that only continues or fills in text."""
    config, name = model.config, type(model).__name__
    if name.endswith("ForTokenClassification"):
        return "tags"
    if name.endswith("ForSequenceClassification"):
        if config.problem_type == "multi_label_classification":
            return "several"
        return "number" if config.problem_type == "regression" or len(labels_of(model)) == 1 else "single"
    if isinstance(objective, PromptClassification):
        return "words"
    return "answer" if isinstance(objective, Seq2Seq) or config.is_encoder_decoder else None


def _objective(fields: Mapping[str, object] | None) -> FineTuning[object] | None:
    """The objective that a checkpoint was trained with, as its lineage has it; of a later version None."""
    try:
        made = build_method(dict(fields), "objective") if fields else None
    except (ValueError, PretrainError):
        return None
    made = made.wrapped if isinstance(made, Deft | Smart) else made
    return made if isinstance(made, FineTuning) else None


def predict_batch(head: Head, documents: Sequence[Document]) -> list[Predicted]:
    """What the model says of some documents, in their order."""
    with evaluating(head.model):
        return _PREDICT[head.kind](head, documents)


def _examples(documents: Sequence[Document]) -> list[Example]:
    return [Example(document, 0, number) for number, document in enumerate(documents)]


def _on(head: Head, batch: Batch) -> Batch:
    return to_device(batch, head.model.device)


def _logits(head: Head, documents: Sequence[Document]) -> torch.Tensor:
    if head.ours:
        with _counting(head) as context:
            batch = read(_examples(documents), head.text, head.pair, context)
    else:
        batch = _by_tokenizer(head, documents)
    return classified(head.model, _on(head, batch)).float()


@contextmanager
def _counting(head: Head) -> Iterator[Context]:
    """The context to prepare a batch in; texts that are cut in it are counted."""
    context = replace(head.context, cut=set())
    yield context
    head.tally["cut"] += len(context.cut)


def _by_tokenizer(head: Head, documents: Sequence[Document]) -> Batch:
    """`tokens_BL`, `mask_BL` and `segment_BL` as the tokenizer frames a text, or a pair, by itself."""
    assert head.context.encoder is not None, "a head of text has an encoder"
    tokenizer, second = head.context.encoder.tokenizer, head.pair
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [str(document[head.text]) for document in documents]
    seconds = [str(document[second]) for document in documents] if second else None
    inputs = encoded(
        tokenizer, texts, seconds, truncation=True, max_length=head.context.length, padding=True,
        padding_side="right", split_special_tokens=True, return_tensors="pt",
    )  # fmt: skip
    _count_cut(head, inputs["attention_mask"], texts, seconds)
    ids_BL, mask_BL = inputs["input_ids"], inputs["attention_mask"]
    return {
        "tokens_BL": ids_BL,
        "mask_BL": mask_BL,
        "segment_BL": inputs.get("token_type_ids", torch.zeros_like(ids_BL)),
    }


def _count_cut(head: Head, mask_BL: torch.Tensor, texts: Sequence[str], seconds: Sequence[str] | None = None) -> None:
    """Count the texts that a tokenizer of elsewhere has cut: of those that fill the length the ones that are longer."""
    assert head.context.encoder is not None, "a head of text has an encoder"
    full = (mask_BL.sum(1) >= head.context.length).nonzero().flatten().tolist()
    chosen, others = ([each[b] for b in full] if each is not None else None for each in (texts, seconds))
    if chosen:
        whole = encoded(head.context.encoder.tokenizer, chosen, others, truncation=False, split_special_tokens=True)
        head.tally["cut"] += sum(len(ids) > head.context.length for ids in whole["input_ids"])


def _single(head: Head, documents: Sequence[Document]) -> list[Predicted]:
    names, p_BC = labels_of(head.model), _logits(head, documents).softmax(-1).tolist()
    rows: list[Predicted] = []
    for p_C in p_BC:
        best = max(range(len(names)), key=lambda c: p_C[c])
        every = {"scores": dict(zip(names, map(_rounded, p_C), strict=True))} if head.scores else {}
        rows.append({"label": names[best], "score": _rounded(p_C[best])} | every)
    return rows


def _several(head: Head, documents: Sequence[Document]) -> list[Predicted]:
    names, p_BC = labels_of(head.model), _logits(head, documents).sigmoid().tolist()
    return [
        {
            "labels": [name for name, p in zip(names, p_C, strict=True) if p >= HALF],
            "scores": dict(zip(names, map(_rounded, p_C), strict=True)),
        }
        for p_C in p_BC
    ]


def _number(head: Head, documents: Sequence[Document]) -> list[Predicted]:
    output_BC = _logits(head, documents)
    rows = (output_BC.exp() if getattr(head.model.config, LOGARITHMS, False) else output_BC).tolist()
    return [{"value": _rounded(values[0]) if len(values) == 1 else list(map(_rounded, values))} for values in rows]


def _rounded(value: float) -> float:
    """Six digits: float32 has hardly more, and batches of another shape another last one."""
    return float(f"{value:.6g}")


def _tags(head: Head, documents: Sequence[Document]) -> list[Predicted]:
    names, known = labels_of(head.model), head.objective if isinstance(head.objective, Tagging) else Tagging()
    tagger = replace(known, text=head.text, tags="")
    blank = [document | {"": [names[0]] * len(str(document[head.text]).split())} for document in documents]
    with _counting(head) as context:
        batch = tagger.prepare(_examples(blank), context)
    answers = tagger.predict(head.model, _on(head, batch), head.context)
    return [{"tags": spans(str(d[head.text]), tags)} for d, tags in zip(documents, answers, strict=True)]


def spans(text: str, tags: Sequence[str]) -> list[dict[str, str | int]]:
    """The entities of BIO tags, or else each word with its tag, by the characters `[start, end)` of the text."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    if all(tag == "O" or tag[:2] in ("B-", "I-") for tag in tags):
        places = [
            (kind, words[first][0], words[end - 1][1])
            for kind, first, end in sorted(entities(tags), key=lambda e: e[1])
        ]
    else:
        places = [(tag, *word) for tag, word in zip(tags, words, strict=True)]
    return [{"tag": tag, "start": start, "end": end, "text": text[start:end]} for tag, start, end in places]


def _named(head: Head, document: Document) -> Document:
    """The document with its text under the name that prompts have for it."""
    return document | ({"text": document[head.text]} if head.text in document else {})


def _answer(head: Head, documents: Sequence[Document]) -> list[Predicted]:
    objective = head.objective if isinstance(head.objective, Seq2Seq) else Seq2Seq(prompt="{text}")
    if not in_table(head.model):
        return [{"prediction": answer} for answer in _generated(head, documents)]
    objective = replace(objective, answer=head.answer)
    given = [_named(head, document) | {objective.target: ""} for document in documents]
    with _counting(head) as context:
        batch = objective.prepare(_examples(given), context)
    answers = objective.predict(head.model, _on(head, batch), head.context)
    return [{"prediction": answer} for answer in answers]


def _generated(head: Head, documents: Sequence[Document]) -> list[str]:
    """Greedy answers of an encoder-decoder of a family that is not known here, by its own `generate`."""
    assert head.context.encoder is not None, "a head of text has an encoder"
    tokenizer = head.context.encoder.tokenizer
    texts = [str(document[head.text]) for document in documents]
    inputs = encoded(
        tokenizer, texts, truncation=True, max_length=head.context.length, padding=True, split_special_tokens=True,
        return_tensors="pt",
    ).to(head.model.device)  # fmt: skip
    _count_cut(head, inputs["attention_mask"], texts)
    inputs.pop("token_type_ids", None)
    made = at(head.model, "generate")(**inputs, max_new_tokens=head.answer, do_sample=False, num_beams=1)
    return [text_of(tokenizer, ids, skip_special_tokens=True).strip() for ids in made.tolist()]


def _words(head: Head, documents: Sequence[Document]) -> list[Predicted]:
    objective = head.objective
    assert isinstance(objective, PromptClassification)
    given = [_named(head, document) | {objective.label: None} for document in documents]
    with _counting(head) as context:
        batch = objective.prepare(_examples(given), context)
    return [{"label": label} for label in objective.predict(head.model, _on(head, batch), head.context)]


_PREDICT: dict[str, Callable[[Head, Sequence[Document]], list[Predicted]]] = {
    "single": _single, "several": _several, "number": _number, "tags": _tags, "answer": _answer, "words": _words,
}  # fmt: skip


METHODS = {"single": "classification", "number": "regression", "tags": "tagging", "answer": "seq2seq"}


def evaluation_for(
    model: PreTrainedModel, lineage: Mapping[str, object], label: str | None = None, pair: str | None = None
) -> str | dict[str, object]:
    """The evaluation that fits a checkpoint's head, as a recipe names it; `label` is the column of what is true."""
    trained = lineage.get("objective")
    objective = _objective(trained) if isinstance(trained, Mapping) else None
    kind = kind_of(model, objective)
    if kind is None:
        if label is not None:
            raise PretrainError(no_labels(label, type(model).__name__))
        if not is_causal(model):
            raise PretrainError(
                f"a {type(model).__name__}: no evaluation is chosen for it by itself; accepted: --evaluation, for "
                "example {method: probe, label: COLUMN}"
            )
        return "held_out"
    if kind == "several":
        raise PretrainError(
            f"a {type(model).__name__} of several labels a text is measured on a file: pretrain evaluate CHECKPOINT "
            "--data FILE; accepted here: another evaluation"
        )
    method = METHODS.get(kind, "prompt_classification")
    known = asdict(objective) if objective is not None and objective.name == method else {}
    if getattr(model.config, LOGARITHMS, False):
        known["log"] = True
    given = {{"tags": "tags", "answer": "target"}.get(kind, "label"): label, "pair": pair}
    chosen = {"method": method} | known | {name: value for name, value in given.items() if value is not None}
    return {"method": "task", "objective": chosen}
