"""What `transformers` says of its configurations, read from its source: to check a new model before it is imported.

To import a configuration takes as long as to import torch. Its class is a list of fields with types and defaults, so
the parsed file tells at once whether a name exists and a value is of its type. Anything that looks wrong, or that the
source does not tell, is left to the configuration itself, whose error it is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from pretrain.core.quick.model_fields import check_values
from pretrain.core.quick.outline import torch_imported
from pretrain.core.quick.table import FAMILIES, TASKS, accepted_fields, unknown_field, unknown_task, unknown_type

_NAMES, _MODULES = "CONFIG_MAPPING_NAMES", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"  # its tables of model types
_BASE = "PreTrainedConfig"
_SET_LATER = ("_name_or_path", "output_attentions")  # by each configuration that is made
_KINDS = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict, "None": type(None)}


@dataclass(frozen=True)
class Declared:
    """A configuration's fields: types as they are written, defaults where they are plain, and other names of fields."""

    types: Mapping[str, str]
    defaults: Mapping[str, object]
    bounds: Mapping[str, tuple[float, float]]
    aliases: Mapping[str, str]

    @property
    def names(self) -> frozenset[str]:
        """The fields that a recipe may give."""
        return accepted_fields({*self.types, *self.aliases, *_SET_LATER})

    def plausible(self, given: Mapping[str, object]) -> bool:
        """Whether the fields are known, of their types, and the sizes divide one another."""
        fields = {self.aliases.get(name, name): value for name, value in given.items()}
        if not all(name in self.names and self._fits(name, value) for name, value in fields.items()):
            return False
        sizes = {**self.defaults, **fields}
        width, heads, shared = (
            sizes.get(self.aliases.get(name, name))
            for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        pairs = [(big, small) for big, small in ((width, heads), (heads, shared)) if isinstance(small, int)]
        return all(isinstance(big, int) and small > 0 and big % small == 0 for big, small in pairs)

    def _fits(self, name: str, value: object) -> bool:
        if not self.types.get(name):
            return True  # the source says nothing of its type
        parts = [part.strip() for part in self.types[name].split("|")]
        if any(value in _literals(part) and isinstance(value, str) for part in parts):
            return True
        kinds = [_KINDS.get(part.partition("[")[0]) for part in parts]
        low, high = self.bounds.get(name, (float("-inf"), float("inf")))
        if type(value) not in kinds or (isinstance(value, int | float) and not low <= value <= high):
            return False
        return not isinstance(value, int) or isinstance(value, bool) or value > 0 or name.endswith("_id")


def _literals(part: str) -> tuple[object, ...]:
    """The values of a type that lists them: `Literal['cls', 'mean']`."""
    if not part.startswith("Literal["):
        return ()
    with suppress(ValueError, SyntaxError):
        values = ast.literal_eval(part.removeprefix("Literal"))
        return tuple(values)
    return ()


def check_config(model_type: str, fields: Mapping[str, object]) -> None:
    """Refuse a new model's type and fields as `families.new_config` does, which is asked where the source says no."""
    check_values(str(model_type), fields)
    if not torch_imported() and isinstance(model_type, str) and (known := _types()[0]):
        if model_type not in known:
            raise unknown_type(model_type, known, version("transformers"))
        facts = declared(model_type)
        if facts is not None and facts.plausible(fields):
            return
        strange = next((name for name in fields if facts is not None and name not in facts.names), None)
        if facts is not None and strange is not None and any(model_type in entry.types for entry in FAMILIES):
            raise unknown_field(strange, model_type, facts.names)
    from pretrain.core.models.families import new_config

    new_config(model_type, fields)


def config_values(model_type: str, fields: Mapping[str, object]) -> dict[str, object]:
    """A new model's configuration as far as it is known without `transformers`: its plain defaults and the fields."""
    facts = declared(model_type) if model_type in _types()[0] else None
    aliases = facts.aliases if facts is not None else {}
    given = {aliases.get(name, name): value for name, value in fields.items()}
    return {"model_type": model_type, **(facts.defaults if facts is not None else {}), **given}


def check_task(task: str) -> None:
    """Refuse a task that there is not."""
    if task in TASKS:
        return
    if torch_imported() or not (known := _auto_classes()):
        from pretrain.core.models import families

        families.check_task(task)
    elif task not in known:
        raise unknown_task(task, known, version("transformers"))


@cache
def declared(model_type: str) -> Declared | None:
    """The fields of a model type's configuration; `None` where its source is not laid out as most are."""
    names, modules = _types()
    module = modules.get(model_type, model_type.replace("-", "_"))
    home = _root() / "models" / module / f"configuration_{module}.py"
    try:
        classes = [
            *_classes(_root() / "configuration_utils.py", _BASE), *_classes(home, names[model_type])
        ]  # fmt: skip
    except (OSError, SyntaxError, KeyError):
        return None
    types: dict[str, str] = {}
    defaults: dict[str, object] = {}
    bounds: dict[str, tuple[float, float]] = {}
    aliases: dict[str, str] = {}
    for cls in classes:
        for node in cls.body:
            name, value = _assigned(node)
            if name == "attribute_map" and value is not None:
                aliases = ast.literal_eval(value)
            elif isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                types[name] = ast.unparse(node.annotation)
                default, limits = _default(value)
                defaults[name] = default
                if limits:
                    bounds[name] = limits
    for name in (name for cls in classes if cls.name != _BASE for name in _attributes(cls)):
        types.setdefault(name, "")
    return Declared(types, defaults, bounds, aliases)


@cache
def _root() -> Path:
    spec = find_spec("transformers")
    return Path(spec.origin).parent if spec is not None and spec.origin else Path()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def is_type(model_type: object) -> bool:
    """Whether transformers has a model of that type, or it is not known which it has."""
    known = _types()[0]
    return not known or model_type in known


@cache
def _types() -> tuple[dict[str, str], dict[str, str]]:
    """The configuration's class, and its module where that has another name, by model type; empty where unknown."""
    tables: dict[str, dict[str, str]] = {_NAMES: {}, _MODULES: {}}
    try:
        for file in ("auto_mappings.py", "configuration_auto.py"):
            for node in _tree(_root() / "models" / "auto" / file).body:
                name, call = _assigned(node)
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # `NAMES.update({…})`
                    name, call = ast.unparse(node.value.func).removesuffix(".update"), node.value
                if name in tables and isinstance(call, ast.Call):
                    mappings = [*call.args, *(word.value for word in call.keywords if word.arg is None)]
                    for mapping in (m for m in mappings if not isinstance(m, ast.Name)):
                        tables[name].update(ast.literal_eval(mapping))
    except (OSError, SyntaxError, ValueError):
        return {}, {}
    return tables[_NAMES], tables[_MODULES]


@cache
def _auto_classes() -> tuple[str, ...]:
    try:
        nodes = _tree(_root() / "models" / "auto" / "modeling_auto.py").body
    except (OSError, SyntaxError):
        return ()
    names = sorted(n.name for n in nodes if isinstance(n, ast.ClassDef) and n.name.startswith("AutoModelFor"))
    return tuple(names)


def _classes(path: Path, name: str) -> Iterator[ast.ClassDef]:
    """A class and those that it descends from, the most distant first, as far as they are in relative files."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in reversed(node.bases):
                yield from _classes(path, ast.unparse(base))
            yield node
            return
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and node.level and name in {a.asname or a.name for a in node.names}:
            file = path.parents[node.level - 1].joinpath(*(node.module or "").split(".")).with_suffix(".py")
            if file.is_file():
                yield from _classes(file, name)


def _assigned(node: ast.stmt) -> tuple[str, ast.expr | None]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    target = targets[0]
    return (target.id, getattr(node, "value", None)) if isinstance(target, ast.Name) else ("", None)


def _default(value: ast.expr | None) -> tuple[object, tuple[float, float] | None]:
    """A default that is written out, and its bounds: of `interval(min=0.0, max=1.0)(default=0.02)` both."""
    if value is None:
        return None, None
    with suppress(ValueError):
        return ast.literal_eval(value), None
    words = {w.arg: w.value for call in ast.walk(value) if isinstance(call, ast.Call) for w in call.keywords}
    try:
        plain = {name: ast.literal_eval(word) for name, word in words.items() if name in ("min", "max", "default")}
    except ValueError:
        return None, None
    return plain.get("default"), (plain["min"], plain["max"]) if {"min", "max"} <= plain.keys() else None


def _attributes(cls: ast.ClassDef) -> Iterator[str]:
    """What `__post_init__` sets besides the fields."""
    for start in (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"):
        stored = [n for n in ast.walk(start) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
        yield from (node.attr for node in stored if ast.unparse(node.value) == "self")
