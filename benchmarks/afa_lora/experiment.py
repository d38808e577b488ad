"""The design of an experiment: arms, cells, tuned rates, seeds, and runs that are done once.

A *cell* is one comparison: what it is about (a domain, say) and the options that its arms share. In a cell each arm's
learning rate is tuned on the validation part, by seeds that are used for nothing else, and is then trained with fresh
seeds, which are judged on the test part.

    OUT/runs/PLACE/ARM-OPTIONS/rate-R-seed-S/result.json

A run that has its result is not done again. Two copies of a command share the work: a run is locked while it is done.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from benchmarks.afa_lora.intervals import Scores
from draft.errors import UserError
from draft.files import provenance, read_json, write_json

ARMS = ("lora", "afa-lora", "full")
AGAIN = "lora-again"  # LoRA with other seeds: the comparison that has to find nothing
TUNING_SEED = 1000
FRESH_SEED = 0
AGAIN_SEED = 500
MOST_RATES = 4  # that a grid is extended by
_ANNEALING = ("activation", "placement", "schedule", "decay_ratio")
_UNUSED = {"lora": _ANNEALING, "afa-lora": (), "full": ("rank", "alpha", *_ANNEALING)}


@dataclass(frozen=True)
class Setup:
    """All of a run but its rate and seed: where, which arm, and the options that the arm has a use for."""

    place: str  # a domain or task; no slash
    arm: str
    options: tuple[tuple[str, Any], ...]

    @property
    def method(self) -> str:
        return "lora" if self.arm == AGAIN else self.arm

    @property
    def name(self) -> str:
        words = [self.method, *(f"{name.replace('_', '-')}-{value}" for name, value in self.options)]
        return f"{self.place}/{'-'.join(words)}"


def setup(place: str, arm: str, options: Mapping[str, Any]) -> Setup:
    """Options that the arm does not use are left out, so that cells which differ in them alone share its runs."""
    unused = _UNUSED["lora" if arm == AGAIN else arm]
    return Setup(place, arm, tuple(sorted((name, value) for name, value in options.items() if name not in unused)))


@dataclass(frozen=True)
class Run:
    """One training run; `part` is what it is judged on: validation or test."""

    setup: Setup
    rate: float
    seed: int
    part: str

    @property
    def name(self) -> str:
        return f"{self.setup.name}/rate-{self.rate:.6g}-seed-{self.seed}"


@dataclass(frozen=True)
class Tuned:
    """The rate of an arm, the scores of all rates that were tried, and whether it is better than both edges."""

    rate: float
    scores: dict[float, float]
    inside: bool
    diverged: tuple[float, ...] = ()  # better rates, with which a fresh seed diverged


# A run -> its result: "units" (measure -> a pair a unit) and whatever else is worth keeping. The folder is the run's
# own and is kept until the result is there: what a program leaves in it, it finds there again after an interruption.
Perform = Callable[[Run, Path], dict[str, Any]]


@dataclass
class Experiment:
    """Runs in a folder, done once."""

    folder: Path
    perform: Perform
    measure: str  # that rates are chosen by
    seeds: int
    factor: float = 2.0  # between a grid's edge and the rate that it is extended by
    keep: Sequence[str] = ()  # files of a run's folder that outlive it
    say: Callable[[str], object] = print
    most_rates: int = MOST_RATES
    results: dict[Run, dict[str, Any]] = field(default_factory=dict)
    commit: str = field(default_factory=lambda: provenance()["commit"])

    def settle(self, settings: Mapping[str, Any]) -> None:
        """Record what all runs of the folder share.

        Raises:
            UserError: when the folder's runs had other settings: their results would be taken for these.
        """
        file = self.folder / "settings.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            before = read_json(file) if file.is_file() else settings
            for name in settings:
                if before.get(name) != settings[name]:
                    raise UserError(
                        f"--out {str(self.folder)!r} holds runs of another experiment ({name} was {before.get(name)!r} "
                        f"there and is {settings[name]!r} now); choose another folder."
                    )
            write_json(file, dict(settings))

    def complete(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Return the runs' results, each done here unless it is there already, or another process is at it."""
        pending = [run for run in runs if run not in self.results]
        while pending:
            waiting = [run for run in pending if not self._done(run)]
            if len(waiting) == len(pending):
                time.sleep(1.0)  # another process has them all
            pending = waiting
        return [self.results[run] for run in runs]

    def _done(self, run: Run) -> bool:
        folder = self.folder / "runs" / run.name
        file = folder / f"{run.part}.json"
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{folder}.lock", timeout=0):
                if not file.is_file():
                    self.say(f"{run.name} ({run.part})")
                    work, began = folder / "work", time.monotonic()
                    work.mkdir(parents=True, exist_ok=True)
                    result = self.perform(run, work)
                    for name in self.keep:
                        if (work / name).exists():
                            (work / name).replace(folder / name)
                    seconds = round(time.monotonic() - began, 1)
                    write_json(file, {**result, "seconds": seconds, "commit": self.commit})
                    shutil.rmtree(work)
                    gc.collect()  # trainers are in cycles, and their optimisers are large
        except Timeout:
            return False
        self.results[run] = read_json(file)
        return True

    def tuned(self, setup: Setup, rates: Sequence[float]) -> Tuned:
        """Return the best of at least three rates; the grid grows while the best one lies on its edge.

        After `most_rates` more the best one is taken as it is. `inside` is False there, and where an edge is as good.
        """
        grid = sorted(set(rates))
        if len(grid) < 3:
            raise UserError(f"{len(grid)} learning rates for {setup.arm}; give three or more, so that one is inside.")
        most = len(grid) + self.most_rates
        while True:
            results = self.complete(self.tuning(setup, grid))
            scores = {rate: score(result, self.measure) for rate, result in zip(grid, results, strict=True)}
            # of equal rates the one in the middle: a tie says nothing about an edge. Where all diverged, the least
            middle = (len(grid) - 1) / 2 if max(scores.values()) > -np.inf else 0.0
            best = max(grid, key=lambda rate: (scores[rate], -abs(grid.index(rate) - middle)))
            if grid[0] < best < grid[-1] or len(grid) >= most:
                inside = max(scores[grid[0]], scores[grid[-1]]) < scores[best]
                return Tuned(best, scores, inside)
            grid = [grid[0] / self.factor, *grid] if best == grid[0] else [*grid, grid[-1] * self.factor]

    def tuning(self, setup: Setup, rates: Sequence[float]) -> list[Run]:
        return [Run(setup, rate, TUNING_SEED, "validation") for rate in rates]

    def fresh(self, setup: Setup, rate: float, seeds: int | None = None) -> list[Run]:
        first = AGAIN_SEED if setup.arm == AGAIN else FRESH_SEED
        return [Run(setup, rate, first + number, "test") for number in range(seeds or self.seeds)]


