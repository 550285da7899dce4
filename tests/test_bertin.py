"""Perplexity sampling: the n-gram model against its formula written out, the paper's weights, unseen halves."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.core.errors import PretrainError
from pretrain.corpus.store import write_corpus
from pretrain.data.selection._ngram import FALLBACK, NGram
from pretrain.data.selection._select import weighted
from pretrain.data.selection.bertin import Bertin

TEXTS = st.lists(st.lists(st.sampled_from("abcde\n"), max_size=14).map(" ".join), min_size=1, max_size=6)


class Plain:
    """Interpolated modified Kneser-Ney as Chen and Goodman write it, by dictionaries."""

    def __init__(self, texts, order):
        self.order, counts = order, [Counter() for _ in range(order + 1)]
        lines = [["<s>", *line.split(), "</s>"] for text in texts for line in text.split("\n")]
        for line in lines:
            for n in range(1, order + 1):
                counts[n].update(tuple(line[i : i + n]) for i in range(len(line) - n + 1))
        self.words = {w for line in lines for w in line} - {"<s>"} | {"<unk>"}
        self.adjusted = [Counter() for _ in range(order + 1)]
        for n in range(1, order + 1):
            for gram, count in counts[n].items():
                seen = {longer[0] for longer in counts[n + 1] if longer[1:] == gram} if n < order else None
                self.adjusted[n][gram] = count if n == order or gram[0] == "<s>" else len(seen)
        self.adjusted[1][("<s>",)] = 0
        self.discounts = [None] + [self.estimate(self.adjusted[n]) for n in range(1, order + 1)]

    @staticmethod
    def estimate(adjusted):
        n = [0] + [sum(c == k for c in adjusted.values()) for k in (1, 2, 3, 4)]
        if all(n[1:4]):
            y = n[1] / (n[1] + 2 * n[2])
            d = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
            if all(0 <= x <= k for k, x in enumerate(d, 1)):
                return [0, *d]
        return [0, *FALLBACK]

    def p(self, word, history):
        if not history:
            return self.smooth(word, (), 1 / len(self.words))
        return self.smooth(word, history, self.p(word, history[1:]))

    def smooth(self, word, history, lower):
        n = len(history) + 1
        after = {g: c for g, c in self.adjusted[n].items() if g[:-1] == history and c}
        if not after:
            return lower
        total, d = sum(after.values()), self.discounts[n]
        count = after.get((*history, word), 0)
        left = sum(d[min(c, 3)] for c in after.values())
        return (count - d[min(count, 3)]) / total + left / total * lower

    def log_p(self, text):
        found = []
        for line in text.split("\n"):
            words = ["<s>", *(w if w in self.words else "<unk>" for w in line.split()), "</s>"]
            found += [np.log(self.p(words[i], tuple(words[max(0, i - self.order + 1) : i]))) for i in range(1, len(words))]  # fmt: skip
        return sum(found), len(found)


@settings(max_examples=60)
@given(TEXTS, TEXTS, st.integers(1, 4))
def test_the_model_is_the_formula(train, asked, order):
    asked = [*asked, "a z b", ""]
    model, plain = NGram(train, order), Plain(train, order)
    log_N, count_N = model.log_probability(asked)
    wanted = [plain.log_p(text) for text in asked]
    assert log_N == pytest.approx([w[0] for w in wanted])
    assert count_N.tolist() == [w[1] for w in wanted]


@settings(max_examples=20)
@given(TEXTS, st.integers(1, 5), st.lists(st.sampled_from("abz"), max_size=3))
def test_what_may_come_next_sums_to_one(train, order, before):
    plain = Plain(train, order)
    history = ["<s>", *(w if w in plain.words else "<unk>" for w in before)]
    history = tuple(history[max(0, len(history) - order + 1) :]) if order > 1 else ()
    assert sum(plain.p(word, history) for word in plain.words) == pytest.approx(1)


def test_perplexity_is_over_words_and_ends_of_lines():
    model = NGram(["a b\na b c"], 3)
    log_N, count_N = model.log_probability(["a b\nc"])
    assert count_N.tolist() == [5]
    assert model.perplexity(["a b\nc"]) == pytest.approx(np.exp(-log_N / 5))


def test_counting_stops_after_the_words_that_were_asked_for():
    texts = ["a b c", "d e f", "g h i"]
    assert set(NGram(texts, 2, words=4).vocabulary) >= set("abcdef")
    assert "g" not in NGram(texts, 2, words=4).vocabulary


def test_the_weights_are_the_papers():
    x = np.arange(1.0, 10) ** 2
    q1, q2, q3 = np.quantile(x, (0.25, 0.5, 0.75))
    assert Bertin().weights(x) == pytest.approx(np.exp(-1 / (9 / 2) * ((x - q2) / q2) ** 2))
    stepwise = Bertin(sampling="stepwise").weights(x)
    spans = [q1 if v <= q1 else q2 - q1 if v <= q2 else q3 - q2 if v < q3 else 10 * q3 for v in x]
    assert stepwise == pytest.approx(1 / np.array(spans))
    assert (Bertin(sampling="random").weights(x) == 1).all()


@pytest.fixture(scope="module")
def mixed(stories):
    """Prose and code, one line over and over (boilerplate), and words in no order (noise)."""
    rng = np.random.default_rng(0)
    words = [w for s in stories for w in s["text"].split()]
    rows = [{"text": s["text"][:1500], "domain": "clean"} for s in stories]
    rows += [{"text": "all rights reserved by nobody\n" * (5 + i), "domain": "boilerplate"} for i in range(20)]
    rows += [{"text": " ".join(f"x{n}" for n in rng.integers(0, 10**9, 60)), "domain": "noise"} for _ in range(20)]
    assert len(words) > 1000
    order = rng.permutation(len(rows))
    return Dataset.from_list([rows[i] | {"number": n} for n, i in enumerate(order)])


def shares(corpus, kept):
    before, after = Counter(corpus["domain"][:]), Counter(kept["domain"][:])
    return {d: after[d] / before[d] for d in before}


def test_boilerplate_is_likelier_and_noise_less_likely_than_text(mixed):
    perplexity_N, domain_N = Bertin().perplexities(mixed), np.array(mixed["domain"][:])
    median = {d: np.median(perplexity_N[domain_N == d]) for d in ("clean", "boilerplate", "noise")}
    assert median["boilerplate"] < median["clean"] < median["noise"]


def test_the_middle_is_sampled_more_than_both_ends_where_quartiles_lie_as_in_the_paper():
    x = np.random.default_rng(0).lognormal(np.log(662247.5), 0.4, 40_000)
    quarter_N = np.searchsorted(np.quantile(x, (0.25, 0.5, 0.75)), x)
    for sampling in ("gaussian", "stepwise"):
        kept = weighted(Bertin(sampling=sampling).weights(x), 5000, seed=0)
        first, second, third, last = np.bincount(quarter_N[kept], minlength=4)
        assert min(second, third) > max(first, last)


@pytest.mark.parametrize("sampling", ["gaussian", "stepwise"])
def test_noise_is_sampled_less_than_text(mixed, sampling):
    kept = [shares(mixed, Bertin(share=0.3, sampling=sampling, seed=s)(mixed)) for s in range(8)]
    mean = {d: np.mean([k[d] for k in kept]) for d in kept[0]}
    assert mean["noise"] < mean["clean"]


@pytest.mark.parametrize("sampling", ["gaussian", "stepwise", "random"])
def test_the_share_is_kept_in_order_with_all_columns_and_the_same_each_time(mixed, sampling):
    method = Bertin(share=0.25, sampling=sampling)
    kept = method(mixed)
    chosen = kept["number"][:]
    assert len(chosen) == round(0.25 * len(mixed))
    assert chosen == sorted(set(chosen))
    assert kept.column_names == mixed.column_names
    assert method(mixed)["number"][:] == chosen
    assert Bertin(share=0.25, sampling=sampling, seed=1)(mixed)["number"][:] != chosen


def test_a_document_is_not_judged_by_a_model_that_saw_it():
    same = "one two three four five six seven eight"
    corpus = Dataset.from_list([{"text": same}, *({"text": f"w{i} v{i}"} for i in range(9))])
    seen = NGram(corpus["text"][:], 5).perplexity([same])[0]
    assert Bertin().perplexities(corpus)[0] > 3 * seen


def test_a_reference_corpus_judges_when_it_is_given(mixed, stories, tmp_path):
    write_corpus(stories, tmp_path / "clean", validation=0.1, test=0.1, near_duplicates=None)
    found = Bertin(reference=str(tmp_path / "clean")).perplexities(mixed)
    from pretrain.corpus.store import Corpus

    texts = [d["text"] for d in Corpus(tmp_path / "clean").documents("train")]
    assert found == pytest.approx(NGram(texts, 5).perplexity(mixed["text"][:]))


def test_a_reference_that_is_no_corpus_is_refused():
    with pytest.raises(PretrainError, match="is not a corpus"):
        Bertin(reference="/nowhere")(Dataset.from_dict({"text": ["a"]}))
