"""The report: one self-contained HTML page of a run, made from the files that its stages wrote.

Nothing is fetched when it is opened: styles, data and plotly are in the file. A run that is still going, or that was
interrupted, gives a report of what there is.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pretrain import report_samples
from pretrain.core.errors import PretrainError
from pretrain.core.files import write_text
from pretrain.report_data import BITS, Chart, CorpusRow, Evaluated, Page, StageRow, Trained
from pretrain.report_data import collect as collect

HEADS = ("stage", "kind", "status", "methods", "time", "FLOPs", "peak memory", "address")


def write(folder: Path | str) -> Path:
    """Write `report.html` into a run's folder and return its path."""
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise PretrainError(f"{folder} is not a run (no run.json); accepted: the folder that `pretrain run` wrote")
    from plotly.offline import get_plotlyjs

    data = collect(folder)
    here = Path(__file__).with_name("report_page")
    page = (here / "page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(data["run"]["name"]),
        "HEADING": html.escape(data["run"]["name"]),
        "STYLE": (here / "style.css").read_text(encoding="utf-8"),
        "DATA": script_json({"trainings": data["trainings"], "plots": data["plots"], "bars": data["bars"]}),
        "BODY": _body(data),
        "DRAW": (here / "draw.js").read_text(encoding="utf-8"),
        "PLOTLY": get_plotlyjs(),
    }
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text, 1)
    write_text(folder / "report.html", re.sub("[\ud800-\udfff]", "\ufffd", page))  # halves of characters have no bytes
    return folder / "report.html"


