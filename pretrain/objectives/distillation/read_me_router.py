"""The router of `read_me` learns from the dense model which expert has the neurons that a token makes active.

Shape letters: B rows, L positions, F neurons of a feed-forward, X experts, M neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pretrain.core.batch import Batch, Context, Row, rows_to_tensors
from pretrain.core.bounds import Positive, ProperShare, Share
from pretrain.core.errors import PretrainError
from pretrain.core.models.attention import attend
from pretrain.core.models.families import base
from pretrain.objectives import Loss, Objective
from pretrain.surgery.experts.read_me import dense, inside, mixtures, router_of

PARTS = 5  # of an expert's neurons: the most active fifth, two fifths, …


@dataclass(frozen=True)
class ReadMeRouter(Objective):
    """Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design (arXiv:2410.19123).

    For a model after the surgery `read_me`, whose router alone is trained. The text goes through the dense model, of
    which tokens take all neurons. In block l let n be how many neurons an expert has that not all experts have, and
    top_k(t) the k neurons of the largest values of a token t. An expert's likeness to the token is

        s_l(t, x) = `sharpness` / (3 n) · Σ_{k = n - 1, 4n/5, 3n/5, 2n/5, n/5} |top_k(t) ∩ neurons that x has, not all|

    and with p the router's probabilities

        L = mean over tokens of Σ_l alpha · CE(argmax_x s_l, p) + (1 - alpha) · CE(softmax_x s_l, p)

    the first with `label_smoothing`. The part `accuracy` is how often the router's choice is a block's argmax. Values
    are taken with their signs, though `read_me` chooses neurons by their size, as the authors' code does; numbers are
    its own too. A block whose experts are all of the same neurons teaches nothing.
    """

    families: ClassVar[tuple[str, ...]] = ("llama",)
    effort: ClassVar[float] = 1 / 3  # the blocks are passed forwards alone
    predicted: ClassVar[float] = 0.0

    alpha: Share = 0.75
    label_smoothing: ProperShare = 0.5
    sharpness: Positive = 10.0

    def parts(self) -> tuple[str, ...]:
        """The router and the experts are the surgery's."""
        return ("read_me",)

    def prepare(self, rows: Sequence[Row], context: Context) -> Batch:
        """`tokens_BL`, `document_BL`, `position_BL`; every token is a target."""
        batch = rows_to_tensors(rows, context.length, context.vocabulary.pad)
        batch["weight"] = (batch["document_BL"] != 0).sum()
        return batch

    def modules(self, model: nn.Module) -> None:
        """None; all of the model but its router is frozen."""
        router = router_of(model, self.name)
        if not any(distinct(ffn.members_XM, ffn.neurons).any() for ffn in mixtures(model)):
            raise PretrainError(f"{self.name}: experts of the same neurons: accepted: two experts or more, that differ")
        model.requires_grad_(False)
        router.requires_grad_(True)

    def loss(self, model: nn.Module, batch: Batch, modules: nn.Module | None = None) -> Loss:
        """The cross-entropy of all blocks; part `accuracy`."""
        if any(hasattr(module, "unshard") for module in model.modules()):
            raise PretrainError(f"{self.name}: strategy fsdp: accepted: ddp")
        targets: list[Tensor] = []
        labels: list[Tensor] = []

        def teach(ffn: nn.Module, args: tuple[Tensor, ...]) -> None:
            likeness_BLX = self.likeness(args[0], places[ffn])
            if likeness_BLX is not None:
                targets.append(self.target(likeness_BLX))
                labels.append(likeness_BLX.argmax(-1))

        places = {ffn.down_proj: ffn.members_XM for ffn in mixtures(model)}
        handles = [down.register_forward_pre_hook(teach) for down in places]
        try:
            with dense(model, self.name) as router:
                with torch.no_grad():
                    inputs = attend(model, batch, causal=True)
                    base(model)(input_ids=batch["tokens_BL"], **inputs)
                assert router.given is not None, "the first block was passed"
                logit_BLX = router(router.given).float()
        finally:
            for handle in handles:
                handle.remove()
        inside_BL = batch["document_BL"] != 0
        nll_BL = -(torch.stack(targets).sum(0) * logit_BLX.log_softmax(-1)).sum(-1) * inside_BL
        count = inside_BL.sum().clamp(min=1)
        right_BL = torch.stack([label_BL == logit_BLX.argmax(-1) for label_BL in labels]).float().mean(0)
        return Loss(nll_BL.sum() / count, {"accuracy": (right_BL * inside_BL).sum() / count}, nll_BL.detach())

    def likeness(self, value_BLF: Tensor, members_XM: Tensor) -> Tensor | None:
        """`s_BLX`; None where experts are all of the same neurons."""
        distinct_XF = distinct(members_XM, value_BLF.shape[-1])
        number = int(distinct_XF[0].sum())
        if number == 0:
            return None
        largest_BLM = value_BLF.float().topk(number, -1).values  # the last is the n-th: above it are n - 1
        ranks = [number - 1, *(number * part // PARTS for part in range(PARTS - 1, 0, -1))]
        counts_BLF = sum((value_BLF > largest_BLM[..., rank, None]).float() for rank in ranks)
        assert isinstance(counts_BLF, Tensor)
        return counts_BLF @ distinct_XF.T.float() * (self.sharpness / (3 * number))

    def target(self, likeness_BLX: Tensor) -> Tensor:
        """`target_BLX`: what cross-entropy is taken with; the label and the likenesses in their shares."""
        experts = likeness_BLX.shape[-1]
        label_BLX = nn.functional.one_hot(likeness_BLX.argmax(-1), experts).float()
        label_BLX = (1 - self.label_smoothing) * label_BLX + self.label_smoothing / experts
        return self.alpha * label_BLX + (1 - self.alpha) * likeness_BLX.softmax(-1)


def distinct(members_XM: Tensor, neurons: int) -> Tensor:
    """`distinct_XF`: the neurons that an expert has and not all have."""
    inside_XF = inside(members_XM, neurons)
    return inside_XF & ~inside_XF.all(0)
