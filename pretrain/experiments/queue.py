"""The queue of claims: many at once, the cheapest first, resumable at any point, with the time that is left.

What a run came to is kept by what makes it, so that claims share their runs (the baseline of a base above all), and
whatever is finished is never run again. One that cannot be run sets its claim aside; the others go on. A verdict stands
once its rule has ended it, whatever is learnt of the noise later, as long as its runs are what the claim says.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.core.errors import PretrainError, warn
from pretrain.core.files import SEAL, read_json_lines, read_object, sealed, write_json
from pretrain.core.foreign.reading import open_append
from pretrain.core.quick.quantities import duration
from pretrain.experiments.claims import Claim, claims
from pretrain.experiments.protocol import SIDES, Point, Search, Value, judged, search
from pretrain.experiments.results import PROTOCOL, Result, check_budgets, recorded, result, write
from pretrain.experiments.sequential import LOOKS, Noise, standing
from pretrain.experiments.trials import Outcome, Trial, check_leaks, workers

Base = tuple[str, ...]  # what claims of the same noise have in common
POOL = 20  # runs of a base's baseline that its noise is known by
SMOKE_SEEDS = 2  # as few as a deviation needs: the numbers of that scale mean nothing
USUAL = len(SIDES) * LOOKS[-2]  # runs that a verdict takes


@dataclass
class Shelf:
    """The outcomes so far, by what makes them: in a folder, a file each, and in files of lines beside the results.

    The lines travel with the results, so that on another machine, too, no run is repeated: a claim for a new method
    runs the method's side alone, against a baseline and a noise that are known.
    """

    folder: Path
    known: dict[str, Outcome] = field(default_factory=dict)

    def read(self, *files: Path) -> None:
        """Take in the outcomes of files of lines; a line that was cut off is passed over."""
        for path in dict.fromkeys(file for file in files if file.exists()):
            for row in read_json_lines(path):
                seal = row.pop(SEAL, None)  # lines of before have none
                if seal is not None and sealed(row)[SEAL] != seal:
                    warn(f"{path}: the line of {', '.join(row)} is damaged: that run is made again")
                    continue
                self.known.update(row)

    def get(self, trial: Trial) -> Outcome | None:
        """What a trial came to; None: it was not run yet."""
        key = trial.key
        path = self.folder / f"{key}.json"
        if key not in self.known and path.exists():
            try:
                self.known[key] = read_object(path)
            except PretrainError as error:
                path.unlink()
                warn(f"{error}; that run is made again")
            else:
                self.known[key].pop(SEAL, None)
        return self.known.get(key)

    def put(self, trial: Trial, outcome: Outcome, lines: Path | None = None) -> None:
        """Keep it, and add a line to a file where there is one for it."""
        self.known[trial.key] = outcome
        write_json(self.folder / f"{trial.key}.json", sealed(outcome))
        if lines is not None:
            lines.parent.mkdir(parents=True, exist_ok=True)
            with open_append(lines) as file:
                file.seek(-min(1, file.seek(0, os.SEEK_END)), os.SEEK_END)
                start = b"" if file.read(1) in (b"", b"\n") else b"\n"  # a line that a crash cut off
                file.write(start + json.dumps(sealed({trial.key: outcome}), separators=(",", ":")).encode() + b"\n")


@dataclass
class Entry:
    """A claim on its way."""

    claim: Claim
    scale: str
    work: Path
    shelf: Shelf
    trials: dict[Point, Trial] = field(default_factory=dict)

    def trial(self, point: Point) -> Trial:
        """The run of a point, made once."""
        if point not in self.trials:
            self.trials[point] = self.claim.trial(self.scale, point, self.work)
        return self.trials[point]

    def outcome(self, point: Point) -> Outcome | None:
        """What it came to."""
        return self.shelf.get(self.trial(point))

    def score(self, point: Point) -> float | None:
        """Lower is better; infinite where training diverged."""
        outcome = self.outcome(point)
        if outcome is None:
            return None
        if outcome["final"] is None:
            return math.inf
        return float(outcome["final"]) * (1 if self.claim.better == "lower" else -1)

    @property
    def base(self) -> Base:
        """Claims of which this is equal have the same noise; each recipe and budget is a group of its own in it."""
        claim = self.claim
        return claim.base, self.scale, claim.metric, claim.equal

    def search(self) -> Search:
        """Where the search stands; at smoke scale there is none, the middle value is taken."""
        grids = self.claim.grids()
        if self.scale == "smoke":
            grids = {side: [grid[len(grid) // 2]] for side, grid in grids.items()}
        return search(grids, self.score)

    def stands(self, result: Result) -> bool:
        """Whether a recorded result is this claim's as it is: searched and decided by these very runs."""
        wanted = (PROTOCOL, self.claim.name, self.scale, self.claim.size, self.claim.better)
        kind = (*map(result.get, ("protocol", "name", "scale", "size")), result["claim"].get("better"))
        if kind != wanted or self.search().chosen != result["chosen"]:
            return False
        return all(
            [run["final"] for run in runs] == self.finals(side, result["chosen"][side])[: len(runs)]
            for side, runs in result["runs"].items()
        )

    def finals(self, side: str, value: Value) -> list[float]:
        """The test scores of a side's runs, by seed, as far as they go."""
        scores: list[float] = []
        while (outcome := self.outcome(Point(side, value, len(scores)))) is not None and outcome["final"] is not None:
            scores.append(float(outcome["final"]))
        return scores


