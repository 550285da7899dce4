"""`pretrain plan` and `pretrain ladder`: what the dial chooses for a recipe, and the law that it goes by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.core.errors import PretrainError
from pretrain.core.quick import hub
from pretrain.core.quick.imports import uncollected
from pretrain.core.quick.quantities import time_in

Overrides = Annotated[list[str] | None, typer.Option("--set", help="STAGE.field=value; may be given many times.")]


def print_plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a train stage of size: auto.")],
    budget: Annotated[str | None, typer.Option(help="Another budget: 10min, flops=1e13, tokens=1e8.")] = None,
    set_: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
) -> None:
    """What the dial chooses for a recipe, and what is expected of it."""
    from pretrain import recipe as recipes
    from pretrain.forecast import check_ends, forecast
    from pretrain.identity import plan
    from pretrain.stages._size import known
    from pretrain.training.budget import UNITS

    with hub.offline():
        loaded = recipes.load(recipe, set_ or [], output)
        if budget is not None:
            seconds = time_in(budget)
            unit, _, limit = budget.partition("=") if seconds is None else ("seconds", "=", f"{seconds:g}")
            names = [each.stage for each in loaded.sizes]
            if unit not in UNITS or not limit:
                hint = f" (did you mean {budget}s, of seconds?)" if budget.isdecimal() else ""
                raise PretrainError(
                    f"--budget {budget!r}: accepted: a time (30min), or one of {', '.join(UNITS)}, as flops=1e13{hint}"
                )
            loaded = recipes.load(recipe, [*(set_ or []), *(f"{name}.budget.{unit}={limit}" for name in names)], output)
    if not loaded.sizes:
        raise PretrainError(f"{recipe}: no train stage says size: auto, so there is nothing to choose")
    forecasts = forecast(plan(loaded))
    check_ends(loaded, forecasts)
    expected = {each.item.stage.name: each.estimate for each in forecasts}
    made = {each.item.stage.name for each in forecasts if not each.to_run}
    for chosen in known(loaded.sizes, made):
        typer.echo("\n".join([f"{chosen.stage}:", *(f"  {line}" for line in chosen.lines(expected.get(chosen.stage)))]))


def ladder(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a train stage of size: auto.")],
    set_: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
) -> None:
    """Train small sizes of a recipe and fit the law of loss that the dial goes by."""
    from pretrain import recipe as recipes

    loaded = recipes.load(recipe, set_ or [], output)
    with uncollected():
        from pretrain.experiments.ladder import LAW, climb, summary

    law, settled = climb(loaded, typer.echo)
    typer.echo("\n".join([*summary(law, settled.choice), *settled.lines()]))
    typer.echo(f"to go by it: size: {{law: {loaded.output / 'ladder' / LAW}}}")
