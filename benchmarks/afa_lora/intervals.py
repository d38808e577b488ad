"""Differences between arms over seeds and units together: intervals, p-values, Holm's correction, shares of a gap.

A unit is what was judged: a conversation, a question, a problem. Its value is a pair (numerator, denominator), so that
ratios of sums (acceptance) and means (accuracy, denominator 1) are one case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from draft.evaluation.tau import Interval

RESAMPLES = 4000
_TOGETHER = 250  # resamples whose counts are in memory at once


@dataclass(frozen=True)
class Scores:
    """The results of one arm: `values` is [seeds, units, 2]; the units, and their order, are those of every arm."""

    seeds: tuple[int, ...]
    values: np.ndarray


class Bootstrap:
    """Resampled scores of several arms that were judged on the same units.

    A score is the mean over seeds, and over groups of units (tasks), of sum(numerators) / sum(denominators). Each
    resample

    - draws the units of each group anew, the same ones for all arms: the comparison is paired by unit;
    - moves each arm's mean over seeds by a draw of Student's t with the standard error of that mean. To resample five
      seeds would give intervals that miss the truth in one case of eight instead of one of twenty. Arms with the same
      seeds share the draw, seed by seed: the comparison is paired by seed where it can be.
    """

    def __init__(
        self,
        arms: Mapping[str, Scores],
        groups: Sequence[object] | None = None,
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        """groups: the group of each unit; None: all units are one group."""
        rng = np.random.default_rng(seed)
        units = next(iter(arms.values())).values.shape[1]
        _, group = np.unique([str(each) for each in groups or ["all"] * units], return_inverse=True)
        members = [np.flatnonzero(group == number) for number in range(group.max() + 1)]
        points = {arm: _score([scores.values[:, m].sum(axis=1) for m in members]) for arm, scores in arms.items()}
        drawn: dict[str, list[np.ndarray]] = {arm: [] for arm in arms}
        for start in range(0, resamples, _TOGETHER):
            count = min(_TOGETHER, resamples - start)
            counts = [rng.multinomial(len(m), np.full(len(m), 1 / len(m)), size=count).astype(float) for m in members]
            for arm, scores in arms.items():
                sums = [
                    np.einsum("ru,suc->rsc", c, scores.values[:, m], optimize=True)
                    for c, m in zip(counts, members, strict=True)
                ]
                drawn[arm].append(_score(sums).mean(axis=1))
        self.by_seed = {arm: each.tolist() for arm, each in points.items()}
        self.points: dict[str, float] = {}
        self.draws: dict[str, np.ndarray] = {}  # [resamples] each
        self.known = {arm: len(scores.seeds) > 1 for arm, scores in arms.items()}
        shared: dict[tuple[int, ...], np.ndarray] = {}
        for arm, scores in arms.items():
            if scores.seeds not in shared:
                shared[scores.seeds] = _student(rng, len(scores.seeds), resamples)
            deviations = points[arm] - points[arm].mean()  # [seeds]
            self.points[arm] = float(points[arm].mean())
            self.draws[arm] = np.concatenate(drawn[arm]) + shared[scores.seeds] @ deviations

    def score(self, arm: str) -> Interval:
        """The arm's score; the bounds are NaN for a single seed, whose spread is unknown."""
        return self._interval(self.points[arm], self.draws[arm], [arm])

    def difference(self, candidate: str, baseline: str) -> tuple[Interval, float]:
        """candidate - baseline, and the two-sided p-value of no difference (NaN for a single seed)."""
        draws = self.draws[candidate] - self.draws[baseline]
        value = self.points[candidate] - self.points[baseline]
        interval = self._interval(value, draws, [candidate, baseline])
        if math.isnan(interval.low):
            return interval, math.nan
        tail = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
        return interval, min(1.0, 2 * (tail + 1) / (len(draws) + 1))

    def share(self, candidate: str, low: str, high: str) -> Interval | None:
        """The share of the gap low -> high that the candidate closes; None unless the gap itself is beyond doubt.

        A ratio of which the denominator may be zero has no interval that means anything.
        """
        gap, _ = self.difference(high, low)
        if not gap.low > 0:
            return None
        draws = (self.draws[candidate] - self.draws[low]) / (self.draws[high] - self.draws[low])
        value = (self.points[candidate] - self.points[low]) / gap.value
        return self._interval(value, draws, [candidate, low, high])

    def _interval(self, value: float, draws: np.ndarray, arms: Sequence[str]) -> Interval:
        if not all(self.known[arm] for arm in arms):
            return Interval(value, math.nan, math.nan)
        low, high = np.percentile(draws, [2.5, 97.5])
        return Interval(value, float(low), float(high))


def _score(sums: Sequence[np.ndarray]) -> np.ndarray:  # [..., seeds, 2] of each group -> [..., seeds]
    return np.mean([each[..., 0] / np.maximum(each[..., 1], 1e-300) for each in sums], axis=0)


def _student(rng: np.random.Generator, seeds: int, resamples: int) -> np.ndarray:
    """Factors [resamples, seeds] that turn deviations from their mean into draws of t(seeds - 1) · s / √seeds."""
    if seeds < 2:
        return np.zeros((resamples, seeds))
    freedom = seeds - 1
    scale = np.sqrt(freedom / rng.chisquare(freedom, size=(resamples, 1)))
    return rng.standard_normal((resamples, seeds)) * scale / math.sqrt(seeds * freedom)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number by Holm's method (1979); NaN stays, and does not count."""
    tests = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    corrected = dict.fromkeys(p_values, math.nan)
    largest = 0.0
    for place, (p, name) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - place) * p))
        corrected[name] = largest
    return corrected
