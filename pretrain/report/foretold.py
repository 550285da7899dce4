"""What was expected of a run before it began, beside what came out: its loss, and the FLOPs of its time."""

from __future__ import annotations

from collections.abc import Mapping

from pretrain.core.quick.quantities import duration, short
from pretrain.records import Made, Metrics
from pretrain.report.data import BITS, Page, StageRow
from pretrain.report.held_out import Evaluated
from pretrain.report.numbers import known
from pretrain.training.budget import share_made

LIKELY = "its machine was busy with other work, had fewer threads to use, or is slower than it was taken to be"


def shortfall(model: StageRow | None) -> float | None:
    """The share of its planned FLOPs that a model's training has made, where that is far from all of them."""
    planned = model.get("planned") if model else None
    if model is None or not planned:
        return None
    return share_made(model["config"].get("budget"), planned["flops"], model.get("flops"))


def made(model: StageRow | None) -> str:
    """That a budget of seconds came to far fewer FLOPs than was planned, or to far more; else nothing."""
    share = shortfall(model)
    if model is None or share is None:
        return ""
    planned, budget = model.get("planned") or {"flops": 0.0}, model["config"]["budget"]
    why = LIKELY if share < 1 else "its machine is quicker than it was taken to be"
    of = f"{short(model['flops'] or 0)} of {short(planned['flops'])}"
    return f"Its {duration(budget['seconds'])} made {share:.0%} of the FLOPs that were planned ({of}): {why}."


def again(model: StageRow) -> tuple[str, Mapping[str, object]]:
    """What to do where far fewer FLOPs were made, and the fields for it.

    Those of the size that the dial chooses for such a speed; else of as many FLOPs as were planned, in any time.
    """
    planned: Made = model.get("planned") or {"flops": 0.0, "steps": 0.0}
    if other := planned.get("instead"):
        flops = max(map(float, other["changes"].values()))
        less = flops < (model.get("flops") or 0.0)
        words = (
            "Next: run the same recipe again on a quiet machine, with a thread for each core (OMP_NUM_THREADS). If the "
            "machine will stay as slow, train a smaller model, since this one was sized for more FLOPs than it "
            f"makes in this time: {other['size']}. The budget below makes the dial choose it: {short(flops)} FLOPs are "
            "what that size makes here in about the same time"
            + (" (less than this run made: small matrices are multiplied at fewer FLOP/s):" if less else ":")
        )
        return words, other["changes"]
    words = (
        "Next: again on a quiet machine, with a thread for each core (OMP_NUM_THREADS), or with a budget that other "
        "work cannot take from, in FLOPs or tokens, as this has:"
    )
    return words, {f"{model['name']}.budget.flops": f"{planned['flops']:.3g}"}


OF_LADDER = " was measured on"  # how a text is named whose law is a ladder's: its validation text


def expected(page: Page, model: StageRow | None) -> tuple[float, str, tuple[float, float] | None] | None:
    """The bits per byte that the dial expected of a model, of which text, and the interval where it is known."""
    row = (page.get("expected") or {}).get(model["name"] if model else "")
    bits = row.get("bits_per_byte") if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(bits, int | float):
        return None
    ends = row.get("interval")
    return float(bits), str(row.get("of") or "other text"), (ends[0], ends[1]) if isinstance(ends, list) else None


def beside(page: Page, model: StageRow | None, evaluation: Evaluated | None) -> str:
    """The expected bits per byte, for the sentence after those that came out; nothing where none were."""
    metrics: Metrics = (evaluation["metrics"] if evaluation else {}) or {}
    row, bits = expected(page, model), metrics.get(BITS)
    if row is None or bits is None:
        return ""
    best, of, ends = row
    share = shortfall(model)
    whole = " of all the FLOPs that were planned" if share is not None and share < 1 else ""
    if ends is None:
        differs = "" if of.endswith(OF_LADDER) else ", and other text differs"
        return f"Before it began {best:.2f} was expected{whole} on {of}{differs}."
    there = ""
    if of.endswith(OF_LADDER):
        bits = _validation(page, model)
        if bits is None:
            return ""
        there = f"on its validation text {bits:.2f}, "
    where = "less than that" if bits < ends[0] else "more than that" if bits > ends[1] else "as expected"
    interval = f"({ends[0]:.2f} to {ends[1]:.2f})"
    return f"Before it began {best:.2f} {interval} was expected{whole} on {of}: it is {there}{where}."


def _validation(page: Page, model: StageRow | None) -> float | None:
    """The bits per byte of the validation text that training ended with."""
    ends = [known(each["evaluation"][BITS]) for each in page["trainings"] if model and each["name"] == model["name"]]
    return ends[0][-1] if ends and ends[0] else None
