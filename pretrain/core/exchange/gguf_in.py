"""GGUF files, in which llama.cpp keeps models: how one is known, and how a checkpoint is made of it.

Packed weights are unpacked to float32; what is stored as float16 or bfloat16 stays so where that loses nothing.
"""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import atomic_folder, damage_of, digest, file_digest, write_json
from pretrain.core.foreign.configs import check_fields
from pretrain.core.foreign.gguf import Header, header
from pretrain.core.foreign.parsing import parsing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SUFFIX = ".gguf"
ORIGIN = "origin.json"  # in a folder that was made of something else: of what, and its digest
VERSION = 1  # of what is made of a file
NEITHER = ("config.json", "stage.json", "run.json", "corpus.json")  # of folders that are something else


def gguf_at(place: Path) -> Path | None:
    """The GGUF file that a path is, or that a folder holds in place of a checkpoint; None where there is none."""
    if place.suffix == SUFFIX and place.is_file():
        return place
    if not place.is_dir() or any((place / name).exists() for name in NEITHER):
        return None
    files = sorted(place.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        raise PretrainError(f"{place} holds {len(files)} GGUF files; accepted: the path of one, as {files[0]}")
    return files[0] if files else None


def key(path: Path) -> str:
    """What tells a file from another, and from itself after a change."""
    state = path.stat()
    return digest([VERSION, str(path.resolve()), state.st_size, state.st_mtime_ns])


def convert(path: Path, target: Path) -> None:
    """Write the checkpoint that a file holds, unpacked, as the folder `target`."""
    facts = header(path)
    check_fields(path, facts.fields, facts.tensors)
    import gguf  # noqa: F401  # said to be missing before anything is read
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if finding := damage_of(path)[1]:
        raise PretrainError(f"{finding}; accepted: a whole copy, or the export made again")
    sha256 = file_digest(path)
    _warn_of_scaling(path, facts)
    with atomic_folder(target) as work:
        model, tokenizer = read_gguf(path, facts)
        _check_finite(path, model)
        model.to(_narrowest(model, facts))  # type: ignore[arg-type]  # transformers hides what `to` takes
        model.save_pretrained(work, max_shard_size="5GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        made_by = {
            "name": path.name, "stage": "convert", "address": f"gguf {sha256}", "methods": {},
            "format": "GGUF", "architecture": facts.text("general.architecture"),
            "types": dict(Counter(tensor.type for tensor in facts.tensors.values())),
            "stored": str(model.dtype).removeprefix("torch."),
        }  # fmt: skip
        write_json(work / "pretrain.json", {"format": 1, "lineage": {"made_by": made_by}, "surgery": []})
        write_json(work / ORIGIN, {"format": "gguf", "file": str(path), "sha256": sha256})
        name, licence = facts.text("general.name") or path.stem, facts.text("general.license")
        head = f"---\nlicense: {licence}\n---\n\n" if licence.replace("-", "").replace(".", "").isalnum() else ""
        (work / "README.md").write_text(f"{head}# {' '.join(name.split())}\n", encoding="utf-8")


def _check_finite(path: Path, model: PreTrainedModel) -> None:
    from pretrain.core.models.storage import finite

    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not finite(tensor):
            raise PretrainError(f"{path}: {name} holds NaN or infinity; accepted: finite weights")


def read_gguf(path: Path, facts: Header) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model of a file whose header has been read, unpacked, and its tokenizer, None where it has none."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

    from pretrain.core.quick.trust import offline

    readable = parsing(f"{path} cannot be read", "a GGUF file of a model that transformers reads")
    tokenizer = None
    with readable, _parsed_once(), offline():
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        config = _whole_config(config, facts)
        made = _class_of(config)
        with redirect_stderr(io.StringIO()):  # a bar that cannot be told to be silent
            model, report = made.from_pretrained(
                path.parent, gguf_file=path.name, config=config, dtype=torch.float32, local_files_only=True,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
        for name, stored, wanted in sorted(report["mismatched_keys"])[:1]:
            raise ValueError(f"{name} is {tuple(stored)} in it, and {tuple(wanted)} by its header")
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(f"it holds no {missing[0]}")
        if "tokenizer.ggml.tokens" in facts.fields:
            its = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            tokenizer = _as_it_splits(its) if facts.text("tokenizer.ggml.model") == "gpt2" else its
    assert isinstance(model, PreTrainedModel)
    model.config.architectures = [made.__name__]
    for name in ("quantization_config", "_pre_quantization_dtype", "_model_name_or_path"):
        vars(model.config).pop(name, None)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    return model.eval(), tokenizer


def _as_it_splits(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer under the class that keeps its rule of splitting: the models' classes have their rules."""
    from transformers import PreTrainedTokenizerFast

    names = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False, **{name: token for name, token in names.items() if token is not None},
    )  # fmt: skip


def _whole_config(config: PreTrainedConfig, facts: Header) -> PreTrainedConfig:
    """The configuration with what transformers leaves under llama.cpp's names."""
    config.name_or_path = ""
    head = facts.fields.get(f"{facts.text('general.architecture')}.attention.key_length")
    if isinstance(head, int) and hasattr(config, "head_dim"):
        config.head_dim = head
    if config.model_type == "gpt2":
        config.n_positions = getattr(config, "n_ctx", config.n_positions)
        config.n_inner = getattr(config, "feed_forward_length", config.n_inner)
    return config


def _class_of(config: PreTrainedConfig) -> Any:
    """The class of a model that continues text, else of one that answers it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

    for table in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
        if type(config) in table:
            return table[type(config)]
    raise ValueError(f"a {config.model_type} model, which neither continues nor answers a text")


def _narrowest(model: PreTrainedModel, facts: Header) -> torch.dtype:
    """The type that most weights are stored in, if it holds all of them exactly, else float32."""
    import torch

    counts = Counter(tensor.type for tensor in facts.tensors.values() if len(tensor.shape) > 1)
    common = counts.most_common(1)[0][0] if counts else "F32"
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(common, torch.float32)
    exact = all(torch.equal(weight, weight.to(dtype).to(weight.dtype)) for weight in model.state_dict().values())
    return dtype if exact else torch.float32


def _warn_of_scaling(path: Path, facts: Header) -> None:
    """Say what transformers does not read of rotary positions: of longer contexts the logits would differ."""
    scaled = [name for name in facts.tensors if name.startswith("rope_f")]
    scaled += [name for name in facts.fields if ".rope.scaling." in name]
    if scaled:
        warn(f"{path.name}: {scaled[0]} is not read: positions are those of the unscaled model")


@contextmanager
def _parsed_once() -> Iterator[None]:
    """While open, package `gguf` parses a file once, however often transformers asks: each time takes seconds."""
    import gguf

    names, plain = vars(gguf), gguf.GGUFReader
    names["GGUFReader"] = functools.cache(plain)
    try:
        yield
    finally:
        names["GGUFReader"] = plain
