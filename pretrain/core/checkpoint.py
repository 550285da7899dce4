"""Checkpoints: a folder in Hugging Face format, plus `pretrain.json`.

`config.json`, `model.safetensors`, the processor's files (a tokenizer's, an image processor's): plain `from_pretrained`
opens it. `pretrain.json` adds the lineage (what was done, tokens, FLOPs, metrics) and, where a surgery put in modules
that plain `transformers` cannot build, the record from which `load` rebuilds them; `checksums.json` vouches for all
files. A surgical checkpoint carries a `model_type` that `transformers` refuses and keeps its weights in a file that it
does not look for, so that neither `AutoModel` nor a model class of its own opens it to silently wrong weights. What was
trained beside frozen weights lies in the folder `adapter` once more, in `peft`'s format, where that can express it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NotRequired, Protocol, TypeAlias, TypedDict, cast, get_origin

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pretrain.core.bounds import hints
from pretrain.core.errors import PretrainError, nearest
from pretrain.core.exchange.beside import shard_size
from pretrain.core.exchange.card import accompany
from pretrain.core.exchange.opening import opened
from pretrain.core.files import JSONObject, atomic_folder, file_digest, read_json, read_object, write_json
from pretrain.core.folders import cache_folder, verify
from pretrain.core.folders import checkpoint_of as checkpoint_of
from pretrain.core.folders import corpus_of as corpus_of
from pretrain.core.folders import tokenizer_of as tokenizer_of
from pretrain.core.foreign.code import brought, consented, keep, needs_consent
from pretrain.core.foreign.configs import check_config, check_record, unmarked, whole_floats
from pretrain.core.foreign.models import check_built, class_of
from pretrain.core.foreign.parsing import parsing, reason
from pretrain.core.foreign.weights import headers
from pretrain.core.generation.accepted import check_generation
from pretrain.core.method import method_class
from pretrain.core.models.families import FAMILIES
from pretrain.core.models.storage import finite, is_narrow
from pretrain.core.processors import Processor, load_processor, quiet
from pretrain.core.quick import hub
from pretrain.core.quick.trust import check_trust, check_whole, offline
from pretrain.core.weights import align

transformers.utils.logging.disable_progress_bar()

RECORD = "pretrain.json"
ADAPTER = "adapter"  # the folder of what was trained beside frozen weights, in the format of `peft`
FORMAT = 1
WEIGHTS, INDEX = ".safetensors", ".safetensors.index.json"  # of `model`, or of `pretrain` after a surgery of ours
FOREIGN = "pretrain_"  # before the model type of a checkpoint that only `load` can open
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
Lineage: TypeAlias = JSONObject  # what stages say of themselves, each what it has to say


class Record(TypedDict, total=False):
    """`pretrain.json`."""

    format: int
    lineage: Lineage
    surgery: list[Entry]
    checksums: dict[str, str]  # of the weights, as releases wrote them that knew no `checksums.json`
    dtype: str  # that it was trained in, where some of its weights are stored in a narrower one
    code: bool  # whether it is made of code that its origin brought, and is not the same model without


class Entry(TypedDict):
    """What a checkpoint keeps of a surgery."""

    method: str
    config: dict[str, object]
    foreign: NotRequired[bool]  # whether it makes what `transformers` cannot open


class Recorded(Protocol):
    """A surgery as a checkpoint keeps it (`surgery.Surgery`)."""

    adapts: ClassVar[bool]

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]

    @property
    def name(self) -> str:
        """The method's name."""

    def references(self) -> dict[str, str]:
        """What it learnt from."""

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with the surgery's structure, without its numbers."""

    def adapter(self, model: PreTrainedModel) -> tuple[dict[str, object], dict[str, torch.Tensor]] | None:
        """What it put into the model, in `peft`'s format."""


def record(model: PreTrainedModel, method: Recorded, *, foreign: bool = True) -> None:
    """Note on the model a surgery whose `restore` must be run before the weights are loaded.

    Not `foreign` is one whose files `transformers` itself can open, with what its configuration asks for installed.
    """
    config = dataclasses.asdict(method)
    # What it learnt from is in the lineage.
    learnt = {name.partition(".")[0] for name in method.references()}
    blank = {name: ("",) if isinstance(config[name], tuple) else "" for name in learnt}
    entry: Entry = {"method": method.name, "config": config | blank, "foreign": foreign}
    vars(model)["pretrain_surgery"] = [*surgery_of(model), entry]


def surgery_of(model: PreTrainedModel) -> list[Entry]:
    """The surgeries that plain `transformers` cannot express, in order."""
    return list(getattr(model, "pretrain_surgery", []))


