"""The report: one self-contained HTML page of a run, made from the files that its stages wrote.

Nothing is fetched when it is opened: styles, data and the drawing are in the file. A run that is still going, or that
was interrupted, gives a report of what there is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pretrain.core.errors import PretrainError
from pretrain.core.files import write_text
from pretrain.core.quick.quantities import duration, figure, short
from pretrain.records import Metrics, accounted, contradicting, of_pages
from pretrain.report import foretold
from pretrain.report import samples as report_samples
from pretrain.report.advice import yardstick
from pretrain.report.charts import bits_chart, changes
from pretrain.report.classes import classes, confident
from pretrain.report.data import BITS, CorpusRow, Page, StageRow, Trained
from pretrain.report.data import collect as collect
from pretrain.report.data import with_bigrams as with_bigrams
from pretrain.report.documents import documents
from pretrain.report.funnel import funnel
from pretrain.report.held_out import Evaluated, heading
from pretrain.report.markup import Html, fill, join, part, script_json, table, tag
from pretrain.report.numbers import last
from pretrain.report.summary import Headline, headline, summarise

HEADS = ("stage", "kind", "status", "methods", "time", "FLOPs", "peak memory", "address")
BESIDE = {  # a metric of labels: what stands beside it
    "accuracy": dict.fromkeys(("accuracy_of_counts", "naive_bayes"), "word counts")
    | {"majority": "the commonest alone"},
    "mse": {"mse_of_counts": "word counts", "mse_of_mean": "the mean alone"},
}
CHARTS = ("rate", "norm", "speed", "mfu")
TOLD = 0.01  # of a training, that went to measuring: less is not told


def write(folder: Path | str, *, running: str = "", every: int = 0) -> Path:
    """Write `report.html` into a run's folder and return its path.

    While the stage `running` runs, the page loads itself again `every` so many seconds.
    """
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise PretrainError(f"{folder} is not a run (no run.json); accepted: the folder that `pretrain run` wrote")
    data = collect(folder)
    if not running:
        with_bigrams(data, folder)
    parts: dict[str, object] = {
        "TITLE": data["run"]["name"],
        "HEADING": data["run"]["name"],
        "STYLE": part("style.css"),
        "DATA": script_json({"trainings": data["trainings"], "plots": data["plots"], "reload": every}),
        "BODY": _body(data, running),
        "ELEMENTS": part("elements.js"),
        "DRAW": part("draw.js"),
    }
    write_text(folder / "report.html", fill(part("page.html"), parts))
    return folder / "report.html"


def _body(data: Page, running: str) -> Html:
    about = headline(data)
    summary = summarise(data, running)
    command = [tag("pre", summary.command, class_="command")] if summary.command else []
    first = tag("p", summary.result, " ", summary.judgement, class_="first")
    parts = [tag("div", first, tag("p", summary.advice), *command, class_="lead")]
    parts.append(_cards(data, about))
    if data["trainings"]:
        parts.append(_section("Training", _curves(data)))
    if data["bars"]:
        parts.append(_section(heading(data["bars"]), join(map(bits_chart, range(len(data["bars"])), data["bars"]))))
    if drawn := changes(data):
        parts.append(_section("What each stage changed", drawn))
    corpora = {corpus["name"] for corpus in data["corpora"]}
    samples: dict[str, Html] = {}
    left = report_samples.MAX_BYTES
    for group in data["samples"]:
        panel, left = report_samples.panel(group.get("samples") or [], left)
        title = "Samples" if group["name"] == "samples" else f"Samples: {group['name']}"
        samples |= {group["name"]: _section(title, panel)} if panel else {}
    parts += [panel for name, panel in samples.items() if name not in corpora]
    if data["evaluations"]:
        parts.append(_section("Evaluations", _evaluation_table(data["evaluations"])))
    for evaluation in data["evaluations"]:
        if confusion := evaluation.get("confusion"):
            shown = join(
                [classes(confusion, evaluation.get("split", "test")), confident(evaluation.get("mistakes") or [])]
            )
            parts.append(_section(f"Classes: {evaluation['name']}", shown))
    parts += [panel for name, panel in samples.items() if name in corpora]  # what a model makes is asked for first
    parts += [_section(f"Corpus: {corpus['name']}", _corpus_table(corpus)) for corpus in data["corpora"]]
    parts.append(_section("Stages", _stage_table(data["stages"])))
    parts.append(_section("Lineage", _lineage_table(data["stages"])))
    parts.append(_details("Recipe", data["recipe"]))
    parts.append(_details("Environment", json.dumps(data["environment"], indent=2)))
    metrics = {s["name"]: s["metrics"] for s in data["stages"] if s.get("metrics")}
    parts.append(_details("All metrics", json.dumps(metrics, indent=2)))
    return join(parts, "\n")


def _curves(data: Page) -> Html:
    """Buttons for the axis and places for the curves, which `draw.js` fills."""
    names = {"tokens": unit_of(data["trainings"]), "flops": "FLOPs", "seconds": "seconds"}
    buttons = [
        tag("button", name, data_axis=axis, class_="on" if axis == "tokens" else None) for axis, name in names.items()
    ]
    losses = [tag("div", class_="chart tall", id=f"loss-{i}") for i in range(len(data["plots"]))]
    kept = [t["name"] for t in data["trainings"] if "kept" in t]
    if kept:
        note = (
            "A ring is where the weights that were kept were measured: the best by the measure that the recipe names."
        )
        losses.insert(0, tag("p", note, class_="note"))
    others = [tag("div", class_="chart", id=name) for name in CHARTS]
    axes = tag("div", *buttons, class_="axes", role="group", aria_label="horizontal axis")
    return join([axes, *losses, tag("div", *others, class_="pair")])


def unit_of(trainings: Iterable[Trained]) -> str:
    """What the axis of tokens counts: images, steps of series, …; `tokens` where trainings differ."""
    units = {training["unit"] for training in trainings}
    return units.pop() if len(units) == 1 else "tokens"


def _section(title: str, inner: Html) -> Html:
    return tag("section", tag("h2", title), inner)


def _details(title: str, text: str) -> Html:
    return tag("section", tag("details", tag("summary", title), tag("pre", text)))


def _cards(data: Page, about: Headline) -> Html:
    """Of the last model what is measured; of all stages what they took."""
    cards: list[tuple[str, str, str]] = []
    model, evaluation = about.model, about.evaluation
    metrics: Metrics = (evaluation["metrics"] if evaluation else {}) or {}
    split = evaluation.get("split", "test") if evaluation else ""
    if evaluation and BITS in metrics:
        tools = {tool: (v.get("metrics") or {}).get(BITS) for tool, v in (evaluation.get("compressors") or {}).items()}
        read = ((model["lineage"] or {}) if model else {}).get("tokens")
        counted = f"pairs in the {short(read)} tokens read" if read else "pairs of tokens"  # more text, a lower line
        whole = {"in all training text": evaluation.get("bigram_whole")}
        rivals = {counted: evaluation.get("bigram")} | whole | tools
        if (before := foretold.expected(data, model)) is not None:
            rivals[f"expected on {before[1]}"] = before[0]
        note = ", ".join(f"{tool} {bits:.2f}" for tool, bits in rivals.items() if bits is not None)
        cards.append((f"bits per byte, {split}", f"{metrics[BITS]:.3f}", note))
    for name, beside in BESIDE.items():
        if name in metrics:
            best = yardstick(evaluation) if evaluation else None
            named = beside | ({best.baseline: best.short} if best and best.reads else {})
            note = "; ".join(f"{words}: {figure(metrics[each])}" for each, words in named.items() if each in metrics)
            cards.append((name, figure(metrics[name]), note))
    for name, title, note in (
        ("macro_f1", "macro F1", "each class alike"),
        ("f1", "F1", "whole entities"),
        ("pearson", "Pearson", "correlation"),
        ("perplexity", "perplexity", f"a token, {split}"),
        ("probe_accuracy", "probe accuracy", "on frozen states"),
        ("ndcg@10", "nDCG@10", "halves of documents"),
    ):
        if name in metrics:
            cards.append((title, figure(metrics[name]), note))
    if model and model["weights"]:
        cards.append(("model", short(model["weights"]), f"weights, {short(model['bytes'], 'B')}"))
    cards += _spent(data)
    inner = [tag("div", tag("span", a), tag("b", b), tag("small", c), class_="card") for a, b, c in cards]
    return tag("div", *inner, class_="cards")


def _spent(data: Page) -> list[tuple[str, str, str]]:
    """Totals over all stages; of one that has not finished, what its log has."""
    cards = []
    logs = {t["name"]: t for t in data["trainings"]}
    flops = sum(
        s["flops"] or last(logs[s["name"]]["step"]["flops"] if s["name"] in logs else []) for s in data["stages"]
    )
    if data["trainings"]:
        alike = len({t["unit"] for t in data["trainings"]}) == 1
        counted = data["trainings"] if alike else data["trainings"][-1:]
        count = short(sum(last(t["step"]["tokens"]) for t in counted))
        speed, share = _speed(data["trainings"][-1])
        last_of = f"“{data['trainings'][-1]['name']}”" if len(data["trainings"]) > 1 else ""
        whose = "" if not last_of else "in all trainings" if alike else f"in {last_of} alone"
        at = f" in {last_of}" if last_of else ""  # the speed is of the last, the totals are of all
        pace = f"{short(speed)} a second{at if alike else ''}" if speed else ""
        measuring = _measured_share(data["trainings"][-1])
        pace += f", measuring took {measuring:.0%} of its time" if pace and measuring >= TOLD else ""
        used = f"{share:.0%} of the machine's matrix rate{at}" if share else ""
        notes = (", ".join(filter(None, (whose, pace))), ", ".join(filter(None, ("in all stages" if at else "", used))))
        cards += [(counted[-1]["unit"], count, notes[0]), ("FLOPs", short(flops), notes[1])]
    elif flops:
        cards.append(("FLOPs", short(flops), ""))
    unfinished = (last(t["step"]["elapsed"]) for t in data["trainings"] if _unfinished(data, t["name"]))
    total = sum(s["seconds"] or 0 for s in data["stages"]) + sum(unfinished)
    memory = max((s["peak_memory_bytes"] or 0 for s in data["stages"]), default=0)
    cards.append(("time", duration(total), f"peak {short(memory, 'B')}" if memory else ""))
    return cards


def _speed(training: Trained) -> tuple[float, float]:
    """Of its steps alone: tokens a second, and the share of the machine's rate.

    A log of before does not say what its first steps took to make shapes: it is a little quicker than it was.
    """
    step = training["step"]
    seconds = last(step["seconds"]) + last(step["preparing"])
    speed = last(step["tokens"]) / seconds if seconds else 0.0
    steps = zip(step["mfu"], step["tokens_per_second"], strict=True)
    costs = sorted(mfu / tokens for mfu, tokens in steps if mfu and tokens)
    return speed, costs[len(costs) // 2] * speed if costs else 0.0


def _measured_share(training: Trained) -> float:
    """The share of a training's time that held-out measurements took; 0 where its log does not say."""
    times = [(last(part["measuring"]), last(part["elapsed"])) for part in (training["step"], training["evaluation"])]
    measuring, elapsed = max(times)
    return measuring / elapsed if elapsed else 0.0


