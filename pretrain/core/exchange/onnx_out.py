"""A checkpoint of a text model as ONNX: a graph of one pass, of any number of rows and tokens, for onnxruntime.

`model.onnx` takes `input_ids` and `attention_mask` and gives `logits`, or `last_hidden_state` of a model without a
head; its weights lie beside it in `model.onnx.data`, in float32. Configuration and tokenizer are those of transformers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pretrain.core.errors import PretrainError
from pretrain.core.exchange.task import Export
from pretrain.core.files import JSONObject
from pretrain.core.foreign.parsing import reason

NAME = "model.onnx"
ROWS = 1 << 16  # of a batch at most
SHAPES = ((2, 9), (1, 4), (3, 16))  # rows and tokens: the first is traced, on all of them answers are compared
INPUTS = ("input_ids", "attention_mask")


class OnePass(nn.Module):
    """A model as a function of tokens and mask (B, L)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.generates = model, model.can_generate()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, or the last states of a model without a head."""
        caching = {"use_cache": False} if self.generates else {}
        answer = self.model(input_ids=input_ids, attention_mask=attention_mask, **caching)
        first: Tensor = answer.logits if "logits" in answer else answer.last_hidden_state
        return first


def write(given: Export, work: Path) -> JSONObject:
    """Write the graph and compare what onnxruntime answers with what the model does, on rows that are padded too."""
    import onnxruntime
    import onnxscript  # noqa: F401  # said to be missing before anything is traced

    model, config = given.model.float().eval(), given.model.config
    if config.is_encoder_decoder or not hasattr(config, "vocab_size"):
        raise PretrainError(
            f"{given.source}: model_type {config.model_type!r}: accepted, for ONNX: models of text with one stack"
        )
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    longest = next((size for size in known if isinstance(size, int)), ROWS)
    wrapped = OnePass(model)
    with torch.no_grad():
        output = "last_hidden_state" if "logits" not in model(**_inputs(config.vocab_size, (1, 2))) else "logits"
    _trace(given, wrapped, work / NAME, output, min(longest, ROWS))
    session = onnxruntime.InferenceSession(str(work / NAME), providers=["CPUExecutionProvider"])
    off = span = 0.0
    for rows, length in SHAPES:
        inputs = _inputs(config.vocab_size, (rows, min(length, longest)))
        with torch.no_grad():
            ours = wrapped(*inputs.values())
        try:
            answer = session.run([output], {name: each.numpy() for name, each in inputs.items()})
        except Exception as error:  # onnxruntime's classes are its own
            raise PretrainError(
                f"{given.source}: model_type {config.model_type!r}: its graph takes rows of one length; accepted, "
                "for ONNX: models whose operations follow the length"
            ) from error
        theirs = torch.from_numpy(answer[0])
        seen = inputs["attention_mask"].bool() if ours.ndim == 3 else slice(None)  # what is padded answers nothing
        off = max(off, float((ours - theirs)[seen].abs().max()))
        span = max(span, float(ours.abs().max()))
    # Sums in another order: of each layer, and of each attention and feed-forward part in it.
    layers = getattr(config, "num_hidden_layers", 1)
    if not off <= 64 * torch.finfo(torch.float32).eps * layers * max(1.0, span):
        raise PretrainError(f"{given.source}: the ONNX graph answers otherwise: {output} is off by {off:.3g}")
    config.save_pretrained(work)
    if given.processor is not None:
        given.processor.save_pretrained(work)
    return {"output": output, f"{output}_off": off, f"{output}_span": span, "longest": longest}


def _inputs(vocabulary: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Random tokens, and a mask that leaves out the end of all rows but the first."""
    ids_BL = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(sum(shape)))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1:, -(shape[1] // 3) :] = 0
    return dict(zip(INPUTS, (ids_BL, mask_BL), strict=True))


def _trace(given: Export, wrapped: nn.Module, path: Path, output: str, longest: int) -> None:
    sizes = {0: torch.export.Dim("rows", min=1, max=ROWS), 1: torch.export.Dim("length", min=2, max=longest)}
    inputs = tuple(_inputs(given.model.config.vocab_size, SHAPES[0]).values())
    try:
        with _silent(), torch.no_grad():
            torch.onnx.export(
                wrapped, inputs, path, dynamo=True, input_names=list(INPUTS), output_names=[output],
                dynamic_shapes=(sizes, sizes), external_data=True, verbose=False,
            )  # fmt: skip
    except OSError:
        raise
    except Exception as error:  # of whatever in the model has no form as a graph
        kind = type(given.model).__name__
        raise PretrainError(f"{given.source}: torch cannot export {kind} to ONNX: {reason(error)}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """While open, the exporter does not tell which packages it might look for too."""
    logger = logging.getLogger("torch.onnx")
    before, logger.level = logger.level, logging.ERROR
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.level = before
