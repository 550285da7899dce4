"""The report: one self-contained HTML page of a run, made from the files that its stages wrote.

Nothing is fetched when it is opened: styles, data and plotly are in the file. A run that is still going, or that was
interrupted, gives a report of what there is.
"""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

from pretrain.core.errors import PretrainError
from pretrain.core.files import read_json, write_text

MAX_POINTS = 1500
HEADS = ("stage", "kind", "status", "methods", "time", "FLOPs", "peak memory", "address")
RECORDED = ("seconds", "flops", "peak_memory_bytes", "metrics", "environment", "methods")


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
        "DATA": script_json({k: data[k] for k in ("trainings", "bars")}),
        "BODY": _body(data),
        "DRAW": (here / "draw.js").read_text(encoding="utf-8"),
        "PLOTLY": get_plotlyjs(),
    }
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text, 1)
    write_text(folder / "report.html", page)
    return folder / "report.html"


def collect(folder: Path) -> dict[str, Any]:
    """All that the page shows; stages that left nothing are passed over."""
    run = read_json(folder / "run.json")
    stages, trainings, evaluations, samples = [], [], [], []
    for entry in run["stages"]:
        home = folder / entry["folder"]
        record = _json(home / "stage.json") or {}
        stages.append(
            entry
            | {k: record.get(k) for k in ("seconds", "flops", "peak_memory_bytes", "metrics", "environment", "methods")}
        )
        if (home / "log.jsonl").exists():
            trainings.append({"name": entry["name"]} | curves(home / "log.jsonl"))
        if found := _json(home / "evaluation.json"):
            evaluations.append(found | {"name": entry["name"]})
        if found := _json(home / "samples.json"):
            samples.append({"name": entry["name"], "samples": found.get("samples", [])})
    recipe = folder / "recipe.yaml"
    return {
        "run": run,
        "stages": stages,
        "trainings": trainings,
        "evaluations": evaluations,
        "samples": samples,
        "bars": [bars(e) for e in evaluations if "bits_per_byte" in e.get("metrics", {})],
        "recipe": recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        "environment": next((s["environment"] for s in reversed(stages) if s.get("environment")), {}),
    }