def _unfinished(data: Page, name: str) -> bool:
    return any(s["name"] == name and s["seconds"] is None for s in data["stages"])


def _stage_table(stages: Sequence[StageRow]) -> Html:
    rows = []
    for s in stages:
        peak, seconds, spent = s["peak_memory_bytes"], s["seconds"], s["flops"]
        memory = short(peak, "B") if peak else ""
        took = duration(seconds) if seconds is not None else ""
        flops, used = short(spent) if spent else "", ", ".join(s["methods"] or {})
        rows.append((s["name"], s["stage"], s["status"], used, took, flops, memory, s["address"][:8]))
    return table(HEADS, rows)


def _lineage_table(stages: Sequence[StageRow]) -> Html:
    """What each stage read and wrote; of a checkpoint, what its weights were trained with and all stages behind it."""
    rows = []
    for s in stages:
        lineage = s["lineage"] or {}
        reads = dict.fromkeys(
            name for names in (s["inputs"] or {}).values() for name in (names if isinstance(names, list) else [names])
        )
        counts = {lineage.get("unit", "tokens"): lineage.get("tokens"), "FLOPs": lineage.get("flops")}
        spent = ", ".join(f"{short(value)} {name}" for name, value in counts.items() if value)
        if cut := lineage.get("texts_cut"):
            spent += f"; {cut:,.0f} of {lineage.get('texts_read', 0):,.0f} texts cut to length"
        chain = " → ".join([stage.get("name", "?") for stage in lineage.get("stages") or []] + [s["name"]])
        wrote, data = f"{s['folder']}/{s['writes']}" if s["writes"] else "", str(lineage.get("data") or "")[:12]
        rows.append((s["name"], ", ".join(reads), wrote, spent, data, chain if lineage else ""))
    return table(("stage", "reads", "writes", "trained", "data fingerprint", "made by"), rows)


