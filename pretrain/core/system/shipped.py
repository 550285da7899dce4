"""The recipes, claims and their bases that come with the package: of the checkout, or inside an installed wheel."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from pretrain.core.errors import PretrainError, nearest
from pretrain.core.foreign.paths import expanded

PACKAGE = Path(__file__).resolve().parents[2]
RECIPES, CLAIMS = "recipes", "claims"
SHOWN = 5  # recipes of a folder that an error names


def shipped() -> Path:
    """The folder that holds `recipes/` and `claims/`: a wheel's own, else the checkout."""
    packed = PACKAGE / "shipped"
    return packed if packed.is_dir() else PACKAGE.parent


def shipped_recipes() -> list[str]:
    """What the recipes that come with the package are called: `quickstart`, `papers/stream-of-domains`."""
    home = shipped() / RECIPES
    return sorted(path.relative_to(home).with_suffix("").as_posix() for path in home.rglob("*.yaml"))


def shipped_file(path: Path | str) -> Path:
    """A path as it is, but for one that is not there and begins with `recipes` or `claims`: then the package's own."""
    path = expanded(path)
    packed_file = shipped() / path
    packed = not path.is_absolute() and path.parts[:1] in ((RECIPES,), (CLAIMS,))
    return packed_file if packed and not path.exists() and packed_file.exists() else path


def recipe_file(name: Path | str) -> Path:
    """A recipe's file: that of the path, else what comes with the package as `recipes/NAME.yaml` or `NAME`."""
    path = shipped_file(name)
    if path.is_file():
        return path
    known, asked = shipped_recipes(), path.as_posix().removesuffix(".yaml").removeprefix(f"{RECIPES}/")
    if asked in known:
        return shipped() / RECIPES / f"{asked}.yaml"
    if path.is_dir():
        inside = ", ".join(map(str, sorted(path.glob("*.y*ml"))[:SHOWN]))
        named = (path.with_name(f"{path.name}{ending}") for ending in (".yaml", ".yml"))
        meant = next((f" (did you mean {str(file)!r}?)" for file in named if file.is_file()), "")
        raise PretrainError(
            f"recipe {name} is a folder{meant}; accepted: a recipe's path" + (f": {inside}" if inside else "")
        )
    if path.exists():
        return path
    there = {str(file): file.stem for file in sorted(path.parent.glob("*.y*ml"))}
    near = get_close_matches(path.stem, there.values(), n=1)
    beside = [file for file, stem in there.items() if stem in near]
    hint = f" (did you mean {beside[0]!r}?)" if beside else nearest(asked, known)
    raise PretrainError(
        f"recipe {name} cannot be read: no such file{hint}; accepted: a recipe's path, or {', '.join(known)}"
    )


def base_file(folder: Path, name: str) -> Path:
    """A base of claims that lie in a folder: that beside them, else the package's."""
    packed = shipped() / CLAIMS / "bases" / name
    beside = folder / "bases" / name
    return packed if packed.is_file() and not beside.is_file() else beside


def claims_folder(given: Path) -> Path:
    """A folder of claims; `claims`, where it holds none, is what comes with the package."""
    return given if given != Path(CLAIMS) or any(given.glob("*.yaml")) else shipped() / CLAIMS