def score(result: Mapping[str, Any], measure: str) -> float:
    """Return sum(numerators) / sum(denominators) of a result; -inf for a run that diverged, which has no units."""
    if "units" not in result:
        return -np.inf
    numerator, denominator = np.array(result["units"][measure], dtype=float).sum(axis=0)
    return float(numerator / denominator) if denominator else -np.inf


def without_divergence(tuned: Tuned, results: Sequence[Mapping[str, Any]]) -> Tuned:
    """Return the same, or the next lower rate where a fresh seed diverged and there is a lower one."""
    lower = [rate for rate, value in tuned.scores.items() if rate < tuned.rate and np.isfinite(value)]
    if all("units" in result for result in results) or not lower:
        return tuned
    return replace(tuned, rate=max(lower), diverged=(*tuned.diverged, tuned.rate))


def scores_of(results: Sequence[Mapping[str, Any]], runs: Sequence[Run], measure: str) -> Scores:
    """Stack the units of an arm's seeds.

    Raises:
        UserError: when a run diverged, so that there is nothing to judge.
    """
    for result, run in zip(results, runs, strict=True):
        if "units" not in result:
            raise UserError(f"{run.name} diverged ({result['diverged']}); give lower learning rates.")
    values = np.array([result["units"][measure] for result in results], dtype=float)
    return Scores(tuple(run.seed for run in runs), values)
