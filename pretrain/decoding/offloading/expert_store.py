"""Experts stay in memory or in the checkpoint's files, and are fetched when tokens choose them or a mixture earlier."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from pretrain.core.bounds import Whole
from pretrain.decoding import Decoding

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from pretrain.core.generation.options import Options, SettingFields
    from pretrain.core.processors import Processor


@dataclass(frozen=True)
class ExpertStore(Decoding):
    """Pre-gated MoE: An Algorithm-System Co-Design for Fast and Scalable Mixture-of-Expert Inference
    (arXiv:2308.12066).

    Experts lie off the device, in the machine's memory (`source: memory`) or in the checkpoint's own safetensors files
    (`disk`), which are mapped and never read whole. The device has places for `resident` of them (0: twice as many as a
    token is given); what tokens choose and is not there is fetched, in place of what was used least recently. Of a
    model that is `pre_gated` the next mixture's experts are known while one computes, and another thread fetches them
    meanwhile, unless `prefetch` is false; of another model they are waited for. A mixture of which a pass chooses more
    than `resident` (over a prompt) has all of those for its turn. Logits are those of the model without the store, to
    the bit. Where the device is the CPU only `disk` saves memory.

    A stage tells what came of it: of the experts that a pass chose those that were there (`expert_hits`), that had been
    fetched ahead (`expert_prefetched`) and that had to be fetched (`expert_misses`); `expert_bytes_fetched`,
    `expert_seconds_waited`, and of the device's memory the most that experts took (`expert_bytes_resident`, of
    `expert_bytes_of_all`).
    """

    families: ClassVar[tuple[str, ...]] = (
        "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "granitemoe", "minimax",
    )  # fmt: skip
    samples: ClassVar[bool] = True
    lossless: ClassVar[bool] = True
    opens: ClassVar[bool] = True

    resident: Whole = 0
    source: Literal["memory", "disk"] = "memory"
    prefetch: bool = True

    def load(self, folder: Path, *, device: torch.device) -> tuple[PreTrainedModel, Processor | None]:
        """The checkpoint with its experts where the method says, and all else on the device."""
        from torch import nn

        from pretrain.core.checkpoint import load
        from pretrain.core.experts.opening import open_without_experts
        from pretrain.core.experts.store import give_store

        if self.source == "disk":
            model, processor, source = open_without_experts(folder, self.name, self.families)
        else:
            (model, processor), source = load(folder, device="cpu"), None
        give_store(
            model, self.name, self.families, source=source, resident=self.resident, prefetch=self.prefetch,
            device=device,
        )  # fmt: skip
        cast(nn.Module, model).to(device)  # transformers' stub of `to` takes no device
        return model, processor

    def measured(self, model: PreTrainedModel) -> dict[str, float]:
        """What the store of a model that it opened has done so far."""
        from pretrain.core.experts.store import store_of

        store = store_of(model)
        return {} if store is None else store.traffic.metrics()

    def decode(self, model: PreTrainedModel, input_ids_BL: Tensor, options: Options) -> Tensor:
        """Continue left-padded prompts as `transformers` does, of a whole model with its experts lent to a store."""
        import torch

        from pretrain.core.experts.store import borrowed_store, store_of
        from pretrain.core.generation.options import SettingFields as Settings
        from pretrain.core.generation.settings import generate

        mask_BL = options.attention_mask_BL
        mask_BL = torch.ones_like(input_ids_BL) if mask_BL is None else mask_BL
        names = {field.name for field in fields(options)} & Settings.__annotations__.keys()
        given = cast("SettingFields", {name: getattr(options, name) for name in names})
        lent = borrowed_store(
            model, self.name, self.families, resident=self.resident, prefetch=self.prefetch
        ) if store_of(model) is None else nullcontext()  # fmt: skip
        with lent, torch.no_grad(), torch.random.fork_rng(enabled=options.generator is not None):
            if options.generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (1,), generator=options.generator)))
            return generate(model, input_ids_BL, mask_BL.to(input_ids_BL.device), given)
