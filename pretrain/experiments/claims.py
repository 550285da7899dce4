"""Claims: a paper's headline as an experiment at equal compute.

A claim is a YAML file: a shared base recipe, what the baseline and the method change in it, a metric, a budget by scale
and the values of a field, normally the learning rate, that both sides begin their search with. How it is tested says
`protocol`, `queue` runs it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pretrain.core.errors import PretrainError, unknown
from pretrain.core.foreign import yaml
from pretrain.core.system.shipped import base_file
from pretrain.experiments.protocol import SIDES, Point, Value
from pretrain.experiments.trials import Fields, Trial
from pretrain.recipe import put, read

SCALES = ("smoke", "cpu", "gpu")
TRAINED = "model"  # the stage that gets the budget, by agreement between claims and their bases


class Side(BaseModel):
    """What a side changes in the base: `insert` puts stages before a stage, then `set` sets fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    set: Fields = {}
    insert: dict[str, list[Fields]] = {}


class Tune(BaseModel):
    """The field that both sides search, and each side's values: as many for one as for the other."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    field: str
    baseline: list[object] = Field(min_length=1)
    method: list[object] = Field(min_length=1)

    @model_validator(mode="after")
    def _as_many(self) -> Tune:
        if len(self.baseline) != len(self.method):
            raise ValueError(
                f"{len(self.baseline)} values against {len(self.method)}: accepted: as many for both sides"
            )
        return self


class Size(BaseModel):
    """The budget of a run in the claim's unit, and what is set: by both sides, before anything is inserted, and by one
    side at the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    budget: float = Field(gt=0)
    set: Fields = {}
    baseline: Fields = {}
    method: Fields = {}

    def over(self, other: Size) -> Fields:
        """These fields beside, and before, those of another size."""
        names = ("set", "baseline", "method")
        return {"budget": self.budget} | {name: getattr(other, name) | getattr(self, name) for name in names}


class Scale(Size):
    """What is set at a scale. `seeds`: as many, whatever the rule for adding seeds says; 0: by the rule. `sizes`: the
    same at other sizes and budgets, for what is said to save compute: one by one, and with the trend between them."""

    seeds: int = Field(0, ge=0)
    sizes: dict[str, Size] = {}


