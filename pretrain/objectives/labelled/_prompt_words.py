"""The search for a prompt's label words (*Making Pre-trained Language Models Better Few-shot Learners*, section 5.1).

Shape letters: N examples, C classes, K candidates of a class, M assignments, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.core.batch import Context, Example, to_device
from pretrain.core.encoding import text_of
from pretrain.core.errors import PretrainError
from pretrain.core.models.families import head
from pretrain.core.models.features import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pretrain.objectives.labelled.prompt_classification import PromptClassification

MOST = 1_000_000  # assignments that are tried
BATCH = 32


def choose_words(
    model: PreTrainedModel, objective: PromptClassification, examples: Sequence[Example], context: Context, *,
    likely: int = 100, best: int = 100,
) -> list[tuple[float, dict[str, str]]]:  # fmt: skip
    """The `best` assignments of words to the objective's labels, each after its accuracy on the examples.

    A class's candidates are the `likely` words v with the highest sum of log p(v at the hole | x) over its examples x;
    all assignments of candidates to classes are ranked by the accuracy of the untrained model, equal ones by these
    sums. The paper then tunes with each and takes the best on held-out examples. The objective's own words are not
    read.
    """
    labels = tuple(objective.word_of)
    class_N = np.array([objective._number(example.columns[objective.label]) for example in examples])
    missing = [label for number, label in enumerate(labels) if number not in class_N]
    if missing or likely ** len(labels) > MOST:
        raise PretrainError(
            f"choose_words: likely {likely}, no examples of {missing}: accepted: examples of all {len(labels)} "
            f"classes, likely to the power of their number at most {MOST:,}"
        )
    log_NV = _log_probabilities(model, objective, examples, context).numpy()
    words = _words(objective, context, log_NV.shape[1])
    ids = np.array(list(words))
    sum_CV = np.stack([log_NV[class_N == number].sum(0) for number in range(len(labels))])
    chosen = [ids[np.argsort(-sums[ids], kind="stable")[:likely]] for sums in sum_CV]
    id_MC = np.stack(np.meshgrid(*chosen, indexing="ij"), -1).reshape(-1, len(labels))
    id_MC = id_MC[[len(set(row)) == len(row) for row in id_MC.tolist()]]
    right_M = np.concatenate([
        (log_NV[:, part].argmax(-1) == class_N[:, None]).mean(0)
        for part in np.array_split(id_MC, 1 + len(id_MC) // 4096)
    ])  # fmt: skip
    sum_M = sum_CV[np.arange(len(labels)), id_MC].sum(-1)
    order = np.lexsort((-sum_M, -right_M))[:best]
    entries = [dict(zip(labels, (words[i] for i in row), strict=True)) for row in id_MC[order].tolist()]
    return list(zip(right_M[order].tolist(), entries, strict=True))


def _log_probabilities(
    model: PreTrainedModel, objective: PromptClassification, examples: Sequence[Example], context: Context
) -> Tensor:
    """`log_NV`: of all tokens at each example's hole."""
    size = len(head(model)[0])
    bare = replace(objective, demonstrations=False)
    entries = []
    with evaluating(model):
        for start in range(0, len(examples), BATCH):
            batch = bare.rendered(examples[start : start + BATCH], context) | {"word_C": torch.arange(size)}
            entries.append(bare.logits(model, to_device(batch, model.device)).float().log_softmax(-1).cpu())
    return torch.cat(entries)


def _words(objective: PromptClassification, context: Context, size: int) -> dict[int, str]:
    """The tokens that a word of letters in the hole becomes, alone, and the words."""
    assert context.encoder is not None, "examples come with an encoder"
    known: NDArray[np.int64] = np.flatnonzero(~context.vocabulary.special_V[:size])
    texts = [text_of(context.encoder.tokenizer, [int(i)]) for i in known]
    space = " " * objective.spaced
    words = {int(i): text.strip() for i, text in zip(known, texts, strict=True) if text.strip().isalpha()}
    again = context.encoder.ids([space + word for word in words.values()])
    return {i: word for (i, word), ids in zip(words.items(), again, strict=True) if ids == [i]}
