"""`pretrain claim`: list the claims, run one, make the table of what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.core.errors import PretrainError, unknown

app = typer.Typer(help="What papers claim, tested at equal compute.", no_args_is_help=True)
Folder = Annotated[Path, typer.Option(help="Where the claim files lie.")]


@app.command("list")
def list_claims(folder: Folder = Path("claims")) -> None:
    """The claims with what is recorded of each."""
    from rich.console import Console
    from rich.table import Table

    from pretrain.experiments.claims import claims, recorded

    words: dict[str, list[str]] = {}
    for result in recorded(folder / "results"):
        words.setdefault(result["name"], []).append(f"{result['scale']}: {result['word']}")
    table = Table("claim", "paper", "what it says", "recorded")
    for name, claim in claims(folder).items():
        table.add_row(name, f"{claim.title} ({claim.arxiv})", claim.claim, "\n".join(words.get(name, [])))
    Console().print(table)


@app.command("run")
def run_claim(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Claims, or files of claims.")],
    scale: Annotated[str, typer.Option(help="smoke, cpu or gpu.")] = "smoke",
    folder: Folder = Path("claims"),
    output: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs") / "claims",
    jobs: Annotated[int, typer.Option(min=1, help="How many runs at once on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a ray cluster to run on.")] = None,
) -> None:
    """Run claims and record their results; what is finished is not run again."""
    from pretrain.experiments.claims import claims, load_claim, run

    known = claims(folder) if any(Path(name).suffix != ".yaml" for name in names) else {}
    for name in names:
        if Path(name).suffix != ".yaml" and name not in known:
            raise unknown("claim", name, known)
    for name in names:
        claim = load_claim(name) if Path(name).suffix == ".yaml" else known[name]
        result = run(claim, scale, output=output, jobs=jobs, ray=ray, say=lambda text: typer.echo(text, err=True))
        verdict, mean = result["verdict"], result["mean"]
        typer.echo(
            f"{claim.name}: {result['word']}: {claim.metric} {mean['method']:.4f} against {mean['baseline']:.4f}, "
            f"difference {verdict['difference']:+.4f} ({verdict['low']:+.4f} to {verdict['high']:+.4f})"
        )


@app.command("table")
def table(
    folder: Folder = Path("claims"),
    docs: Annotated[Path, typer.Option(help="Where claims.md and claims.html go.")] = Path("docs"),
) -> None:
    """Make the table and the page from the recorded results."""
    from pretrain.experiments.claims import recorded
    from pretrain.experiments.page import write

    results = recorded(folder / "results")
    if not results:
        raise PretrainError(f"no results in {folder / 'results'}; accepted: those that `pretrain claim run` records")
    for path in write(results, docs):
        typer.echo(str(path))
