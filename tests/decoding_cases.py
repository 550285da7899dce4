"""What the tests of decoding share: models whose greedy tokens vary, one that has learnt something, and prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WIDE: dict[str, dict[str, Any]] = {name: {"initializer_range": 0.4} for name in ("llama", "qwen3", "gpt2")}
EOS = 2


def prompt(length: int, seed: int, vocabulary: int = 97) -> Tensor:
    """`input_ids_1L` of random tokens."""
    return torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))


def learnt(model: Any, steps: int = 60) -> Any:
    """The model after some steps on rows that follow a few rules with exceptions: guesses come true, but not all."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        rows = [torch.randint(3, 20, (8,), generator=generator)]
        for _ in range(30):
            chance = torch.rand(8, generator=generator)
            rows.append(torch.where(chance < 0.8, (rows[-1] * 3 + 1) % 17 + 3, (rows[-1] + 5) % 17 + 3))
        ids_BL = torch.stack(rows, 1)
        model(input_ids=ids_BL, labels=ids_BL).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def greedy(model: Any, ids_BL: Tensor, new: int, *, eos: int | None = None, mask_BL: Tensor | None = None) -> Tensor:
    """What `transformers` makes of it."""
    mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
    return model.generate(
        ids_BL, attention_mask=mask_BL, max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0
    )


def padded(lengths: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths, padded on the left, and their mask."""
    most = max(lengths)
    ids_BL, mask_BL = torch.zeros(len(lengths), most, dtype=torch.int64), torch.zeros(len(lengths), most).long()
    for row, length in enumerate(lengths):
        ids_BL[row, most - length :], mask_BL[row, most - length :] = prompt(length, seed + row)[0], 1
    return ids_BL, mask_BL


def passes(model: Any, call: Any) -> int:
    """How many times the model is asked for logits."""
    count = [0]

    def counted(*_: Any) -> None:
        count[0] += 1

    handle = model.lm_head.register_forward_hook(counted)
    call()
    handle.remove()
    return count[0]


def pairs(model: Any, ids_1L: Tensor, temperature: float, top_p: float) -> Tensor:
    """`p_VV`, the exact probability of every two next tokens."""

    def nucleus(logits: Tensor) -> Tensor:
        p = (logits / temperature).softmax(-1)
        order = p.argsort(descending=True)
        kept, total = torch.zeros_like(p), 0.0
        for token in order:
            if total >= top_p:
                break
            kept[token] = p[token]
            total += float(p[token])
        return kept / kept.sum()

    with torch.no_grad():
        first_V = nucleus(model(ids_1L).logits[0, -1].double())
        rows = [
            nucleus(model(torch.cat([ids_1L, torch.tensor([[v]])], 1)).logits[0, -1].double())
            for v in range(len(first_V))
        ]
    return first_V[:, None] * torch.stack(rows)


def chance(counts: Tensor, p: Tensor) -> float:
    """The chi-square test's probability of counts at least this far from those expected, small cells pooled."""
    from scipy.stats import chisquare

    expected = p.flatten() * counts.sum()
    large = expected >= 5
    assert not counts.flatten()[p.flatten() == 0].any()
    seen = torch.cat([counts.flatten()[large], counts.flatten()[~large].sum()[None]]).double()
    due = torch.cat([expected[large], expected[~large].sum()[None]])
    return float(chisquare(seen[due > 0], due[due > 0]).pvalue)