def _corpus_table(corpus: CorpusRow) -> Html:
    """Documents and bytes by domain and split, the largest domain first."""
    splits = corpus.get("domains") or {}
    size = {d: sum(s.get(d, {}).get("bytes", 0) for s in splits.values()) for s in splits.values() for d in s}

    def cell(counts: Iterable[dict[str, int]]) -> str:
        tables = list(counts)
        documents, data = (sum(c.get(k, 0) for c in tables) for k in ("documents", "bytes"))
        return f"{documents:,} · {short(data, 'B')}"

    rows = [
        (domain, *(cell([by_domain.get(domain, {})]) for by_domain in splits.values()))
        for domain in sorted(size, key=lambda d: (-size[d], d))
    ]
    rows.append(("all", *(cell(by_domain.values()) for by_domain in splits.values())))
    note = f"Documents · bytes; {accounted(corpus)}. Fingerprint {str(corpus.get('fingerprint', ''))[:12]}."
    if pages := of_pages(corpus.get("pages") or {}):
        note += f" {pages}."
    dropped = funnel(corpus.get("funnel") or [], corpus["name"])
    counted = [tag("p", note, class_="note"), table(("domain", *splits), rows)]
    doubts = [tag("p", f"{line}.", class_="note") for line in contradicting(corpus)]
    return join([*counted, *doubts, dropped, documents(corpus), _copies(corpus), _passed_over(corpus)])