def script_json(value: object) -> str:
    """JSON that is safe inside a script element: no text can close it."""
    return json.dumps(_finite(value), allow_nan=False, default=str).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _finite(value: object) -> object:
    """The value with None for what no chart can show: NaN and infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _body(data: Page) -> str:
    parts = [_cards(data)]
    if data["trainings"]:
        losses = "".join(f'<div class="chart tall" id="loss-{i}"></div>' for i in range(len(data["plots"])))
        parts.append(
            _section("Training", _CURVES.replace("LOSSES", losses).replace("UNIT", unit_of(data["trainings"])))
        )
    if data["bars"]:
        parts.append(_section("Held-out text", "".join(map(_bar_chart, range(len(data["bars"])), data["bars"]))))
    if data["evaluations"]:
        parts.append(_section("Evaluations", _evaluation_table(data["evaluations"])))
    left = report_samples.MAX_BYTES
    for group in data["samples"]:
        panel, left = report_samples.panel(group.get("samples") or [], left)
        parts.append(_section(f"Samples: {html.escape(group['name'])}", panel) if panel else "")
    parts += [_section(f"Corpus: {html.escape(corpus['name'])}", _corpus_table(corpus)) for corpus in data["corpora"]]
    parts.append(_section("Stages", _stage_table(data["stages"])))
    parts.append(_section("Lineage", _lineage_table(data["stages"])))
    parts.append(_details("Recipe", f"<pre>{html.escape(data['recipe'])}</pre>"))
    environment = html.escape(json.dumps(data["environment"], indent=2))
    parts.append(_details("Environment", f"<pre>{environment}</pre>"))
    metrics = {s["name"]: s["metrics"] for s in data["stages"] if s.get("metrics")}
    parts.append(_details("All metrics", f"<pre>{html.escape(json.dumps(metrics, indent=2))}</pre>"))
    return "\n".join(parts)


_CURVES = (
    '<div class="axes" role="group" aria-label="horizontal axis">'
    '<button data-axis="tokens" class="on">UNIT</button><button data-axis="flops">FLOPs</button>'
    '<button data-axis="seconds">seconds</button></div>LOSSES'
    '<div class="pair"><div class="chart" id="rate"></div><div class="chart" id="norm"></div>'
    '<div class="chart" id="speed"></div><div class="chart" id="mfu"></div></div>'
)


def unit_of(trainings: Iterable[Trained]) -> str:
    """What the axis of tokens counts: images, steps of series, …; `tokens` where trainings differ."""
    units = {training["unit"] for training in trainings}
    return html.escape(units.pop()) if len(units) == 1 else "tokens"


def _bar_chart(number: int, chart: Chart) -> str:
    note = "Bits for each byte of held-out text; lower is better."
    note += " The compressors see each domain as one stream." if chart["tools"] else ""
    note += f" {chart['more']} more domains are under All metrics." if chart["more"] else ""
    rows = (len(chart["models"]) + len(chart["tools"])) * (1 + len(chart["domains"]))
    height = 22 * rows + 14 * len(chart["domains"]) + 90
    return f'<p class="note">{note}</p><div class="chart" id="bars-{number}" style="height:{height}px"></div>'


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{title}</h2>{inner}</section>"


def _details(title: str, inner: str) -> str:
    return f"<section><details><summary>{title}</summary>{inner}</details></section>"


def _cards(data: Page) -> str:
    cards: list[tuple[str, str, str]] = []
    newest: dict[str, Evaluated] = {}  # the evaluation that gives a metric's card
    for evaluation in data["evaluations"]:
        newest |= dict.fromkeys(evaluation.get("metrics") or {}, evaluation)
    if BITS in newest:
        tools = newest[BITS].get("compressors") or {}
        rivals = {tool: (measured.get("metrics") or {}).get(BITS) for tool, measured in tools.items()}
        rivals_line = ", ".join(f"{tool} {bits:.2f}" for tool, bits in rivals.items() if bits is not None)
        cards.append(("bits per byte", f"{newest[BITS]['metrics'][BITS]:.3f}", rivals_line))
    for name, title, note in (
        ("perplexity", "perplexity", "a token, held-out"),
        ("probe_accuracy", "probe accuracy", "on frozen states"),
        ("ndcg@10", "nDCG@10", "halves of documents"),
    ):
        if name in newest:
            cards.append((title, f"{newest[name]['metrics'][name]:.4g}", note))
    for training in data["trainings"][-1:]:
        step = training["step"]
        if step["tokens"]:
            speeds, shares = (sorted(v for v in step[name] if v) for name in ("tokens_per_second", "mfu"))
            pace = f"{short(speeds[len(speeds) // 2])} a second" if speeds else ""
            used = f"{shares[len(shares) // 2]:.0%} of the machine's matrix rate" if shares else ""
            count = short(step["tokens"][-1] or 0)
            cards += [(training["unit"], count, pace), ("FLOPs", short(step["flops"][-1] or 0), used)]
    total = sum(s["seconds"] or 0 for s in data["stages"])
    memory = max((s["peak_memory_bytes"] or 0 for s in data["stages"]), default=0)
    cards.append(("time", _clock(total), f"peak {memory / 2**30:.1f} GiB" if memory else ""))
    inner = "".join(
        f'<div class="card"><span>{html.escape(a)}</span><b>{html.escape(b)}</b><small>{html.escape(c)}</small></div>'
        for a, b, c in cards
    )
    return f'<div class="cards">{inner}</div>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; of a cell's text nothing is taken for markup."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _stage_table(stages: Sequence[StageRow]) -> str:
    rows = []
    for s in stages:
        peak, seconds, spent = s["peak_memory_bytes"], s["seconds"], s["flops"]
        memory = f"{peak / 2**30:.1f} GiB" if peak else ""
        took = _clock(seconds) if seconds is not None else ""
        flops, used = short(spent) if spent else "", ", ".join(s["methods"] or {})
        rows.append((s["name"], s["stage"], s["status"], used, took, flops, memory, s["address"][:8]))
    return _table(HEADS, rows)


def _lineage_table(stages: Sequence[StageRow]) -> str:
    """What each stage read and wrote; of a checkpoint, what its weights were trained with and all stages behind it."""
    rows = []
    for s in stages:
        lineage = s["lineage"] or {}
        reads = dict.fromkeys(
            name for names in (s["inputs"] or {}).values() for name in (names if isinstance(names, list) else [names])
        )
        counts = {lineage.get("unit", "tokens"): lineage.get("tokens"), "FLOPs": lineage.get("flops")}
        spent = ", ".join(f"{short(value)} {name}" for name, value in counts.items() if value)
        chain = " → ".join([stage.get("name", "?") for stage in lineage.get("stages") or []] + [s["name"]])
        wrote, data = f"{s['folder']}/{s['writes']}" if s["writes"] else "", str(lineage.get("data") or "")[:12]
        rows.append((s["name"], ", ".join(reads), wrote, spent, data, chain if lineage else ""))
    return _table(("stage", "reads", "writes", "trained", "data fingerprint", "made by"), rows)


def _corpus_table(corpus: CorpusRow) -> str:
    """Documents and bytes by domain and split, the largest domain first."""
    splits = corpus.get("domains") or {}
    size = {d: sum(s.get(d, {}).get("bytes", 0) for s in splits.values()) for s in splits.values() for d in s}

    def cell(counts: Iterable[dict[str, int]]) -> str:
        tables = list(counts)
        documents, data = (sum(c.get(k, 0) for c in tables) for k in ("documents", "bytes"))
        return f"{documents:,} · {short(data)}{'' if data >= 1000 else ' '}B"

    rows = [
        (domain, *(cell([by_domain.get(domain, {})]) for by_domain in splits.values()))
        for domain in sorted(size, key=lambda d: (-size[d], d))
    ]
    rows.append(("all", *(cell(by_domain.values()) for by_domain in splits.values())))
    removed = corpus.get("removed") or {}
    note = f"Documents · bytes. Removed: {removed.get('exact', 0):,} exact copies, {removed.get('near', 0):,} of the "
    note += (
        f"training documents near to held-out ones. Fingerprint {html.escape(str(corpus.get('fingerprint', ''))[:12])}."
    )
    return f'<p class="note">{note}</p>' + _table(("domain", *splits), rows) + _passed_over(corpus)


def _passed_over(corpus: CorpusRow) -> str:
    """What the sources have left out, by reason, with the first names."""
    over = corpus.get("passed_over") or {}
    if not over:
        return ""
    rows = [(reason, f"{row['count']:,}", ", ".join(row["names"])) for reason, row in over.items()]
    table = _table(("reason", "how many", "the first of them"), rows)
    total = sum(row["count"] for row in over.values())
    return f"<details><summary>Passed over: {total:,}</summary>{table}</details>"


def _evaluation_table(evaluations: Sequence[Evaluated]) -> str:
    rows = []
    for evaluation in evaluations:
        intervals = evaluation.get("intervals") or {}
        for name, value in (evaluation.get("metrics") or {}).items():
            ends = intervals.get(name)
            rows.append((evaluation["name"], name, f"{value:.4g}", f"{ends[0]:.4g} to {ends[1]:.4g}" if ends else ""))
    return _table(("stage", "metric", "value", "95% interval"), rows)


def short(value: float) -> str:
    """A number with three digits and a unit prefix."""
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
