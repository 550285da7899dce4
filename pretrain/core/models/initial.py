"""What `transformers` leaves out when it builds a model with random weights, by the type of the model.

It skips what it takes for initialised already. A ViTMAE built from its configuration (`transformers` 5.23) has neither
position embeddings nor a class token nor a mask token: all are 0, and it learns no more than the mean of the images.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from pretrain.core.models.layers import at


def completed(model: PreTrainedModel) -> PreTrainedModel:
    """The model with what its class's own `initialize_weights` was to give it."""
    if model.config.model_type == "vit_mae":
        with torch.no_grad():
            _vit_mae(model)
    return model


def _vit_mae(model: PreTrainedModel) -> None:
    embeddings = at(model, "base_model.embeddings")
    _forget(embeddings)
    embeddings.initialize_weights()
    decoder = getattr(model, "decoder", None)
    if decoder is not None:
        for parameter in (decoder.mask_token, decoder.decoder_pos_embed):
            parameter.__dict__.pop("_is_hf_initialized", None)
        decoder.initialize_weights(embeddings.patch_embeddings.num_patches)


def _forget(module: nn.Module) -> None:
    """Take back the mark that tells `transformers` that a module's weights are there."""
    for part in (*module.modules(), *module.parameters()):
        part.__dict__.pop("_is_hf_initialized", None)