def advance(entry: Entry, pools: Mapping[Base, Sequence[Sequence[float]]]) -> list[Point] | Result:
    """What is to be run next of a claim, or its result.

    `pools`: the runs of baselines by base, a group for each recipe.
    """
    claim, search = entry.claim, entry.search()
    if search.chosen is None:
        return list(search.missing)
    count = claim.scales[entry.scale].seeds or (SMOKE_SEEDS if entry.scale == "smoke" else LOOKS[0])
    fixed = bool(claim.scales[entry.scale].seeds) or entry.scale == "smoke"
    while True:
        points = judged(search.chosen, count)
        missing = [point for point in points if entry.outcome(point) is None]
        if missing:
            return missing
        runs: dict[str, list[Outcome]] = {side: [] for side in SIDES}
        for point in points:
            outcome = entry.outcome(point)
            assert outcome is not None
            if outcome["final"] is None:
                raise PretrainError(
                    f"claim {claim.label!r}: {point.side} with seed {point.seed} diverged at the rate that was chosen "
                    f"({point.value}): {outcome['diverged']}"
                )
            runs[point.side].append({"seed": point.seed} | outcome)
        noise = None
        if not fixed:
            groups = pools.get(entry.base, [])
            noise = Noise.of_runs(groups)
            value = search.chosen["baseline"]
            others = (noise.freedom if noise else 0) - max(0, len(entry.finals("baseline", value)) - 1)
            more = [Point("baseline", value, seed) for seed in range(count, POOL - others)]
            if short := [point for point in more if entry.outcome(point) is None]:
                return short
        differences = [m["final"] - b["final"] for m, b in zip(runs["method"], runs["baseline"], strict=True)]
        verdict = standing(differences, claim.better, noise, _by_document(runs), [count] if fixed else LOOKS)
        if verdict.more:
            count += verdict.more
            continue
        check_budgets(claim, entry.scale, runs)
        return result(claim, entry.scale, runs, search, _searched(entry), verdict)


def _by_document(runs: Mapping[str, Sequence[Outcome]]) -> NDArray[np.float64] | None:
    """Each document's share in each seed's difference, where the metric is a likelihood of documents."""
    each = {side: [run.get("documents") for run in runs[side]] for side in SIDES}
    if any(documents is None for side in SIDES for documents in each[side]):
        return None
    return np.array(each["method"]) - np.array(each["baseline"])


