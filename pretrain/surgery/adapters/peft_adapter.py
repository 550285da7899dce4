"""Any adapter of `peft` that changes layers, made anew or opened from a folder in `peft`'s format."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import ClassVar

import torch
from peft import PeftConfig, PeftType, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pretrain.core.checkpoint import record
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.files import JSONObject, read_json
from pretrain.core.folders import verify_file
from pretrain.core.method import Ref
from pretrain.core.models.families import is_linear
from pretrain.core.models.heads import new_modules, output
from pretrain.core.weights import load_tensors
from pretrain.dial.tuned import Layers, Tuning
from pretrain.surgery import Inputs, PeftFormat, Surgery

Config = JSONObject  # JSON
MERGED = "the folder that peft's merge_and_unload() and save_pretrained() write"
PREFIX = "base_model.model."  # of each weight's name in a file of `peft`
ELSEWHERE = ("base_model_name_or_path", "revision", "auto_mapping")  # fields that tell of the model below


@dataclass(frozen=True)
class PeftAdapter(Surgery):
    """Parameter-Efficient Transfer Learning for NLP (arXiv:1902.00751).

    An adapter of the `peft` library inside a frozen model: `type` is one of its types that change layers (LORA, IA3,
    LOHA, LOKR, OFT, BOFT, …), `config` the fields of its configuration. Or it is opened from `folder`, in `peft`'s
    format (`adapter_config.json`, `adapter_model.safetensors`); training goes on from its weights. The checkpoint holds
    the adapter once more in that format, in its folder `adapter`. `modules_to_save` are trained whole beside it, in
    their places.
    """

    adapts: ClassVar[bool] = True
    shares_vocabulary: ClassVar[tuple[str, ...]] = ("folder",)

    type: str = "LORA"
    config: Config = field(default_factory=dict)
    folder: Ref | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder and self.config:
            raise PretrainError("peft_adapter: folder, config: accepted: one of them; the folder has a configuration")

    def tuning(self, layers: Layers, before: Tuning | None) -> Tuning | None:
        """LoRA's factors by the configuration's rank and layers, IA3's vectors; other types are taken for LoRA."""
        config = self._declared()
        names = config.get("target_modules") or ()
        where = "all" if names else "query_value"
        if isinstance(names, str):
            names = ()  # `all-linear`, or an expression: of all layers
        if str(config.get("peft_type")).upper() == "IA3":
            chosen = layers.chosen(where, names)
            inner = config.get("feedforward_modules") or ()
            sizes = [each.inputs if each.path.rpartition(".")[2] in inner else each.outputs for each in chosen]
            place = min((each.place for each in chosen), default=0)
            trained = sum(size * each.blocks for size, each in zip(sizes, chosen, strict=True))
            return replace(layers.before(place), trained=float(trained))
        return layers.low_rank(where, names, int(config.get("r") or 8))

    def __call__(self, model: PreTrainedModel, inputs: Inputs | None = None) -> PreTrainedModel:
        """The adapted model: only the adapter, and a classifier's last layer, are trained from now on."""
        config = self._configuration()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(inputs.seed if inputs is not None else 0)
            model = _inject(model, config)
        if self.folder:
            _load(model, Path(self.folder), config)
        record(model, PeftAdapter(str(config["peft_type"]), _stored(config)))
        return model

    def restore(self, model: PreTrainedModel) -> PreTrainedModel:
        """The layers of the recorded configuration, with weights yet to be loaded."""
        return _inject(model, {"peft_type": self.type, **self.config, "init_lora_weights": True})

    def adapter(self, model: PreTrainedModel) -> PeftFormat | None:
        """Configuration and weights as `peft` saves them, what is new in a classifier among them.

        None where the classifier's last layer is adapted: it is trained whole besides, which `peft` cannot say.
        """
        config = {"peft_type": self.type, **self.config, "inference_mode": True}
        tensors = {f"{PREFIX}{n}": t.contiguous() for n, t in get_peft_model_state_dict(model).items()}
        new = new_modules(model) | _saved(model, self.config)
        adapted = {name for name in new if any(n.startswith(f"{PREFIX}{name}.") for n in tensors)}
        last, new = output(model), {name: module for name, module in new.items() if name not in adapted}
        if last is not None and last[0] in adapted:
            return None
        if new:
            config["modules_to_save"] = list(new)
        for name, module in new.items():
            tensors |= {f"{PREFIX}{name}.{part}": t.contiguous() for part, t in module.state_dict().items()}
        return config, tensors

    def _declared(self) -> Config:
        """The configuration, as far as it is there already."""
        with suppress(PretrainError, OSError):
            return self._configuration()
        return {"peft_type": "LORA"}

    def _configuration(self) -> Config:
        if not self.folder:
            return {"peft_type": self.type.upper(), **self.config}
        path = Path(self.folder) / "adapter_config.json"
        if not path.exists():
            raise PretrainError(f"peft_adapter: folder {self.folder}: accepted: one with adapter_config.json")
        verify_file(path)
        return {k: v for k, v in read_json(path).items() if k not in ELSEWHERE}


