"""What a server has done, as Prometheus reads it: https://prometheus.io/docs/instrumenting/exposition_formats/"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)  # seconds
KEPT = 0.8  # of the mean of the last durations, beside a new one


class Durations:
    """A histogram of seconds; `recent` is a mean in which the last count most."""

    def __init__(self) -> None:
        self.counts, self.total, self.recent = [0] * (len(BOUNDS) + 1), 0.0, 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[next((place for place, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))] += 1
        self.recent = KEPT * self.recent + (1 - KEPT) * seconds if self.total else seconds
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        """In Prometheus' words."""
        sums = [sum(self.counts[: place + 1]) for place in range(len(self.counts))]
        bounds = [*map(str, BOUNDS), "+Inf"]
        rows = [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, sums, strict=True)]
        return [*rows, f"{name}_sum {self.total:.6f}", f"{name}_count {sums[-1]}"]


class Metrics:
    """Counts of one server; added to in several threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answers: Counter[tuple[str, int]] = Counter()  # by path and HTTP status
        self.prompt_tokens = self.new_tokens = self.passes = self.cancelled = 0
        self.first_seconds, self.answer_seconds = Durations(), Durations()

    def answered(self, path: str, status: int) -> None:
        """Count a request."""
        with self.lock:
            self.answers[path, status] += 1

    def text(self, now: Mapping[str, int]) -> str:
        """All of it; `now` are numbers that go up and down."""
        counters = {
            "prompt_tokens": (self.prompt_tokens, "Tokens of prompts that were read."),
            "generated_tokens": (self.new_tokens, "Tokens that were written."),
            "passes": (self.passes, "Passes of the model over a batch."),
            "cancelled": (self.cancelled, "Answers that nobody waited for any more."),
        }
        lines = []
        for name, (value, words) in counters.items():
            lines += [f"# HELP pretrain_{name}_total {words}", f"# TYPE pretrain_{name}_total counter"]
            lines.append(f"pretrain_{name}_total {value}")
        name = "pretrain_requests_total"
        lines += [f"# HELP {name} Requests by path and HTTP status.", f"# TYPE {name} counter"]
        with self.lock:
            answers = sorted(self.answers.items())
        lines += [f'{name}{{path="{path}",status="{status}"}} {n}' for (path, status), n in answers]
        for name, value in now.items():
            lines += [f"# TYPE pretrain_{name} gauge", f"pretrain_{name} {value}"]
        for name, words, durations in (
            ("first_token_seconds", "From a request to its first token.", self.first_seconds),
            ("answer_seconds", "From a request to the end of its answer.", self.answer_seconds),
        ):
            lines += [f"# HELP pretrain_{name} {words}", f"# TYPE pretrain_{name} histogram"]
            lines += durations.lines(f"pretrain_{name}")
        return "\n".join(lines) + "\n"
