"""An encoder run block by block, and further blocks of its own kind beside it.

Shape letters: B rows, L positions, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from pretrain.core.models.families import Arguments, at, base, blocks


def new_blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """`count` blocks like the model's last, with fresh weights."""
    last, number = blocks(model)[-1], len(blocks(model)) - 1
    make: Callable[..., nn.Module] = type(last)
    made = nn.ModuleList([make(at(model, "config"), layer_idx=number) for _ in range(count)])
    return made.apply(at(model, "_init_weights"))


def embedded(model: nn.Module, vectors_BLE: Tensor, position_BL: Tensor) -> Tensor:
    """What the first block gets when the tokens' embeddings are `vectors_BLE`."""
    layer = at(base(model), "embeddings")
    if hasattr(layer, "position_embeddings"):
        return layer(inputs_embeds=vectors_BLE, position_ids=position_BL)
    return layer(inputs_embeds=vectors_BLE)


def run(model: nn.Module, layers: Iterable[nn.Module], states_BLE: Tensor, inputs: Arguments) -> Tensor:
    """The states after `layers`, which attend as `inputs` say: those of `attend` or of `attention_inputs`."""
    encoder = base(model)
    masks, position_BL = inputs["attention_mask"], inputs["position_ids"]
    turns: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        kind: str | None = getattr(layer, "attention_type", None)  # ModernBERT's blocks differ in reach and in rotation
        given: Arguments = {"attention_mask": masks[kind] if isinstance(masks, dict) else masks}
        if kind is not None:
            if kind not in turns:
                turns[kind] = at(encoder, "rotary_emb")(states_BLE, position_BL, kind)
            given["position_embeddings"] = turns[kind]
        states_BLE = layer(states_BLE, **given)
    return states_BLE


def last_norm(model: nn.Module) -> nn.Module:
    """The norm after the last block; nothing where there is none."""
    return getattr(base(model), "final_norm", nn.Identity())
