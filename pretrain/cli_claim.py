"""`pretrain claim`: list the claims, run one, make the table of what was recorded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from pretrain.core.bounds import Count, NonNegative
from pretrain.core.errors import PretrainError, unknown
from pretrain.core.system.console import App
from pretrain.core.system.shipped import claims_folder, shipped_file

app = App(name="claim", help="What papers claim, tested at equal compute.", no_args_is_help=True)
Folder = Annotated[Path, typer.Option(help="Where the claim files lie.")]


def _results(folder: Path) -> list[Path]:
    """Where results lie: those that come with the package, and those recorded here."""
    return list(dict.fromkeys((claims_folder(folder) / "results", folder / "results")))


@app.command("list")
def list_claims(folder: Folder = Path("claims")) -> None:
    """The claims with what is recorded of each."""
    from rich.console import Console
    from rich.table import Table

    from pretrain.experiments.claims import claims
    from pretrain.experiments.results import recorded
    from pretrain.experiments.table import word_of

    words: dict[str, list[str]] = {}
    for result in recorded(*_results(folder)):
        words.setdefault(result["name"], []).append(f"{result['scale']}: {word_of(result)}")
    table = Table("claim", "paper", "what it says", "recorded")
    for name, claim in claims(claims_folder(folder)).items():
        table.add_row(name, f"{claim.title} ({claim.arxiv})", claim.claim, "\n".join(words.get(name, [])))
    Console().print(table)


@app.command("run")
def run_claims(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Claims, or files of claims.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All claims of the folder.")] = False,
    scale: Annotated[str, typer.Option(help="smoke, cpu or gpu.")] = "smoke",
    folder: Folder = Path("claims"),
    output: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs") / "claims",
    jobs: Annotated[Count, typer.Option(help="How many runs at once on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a ray cluster to run on.")] = None,
    hours: Annotated[NonNegative | None, typer.Option(help="Begin no run after so many hours.")] = None,
) -> None:
    """Run claims and record their results, the cheapest first; what is finished is not run again."""
    from pretrain.experiments.claims import claims, load_claim
    from pretrain.experiments.queue import run

    names = names or []
    if every == bool(names):
        raise PretrainError(f"claims {', '.join(names) or 'none'}: accepted: names of claims, or --all")
    known = claims(claims_folder(folder)) if every or any(Path(name).suffix != ".yaml" for name in names) else {}
    for name in names:
        if Path(name).suffix != ".yaml" and name not in known:
            raise unknown("claim", name, known)
    chosen = list(known.values()) if every else []
    chosen += [load_claim(shipped_file(name)) if Path(name).suffix == ".yaml" else known[name] for name in names]
    seconds = math.inf if hours is None else hours * 3600
    results = folder / "results" if claims_folder(folder) != folder else None  # a package is no place to write to
    _, failed = run(chosen, scale, output=output, results=results, jobs=jobs, ray=ray, seconds=seconds, say=typer.echo)
    if failed:
        raise PretrainError(f"{len(failed)} of {len(chosen)} claims were set aside: {'; '.join(failed.values())}")


@app.command("table")
def table(
    folder: Folder = Path("claims"),
    docs: Annotated[Path, typer.Option(help="Where claims.md and claims.html go.")] = Path("docs"),
) -> None:
    """Make the table and the page from the recorded results."""
    from pretrain.experiments.page import write
    from pretrain.experiments.results import recorded

    results = recorded(*_results(folder))
    if not results:
        raise PretrainError(f"no results in {folder / 'results'}; accepted: those that `pretrain claim run` records")
    for path in write(results, docs):
        typer.echo(str(path))
