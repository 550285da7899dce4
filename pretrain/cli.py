"""The command line. Heavy imports wait until a command needs them, so that help and lists answer at once."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain import __version__, cli_claim, cli_corpus, cli_exchange, cli_papers, cli_plan
from pretrain.cli_plan import Overrides
from pretrain.core.bounds import Count, Ge, NonNegative, Seed, Share
from pretrain.core.errors import PretrainError
from pretrain.core.folders import check_unused, has_chat_template, in_use, newest_checkpoint, run_of
from pretrain.core.foreign.code import TRUST, in_words
from pretrain.core.quick import hub
from pretrain.core.quick.imports import opening
from pretrain.core.quick.machine import others_at_work, share_cores
from pretrain.core.quick.quantities import duration, figure, quantity, short, time_in
from pretrain.core.registry import methods, use_methods
from pretrain.core.system.console import App
from pretrain.core.system.portable import held
from pretrain.core.system.usage import Commands
from pretrain.inference import chat as talking
from pretrain.inference import command as inferring
from pretrain.inference import measuring
from pretrain.inference.serving import command as serving
from pretrain.new import command as starting
from pretrain.records import Status
from pretrain.runs import command as runs

if TYPE_CHECKING:
    from pretrain.recipe import Recipe
    from pretrain.stages import Estimate

SMALL_DISK = 64e3  # bytes, of which nobody runs short: what is less is not told apart

app = App(
    name="pretrain", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False,
    help="The whole life of a pretrained model on a limited budget.",
)  # fmt: skip
app.add_typer(cli_claim.app, name="claim")
app.add_typer(runs.app, name="runs")
app.command("plan")(cli_plan.print_plan)
app.command("ladder")(cli_plan.ladder)
app.command("corpus")(cli_corpus.corpus)
app.command("papers")(cli_papers.list_papers)
app.command("methods")(cli_papers.list_methods)
app.command("new")(starting.new)
app.command("convert")(cli_exchange.convert)
app.command("export")(cli_exchange.export)
app.command("predict")(inferring.predict)


def _names(incomplete: str) -> list[str]:
    """Method names that begin so, for shell completion."""
    return [name for name in methods() if name.startswith(incomplete)]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    folders: Annotated[
        list[Path] | None,
        typer.Option("--methods", metavar="FOLDER", help="A folder of methods of your own; may be given many times."),
    ] = None,
) -> None:
    """The whole life of a pretrained model on a limited budget."""
    share_cores()
    for folder in folders or []:
        use_methods(folder)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a YAML file.")],
    set_: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Where to write; the recipe says by default.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where stages lie that many runs share.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it is expected to take.")] = False,
    why: Annotated[
        bool, typer.Option("--why", help="With --dry-run: say why each stage would run, or why not.")
    ] = False,
    refresh: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE", help="Run a finished stage again, and what depends on it; may be given many times."
        ),
    ] = None,
    ray: Annotated[
        str, typer.Option(metavar="ADDRESS", help="A Ray cluster whose cores share the operations of data stages.")
    ] = "",
) -> None:
    """Run a recipe, or what is left of it."""
    from pretrain import recipe as recipes

    if why and not dry_run:
        raise PretrainError("--why: accepted: together with --dry-run")
    with hub.offline() if dry_run else nullcontext():
        loaded = recipes.load(recipe, set_ or [], output)
    if dry_run:
        _print_plan(loaded, store, refresh or [], why)
        return
    check_unused(loaded.output)  # before what is large is imported
    from pretrain import engine
    from pretrain.runs.targets import made

    result = engine.run(
        loaded, store=store, refresh=refresh or [], ray=ray, say=lambda text: typer.echo(text, err=True)
    )  # fmt: skip
    if result.report:  # of several processes the first one's
        for line in made(result.folder):
            typer.echo(line)
        typer.echo(f"report: {result.report}")


@app.command()
def adopt(
    recipe: Annotated[Path, typer.Argument(help="A recipe, a YAML file.")],
    stage: Annotated[str, typer.Argument(help="The stage whose result it is.")],
    folder: Annotated[Path, typer.Argument(help="A corpus, a tokenizer or a checkpoint made elsewhere.")],
    link: Annotated[
        bool, typer.Option("--link", help="Link its files instead of copying them; of a checkpoint the weights.")
    ] = False,
    set_: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Where the run is; the recipe says by default.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where stages lie that many runs share.")] = None,
) -> None:
    """Take in a folder made elsewhere as the finished result of a recipe's stage."""
    from pretrain import adopt as adopting
    from pretrain import recipe as recipes

    loaded = recipes.load(recipe, set_ or [], output)
    adopting.adopt(loaded, stage, folder, store=store, link=link, say=typer.echo)


