"""A checkpoint as a folder of sentence-transformers: the model, a pooling of its last states, and unit length."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pretrain.core import checkpoint
from pretrain.core.encoding import encoded
from pretrain.core.errors import PretrainError
from pretrain.core.exchange.beside import MODULES, SENTENCES
from pretrain.core.exchange.task import Export
from pretrain.core.files import JSONObject, read_object, write_json
from pretrain.core.processors import tokenizer_in

TEXTS = ["A sentence of some words.", "Another one, which is a little longer than the first."]
MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}
LONGEST = 512  # tokens of a text, of a model that says nothing of its positions


def write(given: Export, work: Path) -> JSONObject:
    """Write the folder and compare the vectors of two sentences; a pooling that is there already is kept."""
    tokenizer = tokenizer_in(given.processor)
    if tokenizer is None or tokenizer.pad_token is None:
        raise PretrainError(f"{given.source}: accepted: a checkpoint with a tokenizer that has a pad token")
    width = given.model.config.hidden_size
    checkpoint.save(given.model, given.processor, work / "inner", checkpoint.lineage(given.source), given.source)
    for path in (work / "inner").iterdir():
        path.rename(work / path.name)
    (work / "inner").rmdir()
    pooling = given.pooling
    if not (work / MODULES).exists():
        kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
        rows = [
            {"idx": n, "name": str(n), "path": inside, "type": f"sentence_transformers.models.{kind}"}
            for n, (inside, kind) in enumerate(kinds)
        ]
        for inside, _ in kinds[1:]:
            (work / inside).mkdir()
        modes = {field: mode == pooling for mode, field in MODES.items()}
        write_json(work / MODULES, rows)
        write_json(work / "1_Pooling" / "config.json", {"word_embedding_dimension": width} | modes)
        longest = getattr(given.model.config, "max_position_embeddings", None) or LONGEST
        write_json(work / SENTENCES[1], {"max_seq_length": longest, "do_lower_case": False})
        write_json(work / SENTENCES[2], {"__version__": {}, "prompts": {}, "default_prompt_name": None})
    else:
        stored = work / "1_Pooling" / "config.json"
        held = read_object(stored) if stored.exists() else {}
        pooling = next((mode for mode, field in MODES.items() if held.get(field)), "mean")
    again, its = checkpoint.load(work)
    before, after = (pooled(m, t, pooling) for m, t in ((given.model, tokenizer), (again, its)))
    off = float((before - after).abs().max())
    if not off <= 64 * torch.finfo(before.dtype).eps:
        raise PretrainError(f"{given.source}: the folder's vectors are off by {off:.3g}")
    return {"pooling": pooling, "vectors_off": off, "width": width}


@torch.no_grad()
def pooled(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pooling: str) -> Tensor:
    """The vectors of `TEXTS` (B, D), of length 1."""
    inputs = encoded(tokenizer, TEXTS, padding=True, return_tensors="pt", padding_side="right")
    named = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    states_BLD = model.base_model(**named).last_hidden_state
    mask_BL = inputs["attention_mask"]
    if pooling == "mean":
        vectors_BD = (states_BLD * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
    else:
        place_B = mask_BL.sum(1) - 1 if pooling == "lasttoken" else torch.zeros_like(mask_BL[:, 0])
        vectors_BD = states_BLD[torch.arange(len(TEXTS)), place_B]
    return torch.nn.functional.normalize(vectors_BD)