def _foreign(surgery: list[Entry]) -> bool:
    return any(entry.get("foreign", True) for entry in surgery)


def forget(model: PreTrainedModel, name: str) -> None:
    """Take back what `record` noted of a surgery: the model is as plain `transformers` would build it."""
    vars(model)["pretrain_surgery"] = [entry for entry in surgery_of(model) if entry["method"] != name]


def recorded(entry: Entry) -> Recorded:
    """The surgery of an entry; JSON knows no tuples, methods' fields are tuples."""
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["config"].items()}
    try:
        cls = cast("type[Recorded]", method_class(entry["method"], "surgery"))
    except PretrainError as error:
        hint = "a method from outside: `pretrain --methods FOLDER`, or `pretrain.use_methods`"
        raise PretrainError(f"recorded surgery {entry['method']!r}: {error}; {hint}") from error
    many = {name for name, hint in hints(cls).items() if get_origin(hint) is tuple}
    config |= {name: ("",) for name in many if config.get(name) == ""}  # as references were blanked in older files
    try:
        return cls(**config)
    except PretrainError as error:
        raise PretrainError(f"recorded surgery {entry['method']!r}: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise PretrainError(f"recorded surgery {entry['method']!r}: {reason(error)}") from error


def save(
    model: PreTrainedModel,
    processor: Processor | None,
    folder: Path | str,
    lineage: Lineage | None = None,
    source: Path | None = None,
) -> None:
    """Write a checkpoint atomically: `folder` is the old one until the new one is whole.

    Of `source`, the checkpoint that it was made of, the files travel along that are neither model nor processor.
    Raises `PretrainError` for weights that are not finite, and when the disk is full or refuses.
    """
    folder = Path(folder)
    for name, parameter in model.named_parameters():
        if not finite(parameter):
            raise PretrainError(f"checkpoint {folder} is not written: {name} holds NaN or infinity")
    try:
        with atomic_folder(folder) as work:
            _write(model, processor, work, lineage or {}, source)
            accompany(work, lineage or {}, source)
    except Exception as error:
        if isinstance(error, OSError | SafetensorError) or type(error) is Exception:  # the last of tokenizers
            raise PretrainError(f"cannot write {folder}: {reason(error)}") from error
        raise


def _write(
    model: PreTrainedModel, processor: Processor | None, work: Path, lineage: Lineage, source: Path | None
) -> None:  # fmt: skip
    surgery = surgery_of(model)
    settings = getattr(model, "generation_config", None)
    if settings is not None:  # as it came: transformers refuses to write temperatures without `do_sample`, as many have
        model.generation_config = GenerationConfig()
    try:  # of experts transformers writes the names and shapes of their makers; what we alone open keeps the model's
        model.save_pretrained(work, max_shard_size=shard_size(source), save_original_format=not _foreign(surgery))
    finally:
        if settings is not None:
            model.generation_config = settings
            settings.to_json_file(work / "generation_config.json", keys_to_pop=["compile_config"])
    if processor is not None:
        processor.save_pretrained(work)
    held: Record = {"code": True} if brought(model) is not None else {}
    keep(work, model, model.config, processor, *vars(processor or model).values())
    if is_narrow(model):  # what opens it in one type shall take the one that it was trained in
        held["dtype"] = "float32"
        write_json(work / "config.json", read_json(work / "config.json") | {"dtype": "float32"})
    if _foreign(surgery):
        config = read_json(work / "config.json")
        config["model_type"] = f"{FOREIGN}{config['model_type']}: open it with pretrain.load"
        write_json(work / "config.json", config)
        for suffix in (WEIGHTS, INDEX):
            if (work / f"model{suffix}").exists():
                (work / f"model{suffix}").rename(work / f"pretrain{suffix}")
    for entry in surgery:
        adapter = recorded(entry).adapter(model)
        if adapter is not None:
            (work / ADAPTER).mkdir(exist_ok=True)
            write_json(work / ADAPTER / "adapter_config.json", adapter[0])
            save_file(adapter[1], work / ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(work / RECORD, {"format": FORMAT, "lineage": lineage, "surgery": surgery, **held})


def read_record(folder: Path | str) -> Record:
    """`pretrain.json`; empty for a checkpoint from elsewhere."""
    path = Path(folder) / RECORD
    if not path.exists():
        return {}
    verify(path.parent, lambda name: name == RECORD)
    record = cast("Record", read_object(path))
    if not isinstance(record.get("format"), int) or not 1 <= record["format"] <= FORMAT:
        raise PretrainError(
            f"{path}: format {record.get('format')!r}: accepted: up to {FORMAT}; a newer pretrain wrote it"
        )
    check_record(path, record)
    return record


def lineage(folder: Path | str) -> Lineage:
    """How the checkpoint came to be; empty when it is not known."""
    given = hub.snapshot(Path(folder))
    if given is not None:
        made_by = {"name": given["repo"], "stage": "hub", "address": hub.state(Path(folder))}
        return {"made_by": {**made_by, "revision": given["revision"]}}
    return read_record(folder).get("lineage", {})


def load_config(folder: Path | str) -> PreTrainedConfig:
    """The model's configuration, the true type of a surgical checkpoint included."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise PretrainError(f"{folder} is not a checkpoint: it has no config.json")
    verify(path.parent, lambda name: name == path.name)
    raw = whole_floats(read_object(path))
    kind = str(raw.pop("model_type", None) or "").removeprefix(FOREIGN).partition(":")[0]
    code = consented(path.parent)
    made = code.first_of("AutoConfig") if code is not None else None
    if made is None and kind not in CONFIG_MAPPING:
        way = "" if kind else f"; `pretrain convert {folder} TO` looks at the tensors"
        raise PretrainError(
            f"{path}: model_type {kind!r}{nearest(kind, CONFIG_MAPPING)}: accepted: a type that transformers "
            f"{transformers.__version__} knows{way}{needs_consent(path.parent)}"
        )
    check_config(path, raw)
    if code is None:
        raw.pop("auto_map", None)  # so that what is written from it names no code either
    with parsing(str(path), f"a configuration of {kind}"), quiet():
        return cast("type[PreTrainedConfig]", made or CONFIG_MAPPING[kind]).from_dict(raw)


class Facts(NamedTuple):
    """What is known of a checkpoint before its weights are read."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    record: Record
    files: list[Path]  # of weights


def inspected(folder: Path) -> Facts:
    """Look at all of a checkpoint but its weights' values; the errors are those of `load`."""
    check_trust(folder)
    check_whole(folder)
    config, entry = load_config(folder), read_record(folder)
    if entry.get("code") and consented(folder) is None:
        words = needs_consent(folder) or f"; {folder / 'config.json'} no longer names it"
        raise PretrainError(f"{folder / RECORD}: the model is made of code that its checkpoint brings{words}")
    surgery = entry.get("surgery", [])
    files = weight_files(folder, "pretrain" if _foreign(surgery) else "model")
    _check(files, entry.get("checksums"))
    verify(folder)
    model_class = class_of(folder, config)
    check_built(folder, model_class, config, headers(files), surgical=bool(surgery))
    return Facts(model_class, config, entry, files)


def load(
    folder: Path | str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, Any]:
    """Open a checkpoint, ours or from elsewhere: the model (in evaluation mode) and its processor, None if it has none.

    The processor of a model of text is its tokenizer; `core.processors.tokenizer_in` finds the one that another holds.

    `dtype` is that of the weights, by default the one they are stored in; they lie in aligned memory, as those of a
    model just built. Raises `PretrainError` for a missing, truncated or damaged file, for weights that do not fit the
    configuration, and for pickled weights, which are never read.
    """
    folder = opened(Path(folder), cache_folder())
    model_class, config, entry, files = inspected(folder)
    surgery, path = entry.get("surgery", []), folder / "generation_config.json"
    settings = read_object(path) if path.exists() else None  # transformers would take the default for a damaged one
    check_generation(path, settings or {}, getattr(config, "vocab_size", None))
    if entry.get("dtype") == "float32":  # frozen weights are stored in the type they came in, and computed with in this
        dtype = dtype or torch.float32
    if surgery:
        model = _restore(model_class, config, surgery, files, dtype)
    else:
        model = _load_plain(model_class, folder, config, dtype)
    if settings is not None:
        with parsing(str(path), "a generation configuration"), quiet():
            model.generation_config = GenerationConfig.from_dict(settings)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not finite(tensor):
            raise PretrainError(f"{folder}: {name} holds NaN or infinity; accepted: finite weights")
    processor = load_processor(folder)
    return align(model.to(device or "cpu")).eval(), processor  # type: ignore[arg-type]  # transformers hides what `to` takes


class _Report(TypedDict):
    """What `from_pretrained` says of weights that do not fit."""

    unexpected_keys: list[str]
    missing_keys: list[str]
    mismatched_keys: list[tuple[str, torch.Size, torch.Size]]


def _load_plain(
    model_class: type[PreTrainedModel], folder: Path, config: PreTrainedConfig, dtype: torch.dtype | None
) -> PreTrainedModel:
    readable = parsing(f"{folder} cannot be loaded", "a whole checkpoint of transformers")
    with readable, quiet(), offline(), unmarked(folder) as place:
        loaded = model_class.from_pretrained(
            place, config=config, dtype=dtype or "auto", output_loading_info=True, use_safetensors=True,
            local_files_only=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    model, report = cast("tuple[PreTrainedModel, _Report]", loaded)
    kind = config.model_type
    unused = next((family.unused for family in FAMILIES if kind in family.types), ())
    extra = sorted(name for name in report["unexpected_keys"] if not name.startswith(unused))
    wrong = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    wrong += [
        f"{name} is {tuple(stored)} in the file and {tuple(wanted)} by config.json"
        for name, stored, wanted in sorted(report["mismatched_keys"])
    ]
    wrong += [f"{name} has no place in the model" for name in extra]
    if wrong:
        raise PretrainError(f"{folder}: {len(wrong)} weights do not fit config.json, first: {wrong[0]}")
    return model


def _restore(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    surgery: list[Entry],
    files: list[Path],
    dtype: torch.dtype | None,
) -> PreTrainedModel:
    """Build from the configuration, repeat the recorded surgeries' changes of structure, load the weights strictly."""
    with parsing(f"{files[0].parent}: a model of config.json", "the configuration as it was written"):
        model = model_class(config)
    for entry in surgery:
        method = recorded(entry)
        with parsing(f"{files[0].parent}: recorded surgery {method.name!r}", "the record as it was written"):
            model = method.restore(model)
        record(model, method, foreign=entry.get("foreign", True))
    weights: dict[str, torch.Tensor] = {}
    for path in files:
        with parsing(f"{path} is truncated or damaged", "a whole safetensors file"):
            weights |= load_file(path)
    known = model.state_dict(keep_vars=True)
    stored = {id(known[name]) for name in weights if name in known}  # tied weights are stored under one of their names
    missing = [
        f"{name} is missing" for name, tensor in known.items() if name not in weights and id(tensor) not in stored
    ]
    extra = [f"{name} has no place in the model" for name in weights if name not in known]
    if missing or extra:
        raise PretrainError(f"{files[0]}: weights do not fit the recorded surgery, first: {(missing + extra)[0]}")
    for name, tensor in weights.items():
        if known[name].is_floating_point() and not tensor.is_floating_point():
            raise PretrainError(f"{files[0]}: {name} is of {tensor.dtype}; accepted: floating-point weights")
        wanted = dtype if dtype is not None and tensor.is_floating_point() and tensor.itemsize > 1 else tensor.dtype
        known[name].data = known[name].data.to(wanted)  # not model.to(), which would round the rotary tables too
    with parsing(f"{files[0]}: weights do not fit the recorded surgery", "weights of the recorded shapes"):
        model.load_state_dict(weights, strict=False)
    return model


def stored_dtype(folder: Path | str) -> torch.dtype:
    """The floating type that most of a checkpoint's numbers are stored in."""
    folder, names = Path(folder), {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    held = dict.fromkeys(names, 0)
    for path in weight_files(folder, "pretrain" if _foreign(read_record(folder).get("surgery", [])) else "model"):
        for each in headers([path]).values():
            if each.dtype in held:
                held[each.dtype] += each.count
    return names[max(held, key=lambda kind: held[kind])]


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The weights, in one file or as an index names them; the same choice as transformers makes."""
    whole, index = folder / f"{stem}{WEIGHTS}", folder / f"{stem}{INDEX}"
    files = [whole]
    if not whole.exists() and index.exists():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(Path(str(n)).name == n for n in shards.values()):
            raise PretrainError(f"{index} is damaged: accepted: a weight_map from weights to files beside it")
        files = [folder / name for name in sorted(set(shards.values()))]
    for path in files:
        if not path.exists():
            pickled = [file.name for pattern in PICKLES for file in folder.glob(pattern)]
            if pickled:
                raise PretrainError(
                    f"{folder} holds pickled weights ({pickled[0]}), which are never read: "
                    f"`pretrain convert {folder} TO` makes safetensors of them"
                )
            raise PretrainError(f"missing file {path}")
    return files


def _check(files: list[Path], checksums: dict[str, str] | None) -> None:
    headers(files)
    if checksums is None:
        return
    for path in files:
        if path.name not in checksums or file_digest(path) != checksums[path.name]:
            raise PretrainError(f"{path} is damaged or was replaced: its checksum is not the one in {RECORD}")
