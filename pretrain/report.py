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
from typing import Any

from pretrain import report_samples
from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json, write_text

MAX_POINTS = 1500
MAX_DOMAINS = 12  # in a chart; a table has all
HEADS = ("stage", "kind", "status", "methods", "time", "FLOPs", "peak memory", "address")
RECORDED = ("seconds", "flops", "peak_memory_bytes", "metrics", "environment", "methods", "inputs", "config")
AXES = ("tokens", "flops", "seconds")
BITS = "bits_per_byte"


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
        "DATA": script_json({k: data[k] for k in ("trainings", "plots", "bars")}),
        "BODY": _body(data),
        "DRAW": (here / "draw.js").read_text(encoding="utf-8"),
        "PLOTLY": get_plotlyjs(),
    }
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text, 1)
    write_text(folder / "report.html", re.sub("[\ud800-\udfff]", "\ufffd", page))  # halves of characters have no bytes
    return folder / "report.html"


def collect(folder: Path) -> dict[str, Any]:
    """All that the page shows; stages that left nothing are passed over."""
    run = read_json(folder / "run.json")
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
    stages: list[dict[str, Any]] = []
    groups: dict[str, list[dict[str, Any]]] = {n: [] for n in ("trainings", "evaluations", "samples", "corpora")}
    for entry in run["stages"]:
        home, record = folder / entry["folder"], _json(folder / entry["folder"] / "stage.json") or {}
        lineage = (_json(home / "checkpoint" / "pretrain.json") or {}).get("lineage")
        stages.append(entry | {k: record.get(k) for k in RECORDED} | {"lineage": lineage, "writes": _writes(home)})
        named = {"name": entry["name"]}
        if (home / "log.jsonl").exists():
            objective = _objective(record.get("config") or _raw(text, entry["name"]))
            groups["trainings"].append(named | {"objective": objective} | curves(home / "log.jsonl"))
        for group, file in (("evaluations", "evaluation.json"), ("samples", "samples.json")):
            if isinstance(content := _json(home / file), dict):
                groups[group].append(content | named)
        if info := _json(home / "corpus" / "corpus.json"):
            groups["corpora"].append(info | named)
    return groups | {
        "run": run,
        "stages": stages,
        "plots": plots(groups["trainings"]),
        "bars": bars(groups["evaluations"]),
        "recipe": text,
        "environment": next((s["environment"] for s in reversed(stages) if s.get("environment")), {}),
    }


def _writes(home: Path) -> str:
    """What a stage has left for others."""
    return next((name for name in ("checkpoint", "corpus", "tokenizer") if (home / name).is_dir()), "")


def _raw(recipe: str, stage: str) -> dict[str, Any]:
    """What the recipe says of a stage that has not finished."""
    import yaml

    try:
        stages = yaml.safe_load(recipe)["stages"]
        return next((s for s in stages if s.get("name") == stage), {})
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}


def _objective(config: dict[str, Any]) -> list[str]:
    """The names of the objectives that a train stage is configured with."""
    several = config.get("objectives") or [config.get("objective") or "causal_lm"]
    names = [entry.get("method", entry) if isinstance(entry, dict) else entry for entry in several]
    return [str(entry.get("method", entry) if isinstance(entry, dict) else entry) for entry in names]


def curves(path: Path) -> dict[str, Any]:
    """A training log as columns: `step` and `evaluation`; lines that are not whole are passed over."""
    rows: dict[str, list[dict[str, Any]]] = {"step": [], "evaluation": []}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows[row["event"]].append(row)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    names = (*AXES, "loss", BITS, "lr", "grad_norm", "tokens_per_second", "mfu")
    return {
        "step": {name: [row.get(name) for row in thin(rows["step"])] for name in names},
        "evaluation": {name: [row.get(name) for row in rows["evaluation"]] for name in AXES}
        | {name: [(row.get("metrics") or {}).get(name) for row in rows["evaluation"]] for name in ("loss", BITS)},
    }