def _searched(entry: Entry) -> dict[str, list[Outcome]]:
    """The runs of the search, as they are recorded."""
    runs: dict[str, list[Outcome]] = {side: [] for side in SIDES}
    for point in sorted(entry.trials, key=lambda p: (p.side, p.share, p.seed)):
        outcome = entry.outcome(point)
        if point.split == "validation" and outcome is not None:
            runs[point.side].append(
                {"value": point.value, "seed": point.seed, "share": point.share}
                | {"metric": outcome["final"], "flops": outcome["flops"]}
            )
    return runs


Groups = dict[Base, dict[str, list[float]]]  # the baselines' runs of each base, by the key of a recipe's first


def groups_of(entries: Iterable[Entry], before: Groups | None = None) -> Groups:
    """Runs of the baselines of each base, a group for each recipe; in place of those `before` of the same recipe."""
    groups: Groups = {base: {**each} for base, each in (before or {}).items()}
    for entry in entries:
        search = entry.search()
        if search.chosen is not None and entry.scale != "smoke":
            value = search.chosen["baseline"]
            first = entry.trial(Point("baseline", value, 0)).key
            groups.setdefault(entry.base, {})[first] = entry.finals("baseline", value)
    return groups


def pools_of(entries: Iterable[Entry], before: Groups | None = None) -> dict[Base, list[list[float]]]:
    """The same, the groups of each base in a list."""
    return {base: list(groups.values()) for base, groups in groups_of(entries, before).items()}


def _beside(chosen: Sequence[Claim], scale: str, work: Path, results: Path | str | None) -> Groups:
    """What is recorded of the baselines of all claims that lie beside the chosen ones: their noise is the same."""
    shelf, entries = Shelf(work / "outcomes"), []
    for folder in {claim.path.parent for claim in chosen} if scale != "smoke" else ():
        for claim in claims(folder).values():
            if scale in claim.scales:
                shelf.read(_lines(claim, scale, None), _lines(claim, scale, results))
                entries += [Entry(sized, scale, work, shelf) for sized in claim.sized(scale)]
    return groups_of(entries)


def run(
    chosen: Sequence[Claim],
    scale: str,
    *,
    output: Path | str = Path("runs") / "claims",
    results: Path | str | None = None,
    jobs: int = 1,
    ray: str | None = None,
    say: Callable[[str], None] = print,
    seconds: float = math.inf,
) -> tuple[list[Result], dict[str, str]]:
    """Run claims to their end, or for so many `seconds`; returns the results, and why claims were set aside, by name.

    `jobs` runs at once on this machine, or those of a `ray` cluster. What is finished is not run again.
    """
    work, begun = Path(output).resolve() / scale, time.monotonic()
    shelf = Shelf(work / "outcomes")
    if scale != "smoke":  # whose numbers mean nothing
        for claim in chosen:
            shelf.read(_lines(claim, scale, None), _lines(claim, scale, results))
    entries = [Entry(sized, scale, work, shelf) for claim in chosen for sized in claim.sized(scale)]
    done = _standing(entries, Path(results) if results else None, say)
    beside = _beside(chosen, scale, work, results)
    failed: dict[str, str] = {}
    running: dict[Future[Outcome], tuple[Entry, Trial]] = {}
    with workers(jobs, ray) as start:
        while True:
            wanted, left = _next(entries, beside, failed, done, Path(results) if results else None, say)
            busy = {trial.key for _, trial in running.values()}
            free = jobs - len(running) if ray is None else len(wanted)
            if time.monotonic() - begun < seconds:
                for entry, trial in [pair for pair in wanted if pair[1].key not in busy][:free]:
                    running[start(trial)] = entry, trial
            if not running:
                return done, failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                entry, trial = running.pop(future)
                try:
                    lines = _lines(entry.claim, scale, results) if scale != "smoke" else None
                    outcome = future.result()
                    check_leaks(trial)
                    shelf.put(trial, outcome, lines)
                except PretrainError as error:
                    failed[entry.claim.label] = f"{trial.name}: {error}"
                    say(f"{entry.claim.label}: set aside: {trial.name}: {error}")
                    continue
                value = "diverged" if outcome["final"] is None else f"{outcome['final']:.4f}"
                far = f"{len(done)} of {len(entries)} claims, about {duration(left / max(1, jobs))} left"
                say(f"{trial.name}: {trial.metric} {value}, {duration(outcome['wall'])}; {far}")