def curves(path: Path) -> dict[str, Any]:
    """A training log as columns: `step` and `evaluation`; lines that are not whole are passed over."""
    rows: dict[str, list[dict[str, Any]]] = {"step": [], "evaluation": []}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows[row["event"]].append(row)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    steps = rows["step"][:: max(1, len(rows["step"]) // MAX_POINTS)]
    axes = ("tokens", "flops", "seconds")
    names = (*axes, "loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second", "mfu")
    metrics = ("loss", "bits_per_byte")
    return {
        "step": {name: [row.get(name) for row in steps] for name in names},
        "evaluation": {name: [row.get(name) for row in rows["evaluation"]] for name in axes}
        | {name: [(row.get("metrics") or {}).get(name) for row in rows["evaluation"]] for name in metrics},
    }


def bars(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte by domain: the model beside the compressors."""
    metrics, prefix = evaluation["metrics"], "bits_per_byte/"
    domains = sorted(k.removeprefix(prefix) for k in metrics if k.startswith(prefix))
    tools = evaluation.get("compressors") or {}
    series = {"model": [metrics["bits_per_byte"]] + [metrics[prefix + d] for d in domains]}
    series |= {tool: [bits.get("all")] + [bits.get(d) for d in domains] for tool, bits in tools.items()}
    interval = (evaluation.get("intervals") or {}).get("bits_per_byte")
    return {"name": evaluation["name"], "domains": ["all", *domains], "series": series, "interval": interval}


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
        parts.append(_section("Training", _CURVES))
    if data["bars"]:
        note = "Bits for each byte of held-out text; lower is better. The compressors see each domain as one stream."
        parts.append(_section("Held-out text", f'<p class="note">{note}</p><div class="chart" id="bars"></div>'))
    parts += [_section("Samples", "".join(map(_sample, group["samples"]))) for group in data["samples"]]
    parts.append(_section("Stages", _stage_table(data["stages"])))
    parts.append(_details("Recipe", f"<pre>{html.escape(data['recipe'])}</pre>"))
    environment = html.escape(json.dumps(data["environment"], indent=2))
    parts.append(_details("Environment", f"<pre>{environment}</pre>"))
    metrics = {s["name"]: s["metrics"] for s in data["stages"] if s.get("metrics")}
    parts.append(_details("All metrics", f"<pre>{html.escape(json.dumps(metrics, indent=2))}</pre>"))
    return "\n".join(parts)


_CURVES = (
    '<div class="axes" role="group" aria-label="horizontal axis">'
    '<button data-axis="tokens" class="on">tokens</button><button data-axis="flops">FLOPs</button>'
    '<button data-axis="seconds">seconds</button></div>'
    '<div class="chart tall" id="loss"></div>'
    '<div class="pair"><div class="chart" id="rate"></div><div class="chart" id="speed"></div></div>'
)


def _section(title: str, inner: str) -> str:
    return f"<section><h2>{title}</h2>{inner}</section>"


def _details(title: str, inner: str) -> str:
    return f"<section><details><summary>{title}</summary>{inner}</details></section>"


def _cards(data: dict[str, Any]) -> str:
    cards: list[tuple[str, str, str]] = []
    for evaluation in data["evaluations"][-1:]:
        metrics, tools = evaluation.get("metrics", {}), evaluation.get("compressors") or {}
        if "bits_per_byte" in metrics:
            rivals = ", ".join(f"{tool} {bits['all']:.2f}" for tool, bits in tools.items())
            cards.append(("bits per byte", f"{metrics['bits_per_byte']:.3f}", rivals))
        if "perplexity" in metrics:
            cards.append(("perplexity", f"{metrics['perplexity']:.1f}", "a token, held-out"))
    for training in data["trainings"][-1:]:
        step = training["step"]
        if step["tokens"]:
            speeds = sorted(v for v in step["tokens_per_second"] if v)
            cards.append(
                ("tokens", short(step["tokens"][-1]), f"{short(speeds[len(speeds) // 2])} a second" if speeds else "")
            )
            shares = sorted(v for v in step["mfu"] if v)
            used = f"{shares[len(shares) // 2]:.0%} of the machine's matrix rate" if shares else ""
            cards.append(("FLOPs", short(step["flops"][-1]), used))
    total = sum(s["seconds"] or 0 for s in data["stages"])
    memory = max((s["peak_memory_bytes"] or 0 for s in data["stages"]), default=0)
    cards.append(("time", _clock(total), f"peak {memory / 2**30:.1f} GiB" if memory else ""))
    inner = "".join(
        f'<div class="card"><span>{html.escape(a)}</span><b>{html.escape(b)}</b><small>{html.escape(c)}</small></div>'
        for a, b, c in cards
    )
    return f'<div class="cards">{inner}</div>'


def _sample(sample: dict[str, Any]) -> str:
    prompt, text = html.escape(str(sample.get("prompt", ""))), html.escape(str(sample.get("continuation", "")))
    return f'<pre class="sample"><mark>{prompt}</mark>{text}</pre>'


def _stage_table(stages: list[dict[str, Any]]) -> str:
    rows = []
    for s in stages:
        memory = f"{s['peak_memory_bytes'] / 2**30:.1f} GiB" if s.get("peak_memory_bytes") else ""
        took = _clock(s["seconds"]) if s.get("seconds") is not None else ""
        flops, used = short(s["flops"]) if s.get("flops") else "", ", ".join(s.get("methods") or {})
        cells = (s["name"], s["stage"], s["status"], used, took, flops, memory, s["address"][:8])
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
    heads = "".join(
        f"<th>{h}</th>" for h in ("stage", "kind", "status", "methods", "time", "FLOPs", "peak memory", "address")
    )
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def short(value: float) -> str:
    """A number with three digits and a unit prefix."""
    for power, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