def _print_plan(recipe: Recipe, store: Path | None, refresh: list[str], reasons: bool) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from pretrain.forecast import check_documents, check_ends, check_fits, forecast, total, warnings
    from pretrain.identity import plan, why
    from pretrain.runs.shelf import check_output, check_place
    from pretrain.runs.targets import repointed
    from pretrain.stages._size import known

    check_output(recipe.output)
    if store is not None:
        check_place(store, "store")
    planned = plan(recipe, store, refresh)
    if reasons:
        width = max(len(item.stage.name) for item in planned)
        for item in planned:
            status = Status.FINISHED if item.finished else Status.RUNNING if item.running else Status.TO_RUN
            typer.echo(f"{item.stage.name:<{width}}  {status:<8}  {why(item)}")
    for item in planned:
        for line in repointed(item):
            typer.echo(f"{item.stage.name}: {line}")
        for code in (code for codes in item.stage.trusted_code(item.behind).values() for code in codes):
            typer.echo(f"{item.stage.name}: trust_remote_code: {in_words(code)}")
    odd = check_documents(recipe, planned)
    names = ("stage", "kind", "status", "FLOPs", "memory", "time", "disk", "passes")
    table = Table(*names, title=f"{recipe.name} in {recipe.output}: about", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in table.columns[3:]:
        column.no_wrap, column.justify = True, "right"
    expected = forecast(planned)
    try:
        check_ends(recipe, expected)
    except PretrainError:  # numbers that no table has room for, and nobody reads
        check_fits(expected)
        raise
    for each in expected:
        stage, cells = each.item.stage, _cells(each.ahead) if each.to_run else ("-",) * 5
        state = f"{each.done:.0%} done" if each.done else Status.TO_RUN if each.to_run else Status.FINISHED
        state = Status.RUNNING if each.item.running else state
        table.add_row(stage.name, stage.stage, state, *cells)
    table.add_section()
    table.add_row("total", "", "", *_cells(total(expected)))
    Console().print(table)
    for each in expected:
        if each.to_run and each.estimate.basis:
            typer.echo(f"note: {each.item.stage.name} is not made yet: {each.estimate.basis}")
    made = {each.item.stage.name for each in expected if not each.to_run}
    for chosen in (each for each in known(recipe.sizes, made) if each.stage not in made):
        for line in chosen.warnings():
            typer.echo(f"[{chosen.stage}] {line}")
    for line in warnings(expected, note=True):
        typer.echo(f"note: {line}")
    for line in [*odd, *warnings(expected)]:
        typer.echo(f"warning: {line}")
    if held(recipe.output / ".lock"):
        typer.echo(f"note: {in_use(recipe.output)}")
    if busy := others_at_work():
        typer.echo(f"note: {busy}")
    check_fits(expected)


def _disk(count: float) -> str:
    """Bytes on the disk, in words: plans hold within 30%, or within 64 kB where that is more."""
    return short(count, "B") if count >= SMALL_DISK else f"<{short(SMALL_DISK, 'B')}"


def _cells(guess: Estimate) -> tuple[str, ...]:
    size = partial(short, unit="B")
    columns = (
        (guess.flops, short), (guess.memory_bytes, size), (guess.seconds, duration), (guess.disk_bytes, _disk),
        (guess.passes, partial(figure, digits=2)),
    )  # fmt: skip
    return tuple("-" if value is None else write(value) for value, write in columns)


PLAIN = {  # what has another name elsewhere, and the option for it
    "greedy": "--temperature 0", "sampling": "--temperature 0.8", "sample": "--temperature 0.8",
    "nucleus": "--top-p 0.95", "top_p": "--top-p 0.95",
}  # fmt: skip


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a stage that wrote one, or a run.")],
    prompt: Annotated[str, typer.Option(help="What to continue; '-' reads it from standard input.")] = "",
    method: Annotated[
        str | None, typer.Option(help="Decoding: NAME, or {method: NAME, field: value}.", autocompletion=_names)
    ] = None,
    max_new_tokens: Annotated[Count, typer.Option()] = 64,
    temperature: Annotated[NonNegative | None, typer.Option(help=measuring.TEMPERATURE)] = None,
    top_p: Annotated[Share | None, typer.Option(help=measuring.TOP_P)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the continuation.")] = None,
    seed: Annotated[Seed, typer.Option()] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take the prompt as a user's message, in the checkpoint's chat template.")
    ] = False,
    token_healing: Annotated[
        bool, typer.Option(help="Write the prompt's last word anew, in tokens that go on with it.")
    ] = True,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=TRUST)] = False,
) -> None:
    """Continue a prompt with a checkpoint, or answer it as a chat.

    What else its generation_config.json says of tokens (top_k, min_p, penalties) holds.
    """
    from pretrain.stages.decode import continue_prompt
    from pretrain.stages.evaluate import load_text

    if (way := PLAIN.get(str(method))) is not None:
        raise PretrainError(f"--method {method}: the plain loop does that; accepted: {way}, without --method")
    chosen = [method] if method else []
    # What is wrong with it is said before anything large is imported.
    measuring.methods_of(chosen, "decoding", "--method: ")
    place = newest_checkpoint(checkpoint)
    templated = has_chat_template(place)
    if chat and not templated:
        raise PretrainError(f"--chat: the tokenizer of {place} has no chat template; accepted: a prompt without --chat")
    with opening(place, trust_remote_code):
        decoding = next(iter(measuring.methods_of(chosen, "decoding", "--method: ")), None)
        model, tokenizer = load_text(place, decoding.load if decoding else None)
    if templated and not chat:
        typer.echo("note: the prompt is taken as plain text; --chat uses the checkpoint's chat template", err=True)
    text = talking.in_utf8(sys.stdin.read, "--prompt -") if prompt == "-" else prompt
    sample = continue_prompt(
        model,
        tokenizer,
        text,
        method=decoding,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=stop or (),
        seed=seed,
        chat=chat,
        token_healing=token_healing,
    )
    typer.echo(sample["continuation"] if chat else text + sample["continuation"])
    if not sample["continuation"].strip():
        typer.echo("note: the model has ended the text at once; another --seed or prompt may go on", err=True)


