"""What the tests of adapters share: an input, its logits, and a model as if it had been trained."""

from __future__ import annotations

import torch

IDS = torch.tensor([[1, 5, 9, 11, 40, 2]])


def logits(model):
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(IDS, **extra).logits


def trained(model, seed=0, by=0.1):
    """As if it had been trained: whatever is not frozen gets other numbers."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn_like(parameter)
    return model
