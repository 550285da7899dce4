"""The methods by the names of their classes: `pretrain.methods.LoRA(rank=4)`; each is imported when it is asked for.

`dir(pretrain.methods)` lists them, those from outside (`pretrain.use_methods`) among them. For editors and type
checkers `__init__.pyi` says the same of those of this package; `make docs` writes it.
"""

from pretrain.core.errors import nearest, warn
from pretrain.core.method import method_class
from pretrain.core.registry import methods as _known


def _names() -> dict[str, str]:
    """The methods' names by those of their classes; of several of one name the first counts, so ours."""
    return {row.cls: name for name, row in reversed(_known().items())}


def __getattr__(name: str) -> type:
    names = _names()
    if name in names:
        alike = [str(row.path) for row in _known().values() if row.cls == name and not row.ours]
        if len(alike) > 1 and not _known()[names[name]].ours:
            warn(f"pretrain.methods.{name} is of {alike[0]}; of that name too: {', '.join(alike[1:])}")
        return method_class(names[name])
    if name.startswith("_"):
        raise AttributeError(name)
    alike = {known.lower(): known for known in names}.get(name.lower())
    raise AttributeError(
        f"unknown method {name!r}" + (f" (did you mean {alike!r}?)" if alike else nearest(name, names))
    )


def __dir__() -> list[str]:
    return sorted(_names())
