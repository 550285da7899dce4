"""How much better a model's answers become when it chooses among them itself.

Shape letters: P prompts, N generations of each, R resamples.
"""

from __future__ import annotations

import ast
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.core.batch import Vocabulary
from pretrain.core.bounds import Count, Ge, Positive, PositiveShare, ProperShare, Whole
from pretrain.core.encoding import encode, text_of
from pretrain.core.errors import PretrainError
from pretrain.core.generation.continuations import judge, sample
from pretrain.core.generation.settings import ends
from pretrain.core.models.families import positions_of
from pretrain.evaluation import Evaluation, Measured
from pretrain.evaluation._intervals import bounds, resampled_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pretrain.corpus.sources import Document

NAME = "generation_verification_gap"
QUESTION = "{prompt}{answer}\n\nIs the answer above correct? Answer yes or no.\nAnswer:"


@dataclass(frozen=True)
class GenerationVerificationGap(Evaluation):
    """Mind the Gap: Examining the Self-Improvement Capabilities of Large Language Models (arXiv:2412.02674).

    The model samples `generations` y of each prompt x and scores each itself: by `choice`, s = P(yes) / (P(yes) +
    P(no)) after `question`, or by `likelihood`, s the geometric mean of its tokens' probabilities. Weights w: 1 where s
    is at or above the `quantile` of the prompt's scores, else 0 (`filter`); or s^(1 / `beta`) (`reweight`). With the
    utility u, J = E_x mean_y u and J[w] = E_x sum_y w u / sum_y w: `gv_utility` is J, `gv_verified` J[w], `gv_gap`
    J[w] - J, `gv_relative_gap` (J[w] - J) / (1 - J), and `gv_prompt_relative_gap` the mean over prompts of that of each
    (0 where all generations are right already). `gv_kept` is the share of the generations that is kept, the effective
    share where they are reweighted; `gv_distinct` the share that is distinct. Utility: `exact`, the text up to `stop`
    is `answer`; `parses`, prompt and text are Python that `ast.parse` reads, an unfinished last line left out; nothing
    is run. Intervals: bootstrap over prompts.
    """

    estimated: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...]] = ("causal",)

    prompt: str = "prompt"
    answer: str = "answer"
    utility: Literal["exact", "parses"] = "exact"
    verifier: Literal["choice", "likelihood"] = "choice"
    weights: Literal["filter", "reweight"] = "filter"
    quantile: ProperShare = 0.8
    beta: Positive = 1.0
    generations: Annotated[int, Ge(2)] = 128
    max_new_tokens: Count = 512
    temperature: Positive = 0.7
    top_p: PositiveShare = 0.9
    stop: str = "\n"
    prompt_tokens: Whole = 0  # of a prompt, its first; 0: all
    question: str = QUESTION
    yes: str = " yes"
    no: str = " no"
    resamples: Whole = 1000
    seed: Whole = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        super().__post_init__()
        if self.verifier == "choice":
            if "{answer}" not in self.question:
                raise PretrainError(f"{NAME}: question {self.question!r}: accepted: a text with {{prompt}}, {{answer}}")
            if not self.yes or not self.no or self.yes == self.no:
                raise PretrainError(f"{NAME}: yes {self.yes!r}, no {self.no!r}: accepted: two texts")

    @property
    def columns(self) -> tuple[str, ...]:
        """The prompt's, and the answer's where it is needed."""
        return (self.prompt, self.answer) if self.utility == "exact" else (self.prompt,)

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
    ) -> Measured:
        """The metrics on documents with the prompt's and the answer's column."""
        chosen = [d for d in documents if all(d.get(c) is not None and str(d[c]).strip() for c in self.columns)]
        if not chosen:
            raise PretrainError(
                f"{NAME}: none of {len(documents)} documents has {' and '.join(map(repr, self.columns))}; "
                "accepted: columns with text"
            )
        vocabulary = Vocabulary.of(tokenizer)
        generator = torch.Generator().manual_seed(self.seed)
        rows = []
        for document in chosen:
            prompt, ids = self._prompt(model, tokenizer, vocabulary, document)
            made = sample(
                model, ids, self.generations, max_new_tokens=self.max_new_tokens, temperature=self.temperature,
                top_p=self.top_p, eos=ends(model, vocabulary), pad=vocabulary.pad, generator=generator,
            )  # fmt: skip
            texts = [text_of(tokenizer, continuation, skip_special_tokens=True) for continuation in made]
            right_N = np.array([self.useful(prompt, text, document.get(self.answer)) for text in texts], np.float64)
            score_N = self.scores(model, tokenizer, vocabulary, prompt, ids, made, texts)
            weight_N = self.weigh(score_N)
            verified, share = weight_N @ right_N, 1 / (weight_N**2).sum() / len(weight_N)
            rows.append([right_N.mean(), verified, share, len(set(map(self._cut, texts))) / len(texts)])
        values_P4 = np.array(rows)
        sums_R4 = resampled_sums(values_P4, self.resamples, self.seed)
        each_R = resampled_sums(relative(values_P4)[:, None], self.resamples, self.seed)[:, 0] / len(chosen)
        by_domain = defaultdict(list)
        for document, row in zip(chosen, values_P4, strict=True):
            by_domain[document.get("domain", "text")].append(row)
        counts = {"gv_prompts": float(len(chosen)), "gv_skipped": float(len(documents) - len(chosen))}
        metrics = _summed(values_P4.mean(0)) | {"gv_prompt_relative_gap": float(relative(values_P4).mean())}
        drawn = [_summed(row) for row in sums_R4 / len(chosen)]
        intervals = {name: bounds(np.array([row[name] for row in drawn])) for name in drawn[0]} if drawn else {}
        if drawn:
            intervals["gv_prompt_relative_gap"] = bounds(each_R)
        return Measured(
            metrics | counts,
            {domain: _summed(np.mean(values, 0)) for domain, values in sorted(by_domain.items())},
            intervals,
        )

    def _prompt(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        document: Document,
    ) -> tuple[str, list[int]]:
        """The prompt's text and tokens."""
        text = str(document[self.prompt])
        ids = encode(tokenizer, [text])[0].tolist()
        if self.prompt_tokens and len(ids) > self.prompt_tokens:
            ids = ids[: self.prompt_tokens]
            text = text_of(tokenizer, ids)
        ids = ([] if vocabulary.begin is None else [vocabulary.begin]) + ids
        limit = positions_of(model)
        if isinstance(limit, int) and len(ids) + self.max_new_tokens > limit:
            raise PretrainError(
                f"{NAME}: max_new_tokens {self.max_new_tokens} after a prompt of {len(ids)} tokens: accepted: at most "
                f"the model's {limit} positions together; prompt_tokens cuts prompts"
            )
        return text, ids

    def _cut(self, text: str) -> str:
        """A generation's text up to `stop`."""
        text = text.lstrip() if self.utility == "exact" else text
        return text.split(self.stop)[0].strip() if self.stop and self.utility == "exact" else text

    def useful(self, prompt: str, text: str, answer: object) -> bool:
        """Whether a generation is right."""
        if self.utility == "exact":
            return self._cut(text) == str(answer).strip()
        return parses(prompt, text)

    def scores(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, prompt: str,
        ids: list[int], made: list[list[int]], texts: list[str],
    ) -> NDArray[np.float64]:  # fmt: skip
        """`score_N`, the log of what the model makes of its generations."""
        if self.verifier == "likelihood":
            judgements = judge(model, [(ids, continuation) for continuation in made])
            return np.array([judgement.logp / judgement.tokens for judgement in judgements])
        asked = [self.question.replace("{prompt}", prompt).replace("{answer}", self._cut(text)) for text in texts]
        begin = [] if vocabulary.begin is None else [vocabulary.begin]
        yes, no = (ids.tolist() for ids in encode(tokenizer, [self.yes, self.no]))
        different = {text: begin + ids.tolist() for text, ids in zip(asked, encode(tokenizer, asked), strict=True)}
        limit = positions_of(model)
        longest = max(map(len, different.values())) + max(len(yes), len(no))
        if isinstance(limit, int) and longest > limit:
            raise PretrainError(
                f"{NAME}: question of {longest} tokens: accepted: at most the model's {limit} positions"
            )
        pairs = [(question, after) for question in different.values() for after in (yes, no)]
        logp_Q2 = np.array([judgement.logp for judgement in judge(model, pairs)]).reshape(-1, 2)
        share = dict(zip(different, logp_Q2[:, 0] - np.logaddexp(logp_Q2[:, 0], logp_Q2[:, 1]), strict=True))
        return np.array([share[text] for text in asked])

    def weigh(self, score_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """`weight_N` of a prompt's generations, which sum to 1."""
        if self.weights == "filter":
            weight_N = (score_N >= np.quantile(score_N, self.quantile)).astype(np.float64)
        else:
            weight_N = np.exp((score_N - score_N.max()) / self.beta)
        return weight_N / weight_N.sum()


def relative(values_P4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each prompt, the gap over what is wrong without verification; 0 where nothing is."""
    gap_P, wrong_P = values_P4[:, 1] - values_P4[:, 0], 1 - values_P4[:, 0]
    return np.divide(gap_P, wrong_P, out=np.zeros_like(gap_P), where=wrong_P > 0)


def _summed(row_4: NDArray[np.float64]) -> dict[str, float]:
    """The metrics of means over prompts."""
    utility, verified, kept, distinct = map(float, row_4)
    gap = verified - utility
    return {
        "gv_utility": utility,
        "gv_verified": verified,
        "gv_gap": gap,
        "gv_relative_gap": gap / (1 - utility) if utility < 1 else 0.0,
        "gv_kept": kept,
        "gv_distinct": distinct,
    }


def parses(prompt: str, text: str) -> bool:
    """Whether prompt and text are Python, the text's last line left out where they are not with it; nothing is run."""
    whole = prompt + text
    for code, added in ((whole, text), (whole.rpartition("\n")[0] + "\n", text.rpartition("\n")[0])):
        if not added.strip():
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ast.parse(code)
                return True
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
    return False
