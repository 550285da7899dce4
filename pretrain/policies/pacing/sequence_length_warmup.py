"""Short rows first, of full length later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.core.batch import Batch
from pretrain.core.bounds import Count, OpenShare
from pretrain.core.errors import PretrainError
from pretrain.objectives import Loss
from pretrain.policies import Policy, State, Training


@dataclass(frozen=True)
class SequenceLengthWarmup(Policy):
    """The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models
    (arXiv:2108.06084).

    Early in training long contexts are of no use yet, cost attention's FLOPs and make its gradients noisy. So rows are
    cut into 2^k at first, and the length doubles at each of the k shares of the budget in `at`. A step keeps its tokens
    and their order: each row becomes more and shorter ones, and documents that a cut goes through begin anew behind it.
    The paper's length grows linearly from 8 on and drops what is beyond it; these shares are a guess. Evaluations are
    of full length. With `spread` the pieces of so many rows are dealt out among the steps that these rows make, so that
    a step has pieces of many texts in place of all of a few; where the length doubles, pieces of one such block may
    come twice or not at all.
    """

    at: tuple[OpenShare, ...] = (0.2, 0.4)
    spread: Count = 1

    def attended(self) -> float:
        """Each stretch of the budget by its length."""
        ends = [*sorted(self.at), 1.0]
        stretches = zip([0.0, *ends], ends, strict=False)
        return sum((end - begin) / 2 ** (len(self.at) - number) for number, (begin, end) in enumerate(stretches))

    def start(self, training: Training, state: State) -> None:
        """Begin with the shortest rows, or go on with the length that was reached."""
        length, most = training.loader.length, 2 ** len(self.at)
        if length % most or length < 2 * most:
            raise PretrainError(f"{self.name}: length {length}: accepted: a multiple of {most}, {2 * most} or more")
        training.loader.cuts, training.loader.spread = state.setdefault("cuts", most), self.spread

    def after_step(self, training: Training, state: State, batches: Sequence[Batch], losses: Sequence[Loss]) -> None:
        """Double where a share is reached; the length holds from the next step on."""
        cuts = 2 ** sum(training.progress < share for share in self.at)
        if cuts != state["cuts"]:
            training.loader.cuts = state["cuts"] = cuts