def _inject(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """The model with the adapter's layers, by name `default`; everything else is frozen."""
    if config["peft_type"] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise unknown("adapter type of peft", config["peft_type"], list(PEFT_TYPE_TO_CONFIG_MAPPING))
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config["peft_type"])]
    known = {f for f in made.__dataclass_fields__ if f not in ("peft_type", "inference_mode")}
    options = {k: v for k, v in config.items() if k in known and k != "modules_to_save"}
    stray = sorted(set(config) - known - {"peft_type", "inference_mode", "init_lora_weights"})
    if stray:
        raise unknown(f"field of peft's {config['peft_type']}", stray[0], sorted(known))
    routers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not is_linear(m)]
    if routers and options.get("target_modules") == "all-linear":  # which peft takes for linear layers
        options = {"exclude_modules": routers} | options
    training = model.training
    try:
        adapter = made(**options, inference_mode=False)
        _check_init(model, adapter)
        inject_adapter_in_model(adapter, model)  # in place
    except PretrainError:
        raise
    except Exception as error:  # of peft, for values that do not suit it
        raise PretrainError(f"peft's {config['peft_type']}: {' '.join(str(error).split())[:300]}") from error
    _check_untied(model, config)
    last = output(model)
    if last is not None:
        last[1].requires_grad_(True)
    for module in _saved(model, config).values():
        module.requires_grad_(True)
    return model.train(training)


def _saved(model: PreTrainedModel, config: Config) -> dict[str, nn.Module]:
    """The modules that the configuration has saved, and trained, whole; `peft` knows them by the ends of their names.

    It trains copies of them beside the model's own, which are in nobody's way here. Raises `PretrainError` for one that
    shares its weights with the rest of the model, where its copy would not.
    """
    ends = config.get("modules_to_save") or ()
    if not isinstance(ends, list | tuple) or not all(isinstance(end, str) for end in ends):
        raise PretrainError(f"peft_adapter: modules_to_save {ends!r}: accepted: a list of names")
    ends = tuple(ends)
    modules = {name: module for name, module in model.named_modules() if ends and name.endswith(ends)}
    inside = {name for name in modules for other in modules if name.startswith(f"{other}.")}
    saved = {name: module for name, module in modules.items() if name not in inside}
    users = _users(model)
    for name, module in saved.items():
        for other in chain.from_iterable(users[id(parameter)] for parameter in module.parameters()):
            if not f"{other}.".startswith(f"{name}."):
                raise PretrainError(
                    f"peft_adapter: modules_to_save {name}: {other} shares its weights; accepted: modules that share "
                    f"none, or {MERGED}"
                )
    return saved


def _users(model: PreTrainedModel) -> dict[int, list[str]]:
    """The modules that hold each parameter, by its identity; of an adapted layer the name that it had before."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    return users


def _check_untied(model: PreTrainedModel, config: Config) -> None:
    """Refuse adapters on layers whose weights others use too: merged or saved, these would change with them."""
    if config.get("layer_replication"):
        raise PretrainError(f"peft_adapter: layer_replication: blocks that share their weights; accepted: {MERGED}")
    changed = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    for names in _users(model).values():
        if len(names) > 1 and (tied := changed.intersection(names)):
            other = next(name for name in names if name not in tied or name != min(tied))
            raise PretrainError(f"peft_adapter: {min(tied)} shares its weights with {other}; accepted: {MERGED}")


def _check_init(model: PreTrainedModel, adapter: PeftConfig) -> None:
    """Refuse what `peft` begins wrongly: OLoRA takes a Conv1D's weight for one of outputs × inputs."""
    if getattr(adapter, "init_lora_weights", None) != "olora":
        return
    for name, module in model.named_modules():
        if isinstance(module, Conv1D) and check_target_module_exists(adapter, name):
            raise PretrainError(f"init olora: {name} is a Conv1D; accepted: another init, as kaiming or pissa")


def _stored(config: Config) -> Config:
    """The configuration's fields, without what stands elsewhere."""
    return {k: v for k, v in config.items() if k not in ("peft_type", "inference_mode")}


def _load(model: PreTrainedModel, folder: Path, config: Config) -> None:
    """The weights of an adapter in `peft`'s format; all must have a place, and all places a weight."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        pickled = " (a pickled adapter_model.bin is never read)" if (folder / "adapter_model.bin").exists() else ""
        raise PretrainError(f"peft_adapter: missing file {path}{pickled}")
    try:
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in load_tensors(path).items()}
    except (SafetensorError, OSError) as error:
        raise PretrainError(f"{path} is truncated or damaged ({' '.join(str(error).split())[:200]})") from error
    for place, module in (new_modules(model) | _saved(model, config)).items():
        ours = {n: tensors.pop(f"{place}.{n}") for n in module.state_dict() if f"{place}.{n}" in tensors}
        if ours:
            _check(path, module.state_dict(), ours, f"{place}.")
            module.load_state_dict(ours)
    last = output(model)
    of_last = "" if last is None else f"{last[0]}."
    expected = {n: t for n, t in get_peft_model_state_dict(model).items() if not of_last or not n.startswith(of_last)}
    _check(path, expected, tensors)
    set_peft_model_state_dict(model, tensors)


def _check(path: Path, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], before: str = "") -> None:
    """Refuse tensors that are not those expected; `before` stands before their names."""
    wrong = [f"{before}{n} is missing" for n in expected if n not in tensors]
    wrong += [f"{before}{n} has no place in the model" for n in tensors if n not in expected]
    wrong += [
        f"{before}{n} is {tuple(tensors[n].shape)} in the file and {tuple(t.shape)} in the model"
        for n, t in expected.items()
        if n in tensors and tensors[n].shape != t.shape
    ]
    if wrong:
        raise PretrainError(f"{path}: {len(wrong)} weights do not fit, first: {wrong[0]}")