class Claim(BaseModel):
    """A claim file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str
    arxiv: str
    claim: str
    base: str
    metric: str
    better: Literal["lower", "higher"] = "lower"
    also: tuple[str, ...] = ()  # more metrics, recorded and shown beside the one that is judged
    equal: Literal["flops", "tokens", "steps", "none"] = "flops"
    curve: str | None = "loss"
    baseline: Side
    method: Side
    tune: Tune | None = None
    scales: dict[str, Scale]
    path: Path = Path()
    size: str = Field("", exclude=True)  # which of the sizes of a scale, "": the scale's own

    @field_validator("scales", mode="before")
    @classmethod
    def _known_scales(cls, value: object) -> object:
        if not isinstance(value, dict) or not value or set(value) - set(SCALES):
            raise ValueError(f"{value!r}: accepted: a budget for one or more of {', '.join(SCALES)}")
        return {k: v if isinstance(v, dict) else {"budget": v} for k, v in value.items()}

    @property
    def name(self) -> str:
        """The claim's name: that of its file."""
        return self.path.stem

    @property
    def label(self) -> str:
        """The name, and the size where it is another than the scale's own."""
        return self.name + (f"@{self.size}" if self.size else "")

    def sized(self, scale: str) -> list[Claim]:
        """The claim at the scale's own size and at each of its others, which are claims of their own."""
        here = self.scales.get(scale)
        if here is None:
            raise unknown(f"scale of claim {self.name!r}", scale, self.scales)
        others = {name: here.model_copy(update=size.over(here) | {"sizes": {}}) for name, size in here.sizes.items()}
        return [self] + [
            self.model_copy(update={"scales": self.scales | {scale: other}, "size": name})
            for name, other in others.items()
        ]

    def recipe(self, side: str, scale: str, share: float = 1.0) -> Fields:
        """The recipe of one side at a scale; the budget of the trained stage is not in it yet.

        A stage's budget may be a share of the run's; of a run with a `share` of the FLOPs it gets that much less.
        """
        if scale not in self.scales:
            raise unknown(f"scale of claim {self.name!r}", scale, self.scales)
        raw, _ = read(base_file(self.path.parent, f"{self.base}-{scale}.yaml"))
        chosen: Side = getattr(self, side)
        where = f"{self.path}: {side}"
        _set(raw, self.scales[scale].set, f"{self.path}: scales.{scale}.set")
        for before, stages in chosen.insert.items():
            _insert(raw, before, stages, where)
        _set(raw, chosen.set, f"{where}.set")
        _set(raw, getattr(self.scales[scale], side), f"{self.path}: scales.{scale}.{side}")
        whole = self.scales[scale].budget * (share if self.equal == "flops" else 1)
        for stage in raw["stages"]:
            if set(stage.get("budget") or {}) == {"share"}:
                unit = self.equal if self.equal != "none" else "steps"
                stage["budget"] = {unit: stage["budget"]["share"] * whole}
        return raw

    def grids(self) -> dict[str, list[Value]]:
        """What each side's search begins with."""
        return {side: list(getattr(self.tune, side)) if self.tune else [None] for side in SIDES}

    def trial(self, scale: str, point: Point, work: Path) -> Trial:
        """The run that a point of the protocol stands for."""
        raw = self.recipe(point.side, scale, point.share)
        name = f"{self.label}-{point.side}-{point.seed}"
        if self.tune is not None:
            put(raw, self.tune.field, point.value, f"{self.path}: tune.field")
            name += f"-{point.value}" if point.split == "validation" else ""
        for stage in raw["stages"]:
            if stage.get("stage") == "evaluate":
                stage["split"] = point.split
        raw |= {"seed": point.seed, "name": name.replace("@", "-")}  # a run's name is that of a folder
        short = "-short" if point.share < 1 else ""
        return Trial(
            name=name + short, recipe=raw, output=str(work / name) + short,
            store=str(work / "stages"), trained=TRAINED, unit=self.equal,
            amount=self.scales[scale].budget * point.share, metric=self.metric, also=self.also, curve=self.curve,
        )  # fmt: skip


def _set(raw: Fields, given: Fields, where: str) -> None:
    for name, value in given.items():
        put(raw, name, copy.deepcopy(value), where)


def _names(raw: Fields) -> list[str]:
    return [stage.get("name", stage.get("stage", "")) for stage in raw["stages"]]


def _insert(raw: Fields, before: str, stages: list[Fields], where: str) -> None:
    """Put in stages. `like` copies a stage, `set` changes the copy."""
    for given in stages:
        stage, names = copy.deepcopy(given), _names(raw)
        like, changes = stage.pop("like", None), stage.pop("set", {})
        for name in filter(None, (before, like)):
            if name not in names:
                raise unknown(f"stage in {where}.insert", name, names)
        if like is not None:
            stage = copy.deepcopy(raw["stages"][names.index(like)]) | stage
        label = stage.get("name", stage.get("stage", ""))
        _set({"stages": [stage]}, {f"{label}.{name}": value for name, value in changes.items()}, f"{where}.insert")
        raw["stages"].insert(names.index(before), stage)


def load_claim(path: Path | str) -> Claim:
    """Read and check a claim file; a mistake is one line that names the file and the field."""
    path = Path(path)
    try:
        raw, _ = yaml.loads(yaml.read_text(path), str(path))
    except PretrainError as error:
        raise PretrainError(f"claim {error}") from error
    if not isinstance(raw, dict):
        raise PretrainError(f"{path}: accepted: a mapping with {', '.join(Claim.model_fields)}")
    try:
        return Claim.model_validate(raw | {"path": path})
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        place, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            raise PretrainError(f"{path}: {place}: unknown field; accepted: {', '.join(Claim.model_fields)}") from error
        raise PretrainError(f"{path}: {place}: {message}") from error


def claims(folder: Path | str) -> dict[str, Claim]:
    """The claims of a folder by name."""
    return {path.stem: load_claim(path) for path in sorted(Path(folder).glob("*.yaml"))}
