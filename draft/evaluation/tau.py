"""Acceptance length τ and its uncertainty: the one place where they are computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike


def acceptance_length(emitted: int, verifications: int) -> float:
    """τ: tokens emitted by verifications / verifications.

    The bonus token counts, the token that the prefill gives does not. NaN when nothing was verified.
    """
    return emitted / verifications if verifications else float("nan")


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@lru_cache(maxsize=4)  # a report needs the same resamples of the same units many times
def _counts(units: int, resamples: int, seed: int) -> np.ndarray:
    """Number of times that each unit is drawn, with replacement: [resamples, units]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.float64)


def bootstrap_ratio(
    numerators: ArrayLike, denominators: ArrayLike, *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """sum(numerators) / sum(denominators), resampling the units (prompts, conversations) with replacement.

    With emitted tokens and verifications of each prompt this is τ with its interval. NaN for no units.
    """
    values = np.array([numerators, denominators], dtype=np.float64).T  # [units, 2]
    if not len(values) or not values[:, 1].sum():
        return Interval(float("nan"), float("nan"), float("nan"))
    sums = _counts(len(values), resamples, seed) @ values  # [resamples, columns]
    low, high = np.nanpercentile(sums[:, 0] / np.maximum(sums[:, 1], 1e-300), [2.5, 97.5])
    total = values.sum(axis=0)
    return Interval(float(total[0] / total[1]), float(low), float(high))


def bootstrap_gain(baseline: ArrayLike, candidate: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Relative gain of the candidate's ratio over the baseline's, paired: both get the same units in each resample.

    baseline, candidate: [units, 2], (numerator, denominator) of each unit, in the same order.
    """
    values = np.concatenate([np.array(baseline, dtype=np.float64), np.array(candidate, dtype=np.float64)], axis=1)
    sums = _counts(len(values), resamples, seed) @ values  # [resamples, columns]

    def gain(s: np.ndarray) -> np.ndarray:  # [..., 4] -> [...]
        return (s[..., 2] / s[..., 3]) / (s[..., 0] / s[..., 1]) - 1

    low, high = np.nanpercentile(gain(sums), [2.5, 97.5])
    return Interval(float(gain(values.sum(axis=0))), float(low), float(high))