def thin(rows: list[Any]) -> list[Any]:
    """At most about `MAX_POINTS` of the rows, evenly chosen, the last among them."""
    every = -(-len(rows) // MAX_POINTS) or 1
    return rows[::-every][::-1]


def plots(trainings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The loss curves by unit, since nats of different objectives do not compare: each unit is a plot of its own."""
    curves_by_unit: dict[str, list[dict[str, Any]]] = {}
    for number, training in enumerate(trainings):
        # While training, the objectives' weighted sum is logged, but only the first one's held-out value.
        names = {"step": " + ".join(training["objective"]), "evaluation": training["objective"][0]}
        bits = {part: any(v is not None for v in training[part][BITS]) for part in names}
        for part, objective in names.items():
            column = BITS if bits[part] and (bits["step"] or part == "evaluation") else "loss"
            if any(v is not None for v in training[part][column]):
                unit = "bits per byte" if column == BITS else f"loss of {objective} (nats)"
                curves_by_unit.setdefault(unit, []).append({"training": number, "part": part, "column": column})
    return [{"unit": unit, "curves": curves} for unit, curves in curves_by_unit.items()]


def bars(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bits per byte by domain: the models measured on the same text side by side, with the compressors."""
    charts: dict[str, dict[str, Any]] = {}
    for evaluation in evaluations:
        metrics, by_domain = evaluation.get("metrics") or {}, evaluation.get("domains") or {}
        if BITS not in metrics:
            continue
        tools, domains = evaluation.get("compressors") or {}, sorted(by_domain)
        key = json.dumps([evaluation.get("documents"), domains, tools], sort_keys=True)
        if key not in charts:
            shown = domains[:MAX_DOMAINS] if len(domains) > 1 else []
            charts[key] = {
                "domains": shown,
                "more": len(domains) - len(shown) if shown else 0,
                "models": [],
                "tools": [],
            }
            charts[key]["tools"] = [{"name": tool} | _values(measured, shown) for tool, measured in tools.items()]
        row = {"name": evaluation["name"], "interval": (evaluation.get("intervals") or {}).get(BITS)}
        charts[key]["models"].append(row | _values(evaluation, charts[key]["domains"]))
    return list(charts.values())


def _values(measured: dict[str, Any], domains: list[str]) -> dict[str, Any]:
    """The value over all text, and those of the domains in their order; None where there is none."""
    by_domain = measured.get("domains") or {}
    return {
        "all": (measured.get("metrics") or {}).get(BITS),
        "values": [(by_domain.get(domain) or {}).get(BITS) for domain in domains],
    }


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no text can close it."""
    return json.dumps(_finite(value), allow_nan=False, default=str).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _finite(value: Any) -> Any:
    """The value with None for what no chart can show: NaN and infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except PretrainError:
        return None


def _body(data: dict[str, Any]) -> str:
    parts = [_cards(data)]
    if data["trainings"]:
        losses = "".join(f'<div class="chart tall" id="loss-{i}"></div>' for i in range(len(data["plots"])))
        parts.append(_section("Training", _CURVES.replace("LOSSES", losses)))
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
    '<button data-axis="tokens" class="on">tokens</button><button data-axis="flops">FLOPs</button>'
    '<button data-axis="seconds">seconds</button></div>LOSSES'
    '<div class="pair"><div class="chart" id="rate"></div><div class="chart" id="norm"></div>'
    '<div class="chart" id="speed"></div><div class="chart" id="mfu"></div></div>'
)


def _bar_chart(number: int, chart: dict[str, Any]) -> str:
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


def _cards(data: dict[str, Any]) -> str:
    cards: list[tuple[str, str, str]] = []
    newest: dict[str, dict[str, Any]] = {}  # the evaluation that gives a metric's card
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
            cards += [("tokens", short(step["tokens"][-1]), pace), ("FLOPs", short(step["flops"][-1]), used)]
    total = sum(s["seconds"] or 0 for s in data["stages"])
    memory = max((s["peak_memory_bytes"] or 0 for s in data["stages"]), default=0)
    cards.append(("time", _clock(total), f"peak {memory / 2**30:.1f} GiB" if memory else ""))
    inner = "".join(
        f'<div class="card"><span>{html.escape(a)}</span><b>{html.escape(b)}</b><small>{html.escape(c)}</small></div>'
        for a, b, c in cards
    )
    return f'<div class="cards">{inner}</div>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; of a cell's text nothing is taken for markup."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _stage_table(stages: list[dict[str, Any]]) -> str:
    rows = []
    for s in stages:
        memory = f"{s['peak_memory_bytes'] / 2**30:.1f} GiB" if s.get("peak_memory_bytes") else ""
        took = _clock(s["seconds"]) if s.get("seconds") is not None else ""
        flops, used = short(s["flops"]) if s.get("flops") else "", ", ".join(s.get("methods") or {})
        rows.append((s["name"], s["stage"], s["status"], used, took, flops, memory, s["address"][:8]))
    return _table(HEADS, rows)


def _lineage_table(stages: list[dict[str, Any]]) -> str:
    """What each stage read and wrote; of a checkpoint, what its weights were trained with and all stages behind it."""
    rows = []
    for s in stages:
        lineage = s["lineage"] or {}
        reads = dict.fromkeys(
            name for names in (s["inputs"] or {}).values() for name in (names if isinstance(names, list) else [names])
        )
        counts = {"tokens": lineage.get("tokens"), "FLOPs": lineage.get("flops")}
        spent = ", ".join(f"{short(value)} {name}" for name, value in counts.items() if value)
        chain = " → ".join([stage.get("name", "?") for stage in lineage.get("stages") or []] + [s["name"]])
        wrote, data = f"{s['folder']}/{s['writes']}" if s["writes"] else "", str(lineage.get("data") or "")[:12]
        rows.append((s["name"], ", ".join(reads), wrote, spent, data, chain if lineage else ""))
    return _table(("stage", "reads", "writes", "trained", "data fingerprint", "made by"), rows)


def _corpus_table(corpus: dict[str, Any]) -> str:
    """Documents and bytes by domain and split, the largest domain first."""
    splits: dict[str, dict[str, dict[str, int]]] = corpus.get("domains") or {}
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
    return f'<p class="note">{note}</p>' + _table(("domain", *splits), rows)


def _evaluation_table(evaluations: list[dict[str, Any]]) -> str:
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