def _standing(entries: Sequence[Entry], results: Path | None, say: Callable[[str], None]) -> list[Result]:
    """The results that were recorded before and stand, the newest of each claim."""
    folders = {results or entry.claim.path.parent / "results" for entry in entries if entry.scale != "smoke"}
    earlier, standing = recorded(*folders), []
    for entry in entries:
        if known := [result for result in earlier if entry.stands(result)]:
            standing.append(known[-1])
            say(f"{entry.claim.label}: {known[-1]['word']}, as recorded on {known[-1]['finished'][:10]}")
    return standing


def _lines(claim: Claim, scale: str, results: Path | str | None) -> Path:
    """The file of outcomes for claims of a base, in the folder that holds the results."""
    home = Path(results).parent if results else claim.path.parent
    return home / "outcomes" / f"{claim.base}-{scale}.jsonl"


def _next(
    entries: Sequence[Entry],
    beside: Groups,
    failed: dict[str, str],
    done: list[Result],
    results: Path | None,
    say: Callable[[str], None],
) -> tuple[list[tuple[Entry, Trial]], float]:
    """The trials that wait, those of the claim nearest to its end first, and the seconds of one worker that all take.

    What has come to an end is recorded.
    """
    finished = {(result["name"], result["size"]) for result in done}
    pools = pools_of(entries, beside)
    waiting: list[tuple[float, Entry, list[Point]]] = []
    for entry in entries:
        name = entry.claim.label
        if (entry.claim.name, entry.claim.size) in finished or name in failed:
            continue
        try:
            step = advance(entry, pools)
        except PretrainError as error:
            failed[name] = str(error)
            say(f"{name}: set aside: {error}")
            continue
        if isinstance(step, list):
            waiting.append((_cost(entry, step, entries), entry, step))
            continue
        write(step, results or entry.claim.path.parent / "results")
        done.append(step)
        verdict = step["verdict"]
        say(
            f"{name}: {step['word']}: {entry.claim.metric} {step['mean']['method']:.4f} against "
            f"{step['mean']['baseline']:.4f}, difference {verdict['difference']:+.4f} ({verdict['low']:+.4f} to "
            f"{verdict['high']:+.4f}), {verdict['seeds']} seeds"
        )
    unique: dict[str, tuple[Entry, Trial]] = {}
    for _, entry, points in sorted(waiting, key=lambda item: item[0]):
        for point in points:
            unique.setdefault(entry.trial(point).key, (entry, entry.trial(point)))
    return list(unique.values()), sum(cost for cost, *_ in waiting)


def _cost(entry: Entry, points: Sequence[Point], entries: Sequence[Entry]) -> float:
    """About how many seconds of one worker a claim still takes: the runs it waits for, and those that it will want."""
    searching = any(point.split == "validation" for point in points)
    short = any(point.share < 1 for point in points)
    later = USUAL + 8 * short if searching else 0  # two values whole, with two seeds, of both sides
    return _seconds(entry, entries) * (sum(point.share for point in points) + later)


def _seconds(entry: Entry, entries: Sequence[Entry]) -> float:
    """Of a whole run: as the runs so far of all claims on this base at this budget, else of all claims."""
    known, budget = entry.shelf.known, entry.claim.scales[entry.scale].budget
    like = [e for e in entries if e.base == entry.base and e.claim.scales[e.scale].budget == budget]
    alike = [(trial.key, point.share) for e in like for point, trial in e.trials.items()]
    walls = [known[key]["wall"] / share for key, share in alike if key in known]
    return statistics.median(walls or [outcome["wall"] for outcome in known.values()] or [60.0])
