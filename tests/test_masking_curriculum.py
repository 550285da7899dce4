"""BIOptimus' curriculum: each phase is the masked language modelling that its row of the table says, one after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.core.batch import Context, Row, Vocabulary
from pretrain.core.errors import PretrainError
from pretrain.corpus.tokenizers import train_tokenizer
from pretrain.objectives.language.masked_lm import MaskedLM
from pretrain.objectives.language.masking_curriculum import MaskingCurriculum

TABLE = [  # of the paper: rate, whole words, corruption
    MaskedLM(rate=0.15),
    MaskedLM(rate=0.15, whole_words=True),
    MaskedLM(rate=0.2, whole_words=True),
    MaskedLM(rate=0.2, whole_words=True, masked=1.0, random=0.0),
]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.of(
        train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 5, vocab_size=290, mask=True)
    )


def context(vocabulary, progress):
    return Context(vocabulary, 32, np.random.default_rng(7), progress)


@pytest.mark.parametrize(
    ("progress", "phase"), [(0.0, 0), (0.249, 0), (0.25, 1), (0.5, 2), (0.74, 2), (0.75, 3), (1.0, 3)]
)
def test_each_quarter_masks_as_the_papers_table_says(vocabulary, progress, phase):
    drawn_BL = np.random.default_rng(0).integers(5, vocabulary.size, (3, 32)).astype(np.int32)
    rows = [Row(tokens_L, np.array([0], np.int32), np.array([0]), 0, 0) for tokens_L in drawn_BL]
    wanted = TABLE[phase].prepare(rows, context(vocabulary, progress))
    found = MaskingCurriculum().prepare(rows, context(vocabulary, progress))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted if isinstance(wanted[name], torch.Tensor))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 1000))
def test_phases_follow_one_another_and_last_as_long_as_their_parts_say(shares, passed):
    count, progress = len(shares), passed / 1000
    rates = tuple(0.1 * (n + 1) for n in range(count))
    objective = MaskingCurriculum(rates, (False,) * count, (True,) * count, tuple(shares))
    number = objective.phases.index(objective.phase(progress))
    begins = sum(shares[:number]) / sum(shares)
    ends = sum(shares[: number + 1]) / sum(shares)
    assert begins - 1e-9 <= progress and (progress <= ends + 1e-9 or number == count - 1)
    assert min(rates) - 1e-9 <= objective.predicted <= max(rates) + 1e-9


def test_phases_of_which_something_is_not_said_are_refused():
    with pytest.raises(PretrainError, match="masking_curriculum: shares: 4 phases: accepted: 2, as of rates"):
        MaskingCurriculum((0.1, 0.2), (True, False), (True, False))
    with pytest.raises(PretrainError, match="one for each phase"):
        MaskingCurriculum((), (), (), ())