def _copies(corpus: CorpusRow) -> Html:
    """The first names of the documents removed as copies, and where the rest stand."""
    kinds = {"exact": "exact copies of other documents", "near": "near to held-out ones"}
    removed, names = corpus.get("removed") or {}, corpus.get("copies") or {}
    shown = {kind: ", ".join(map(str, names[kind])) for kind in kinds if isinstance(names.get(kind), list)}
    rows = [(kinds[kind], f"{removed.get(kind, 0):,}", text) for kind, text in shown.items() if text]
    if not rows:
        return join([])
    note = tag("p", f"All of them are listed in {corpus['name']}/corpus/removed.jsonl.", class_="note")
    return join([tag("h3", "Removed as copies"), table(("why", "documents", "the first"), rows), note])


def _passed_over(corpus: CorpusRow) -> Html:
    """What the sources have left out, by reason, with the first names."""
    over = corpus.get("passed_over") or {}
    if not over:
        return join([])
    rows, last_group = [], ""
    for reason, row in over.items():
        group = row.get("group", "")
        rows.append(("" if group == last_group else group, reason, f"{row['count']:,}", ", ".join(row["names"])))
        last_group = group
    listed = table(("", "reason", "how many", "the first of them"), rows)
    total = sum(row["count"] for row in over.values())
    return tag("details", join([tag("summary", f"Passed over: {total:,}"), listed]))


def _evaluation_table(evaluations: Sequence[Evaluated]) -> Html:
    rows = []
    for evaluation in evaluations:
        intervals = evaluation.get("intervals") or {}
        for name, value in (evaluation.get("metrics") or {}).items():
            ends = intervals.get(name)
            interval = f"{figure(ends[0])} to {figure(ends[1])}" if ends else ""
            rows.append((evaluation["name"], name, figure(value), interval))
    notes = {e["no_intervals"]: None for e in evaluations if e.get("no_intervals")}
    notes |= {f"{e['name']}: {e['seen']}": None for e in evaluations if e.get("seen")}
    rows_table = table(("stage", "metric", "value", "95% interval"), rows)
    return join([*(tag("p", f"{note}.", class_="note") for note in notes), rows_table, _domain_table(evaluations)])


def _domain_table(evaluations: Sequence[Evaluated]) -> Html:
    """Each domain's documents, text and metrics, where an evaluation has several."""
    rows = []
    for evaluation in evaluations:
        domains, sizes = evaluation.get("domains") or {}, evaluation.get("sizes") or {}
        for domain in sorted(domains, key=lambda d: (-sizes.get(d, {}).get("bytes", 0), d)) if len(domains) > 1 else ():
            size, intervals = sizes.get(domain), (evaluation.get("domain_intervals") or {}).get(domain) or {}
            counts = (f"{size['documents']:,}", short(size["bytes"], "B")) if size else ("", "")
            for name, value in (domains[domain] or {}).items():
                ends = intervals.get(name)
                interval = f"{figure(ends[0])} to {figure(ends[1])}" if ends else ""
                rows.append((evaluation["name"], domain, *counts, name, figure(value), interval))
    if not rows:
        return join([])
    heads = ("stage", "domain", "documents", "text", "metric", "value", "95% interval")
    return tag("details", tag("summary", "By domain"), table(heads, rows))
