"""Loss against compute as a picture: the mean of several seeds' curves, and a band from the lowest to the highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pretrain.experiments.verdict import Curve
from pretrain.report.markup import escape

POINTS = 60  # of a drawn band
COLOURS = ("#6b7280", "#2563eb", "#c2410c", "#15803d", "#7c3aed", "#be185d")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 410, 64, 40, 62, 52


def band(curves: Sequence[Curve]) -> dict[str, list[float]]:
    """Mean, lowest and highest of several curves at common points `x`, between their points in straight lines."""
    begin, end = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    x = np.linspace(begin, max(begin, end), POINTS)
    values = np.stack([np.interp(x, [p[0] for p in curve], [p[1] for p in curve]) for curve in curves])
    rounded = {"x": x, "mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
    return {name: [float(f"{v:.5g}") for v in line] for name, line in rounded.items()}


def draw(curves: Mapping[str, Sequence[Curve]], metric: str, title: str = "") -> str:
    """An SVG image: a line and a band for each name, held-out `metric` against FLOPs."""
    bands = {name: band(of) for name, of in curves.items()}
    x0, x1 = min(b["x"][0] for b in bands.values()), max(b["x"][-1] for b in bands.values())
    # The first tenth of a training falls so steeply that it would flatten all the rest.
    late = [v for b in bands.values() for x, v in zip(b["x"], b["high"], strict=True) if x >= x0 + (x1 - x0) / 10]
    y0, y1 = min(v for b in bands.values() for v in b["low"]), max(late)
    y0, y1 = y0 - 0.04 * (y1 - y0), y1 + 0.04 * (y1 - y0) + 1e-9

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x0) / (x1 - x0 or 1) * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f} {TOP + (y1 - min(y, y1)) / (y1 - y0) * (HEIGHT - TOP - BOTTOM):.1f}"

    def line(xs: Sequence[float], ys: Sequence[float]) -> str:
        return "L".join(place(x, y) for x, y in zip(xs, ys, strict=True))

    parts = []
    for i in range(5):
        y, x = y0 + (y1 - y0) * i / 4, x0 + (x1 - x0) * i / 4
        (_, high), (across, _) = place(x0, y).split(), place(x, y0).split()
        parts += [
            f'<path d="M{LEFT} {high}H{WIDTH - RIGHT}" stroke="#d6dae0"/>',
            f'<text x="{LEFT - 8}" y="{float(high) + 4:.1f}" text-anchor="end">{y:.4g}</text>',
            f'<text x="{across}" y="{HEIGHT - 30}" text-anchor="middle">{x:.2g}</text>',
        ]
    for number, (name, b) in enumerate(bands.items()):
        colour, at = COLOURS[number % len(COLOURS)], LEFT + 12 + 170 * number
        around = f"{line(b['x'], b['high'])}L{line(b['x'][::-1], b['low'][::-1])}"
        parts += [
            f'<path d="M{around}Z" fill="{colour}" opacity="0.18"/>',
            f'<path d="M{line(b["x"], b["mean"])}" fill="none" stroke="{colour}" stroke-width="2.4"/>',
            f'<path d="M{at} 20h22" stroke="{colour}" stroke-width="4"/>',
            f'<text x="{at + 30}" y="24">{escape(name)}</text>',
        ]
    words = [f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">FLOPs</text>']
    words += [f'<text x="{LEFT}" y="{TOP - 12}">held-out {escape(metric)}</text>'] if metric else []
    about = escape(title or f"Held-out {metric} against FLOPs of {', '.join(curves)}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{about}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#4b5563"><title>{about}</title>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts + words)}</svg>\n'
    )