app.command()(talking.chat)
app.command()(serving.serve)
app.command()(measuring.evaluate)


def _positive(word: str) -> float:
    """The number that a word says; 0 where it says none above it."""
    try:
        read = quantity(word)
        return max(0.0, float(word) if read is None else float(read))
    except ValueError:
        return 0.0


@app.command()
def compare(
    recipes: Annotated[list[Path], typer.Argument(help="The baseline, then the recipes to judge against it.")],
    budget: Annotated[str, typer.Option(help="flops=NUMBER, the same for each run.")],
    seeds: Annotated[Count, typer.Option(help="How many seeds, 2 or more: 0, 1, …")] = 3,
    metric: Annotated[
        str | None,
        typer.Option(help="A held-out metric that training logs; by default the loss, of labels the accuracy or mse."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="STAGE.field=value, for all the recipes.")] = None,
    output: Annotated[Path, typer.Option(help="Where to write.")] = Path("runs") / "compare",
    jobs: Annotated[Count, typer.Option(help="How many runs at once on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a ray cluster to run on.")] = None,
    rates: Annotated[
        Count, typer.Option(help="How many peak rates of each recipe are tried first, at a third of the budget each.")
    ] = 1,
) -> None:
    """Compare recipes at equal FLOPs over several seeds."""
    from rich.console import Console
    from rich.table import Table

    from pretrain.experiments.compare import COLUMNS, to_reach
    from pretrain.experiments.compare import compare as measure
    from pretrain.training.budget import UNITS

    unit, _, amount = budget.partition("=")
    flops = _positive(amount)
    if unit != "flops" or not flops:
        why = "; recipes are compared at equal compute, and as many tokens, steps or seconds cost each another amount"
        words = why if unit in {*UNITS} - {"flops"} or time_in(budget) is not None else ""
        hint = "" if amount or not _positive(unit) else f" (did you mean flops={unit}?)"
        raise PretrainError(f"--budget {budget!r}: accepted: flops=NUMBER, for example flops=1e13{hint}{words}")
    result = measure(
        recipes, flops=flops, seeds=seeds, metric=metric, output=output, overrides=set_ or [], jobs=jobs,
        ray=ray, rates=rates, say=lambda text: typer.echo(text, err=True), progress=True,
    )  # fmt: skip
    measured = f"{result['metric']}, {result['better']} is better (mean ± s.d.)"
    table = Table(
        "recipe", measured, "difference, 97% interval", "verdict", "FLOPs to the baseline's end",
        "peak rate",
    )  # fmt: skip
    for name, row in result["table"].items():
        verdict, share = row.get("verdict"), to_reach(row)
        interval = f"{verdict['difference']:+.4f} ({verdict['low']:+.4f} to {verdict['high']:+.4f})" if verdict else ""
        word = verdict["word"] if verdict else "baseline"
        cells = (f"{row['mean']:.4f} ± {row['deviation']:.4f}", interval, word, share)
        table.add_row(name, *cells, row["rate"]["words"])
    Console().print(table)
    for line in [COLUMNS, *result["notes"], f"written: {output / 'comparison.json'}, {output / 'comparison.svg'}"]:
        typer.echo(line)


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Write a run's report again."""
    from pretrain.report.page import write
    from pretrain.report.watch import running

    folder = run_of(run_folder)
    typer.echo(str(write(folder, running=running(folder))))


@app.command()
def watch(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    every: Annotated[float, Ge(1), typer.Option(help="Seconds between two looks.")] = 5.0,
) -> None:
    """Keep a running run's report up to date; the open page follows by itself."""
    from pretrain.report.watch import watch as follow

    typer.echo(str(follow(run_folder, every=every, say=typer.echo)))
