"""The costs of a step's parts, as functions of the number of tokens, from measurements of the steps that are run."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from statistics import fmean

WINDOW = 24  # measurements kept of each width: old ones must leave soon after the machine has changed
ENOUGH = 3  # measurements of a width before it counts as known


class StepCosts:
    """The costs of all parts of a step.

    target: of a ragged pass, by its tokens. draft: of one step of the head, by its tokens, for chains and for trees.
    catch_up: of reading what the target decoded while nothing was drafted, by its tokens.
    """

    def __init__(self) -> None:
        self.target = Curve()
        self.draft = {"chain": Curve(), "tree": Curve()}
        self.catch_up = Curve()

    def draft_seconds(self, kind: str, steps: int, tokens: float) -> float:
        """A drafting phase of `steps` steps, over `tokens` drafted tokens in all.

        A tree is thought to cost what a chain of as many tokens does until one has been measured.
        """
        if not tokens:
            return 0.0
        curve = self.draft[kind] if self.draft[kind].reach else self.draft["chain"]
        return steps * curve(tokens / steps)


class Curve:
    """Seconds as a function of a width (tokens in a pass), between and beyond the widths that were measured.

    Each width's figure is the mean of the middle half of its latest measurements, so single steps that another process
    slowed down do not count. A wider pass never costs less, so noise that says so is averaged away; between the
    widths the curve is a straight line, and beyond them it goes on with the slope of its last doubling.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[tuple[float, float]]] = {}  # bucket -> (width, seconds)
        self._knots: list[tuple[float, float]] | None = None  # (width, seconds), both rising; None: to be made

    def observe(self, width: float, seconds: float) -> None:
        """One measurement. width: above 0."""
        self._samples.setdefault(_bucket(width), deque(maxlen=WINDOW)).append((width, seconds))
        self._knots = None

    def seed(self, width: float, seconds: float) -> None:
        """A figure from a calibration, as good as ENOUGH measurements."""
        for _ in range(ENOUGH):
            self.observe(width, seconds)

    def known(self, width: float) -> bool:
        """Test that (about) this width itself has been measured often enough."""
        return len(self._samples.get(_bucket(width), ())) >= ENOUGH

    @property
    def reach(self) -> float:
        """The widest pass whose cost is known: twice the only known width, or four times the widest of several."""
        widths = [width for width, _ in self._curve()]
        return 0.0 if not widths else widths[-1] * (4 if len(widths) > 1 else 2)

    def __call__(self, width: float) -> float:
        """Seconds at this width; 0 while nothing has been measured at all."""
        knots = self._curve()
        if not knots:
            return 0.0
        (low, low_seconds), (high, high_seconds) = knots[0], knots[-1]
        if width >= high:
            return high_seconds + (width - high) * _slope(knots)
        if width <= low:  # a smaller pass costs at least its share
            return max(low_seconds - (low - width) * _slope(knots[::-1]), low_seconds * width / low)
        right = bisect_left(knots, (width, 0.0))
        (x0, y0), (x1, y1) = knots[right - 1], knots[right]
        return y0 + (y1 - y0) * (width - x0) / (x1 - x0)

    def table(self) -> dict[str, float]:
        """Width -> seconds, for people."""
        return {f"{width:.4g}": seconds for width, seconds in self._curve()}

    def _curve(self) -> list[tuple[float, float]]:
        knots = self._knots
        if knots is None:
            every = [list(samples) for samples in self._samples.values()]
            # what was measured once or twice may have been a slow moment, and would speak against itself for good
            enough = [samples for samples in every if len(samples) >= ENOUGH]
            chosen = enough if len(enough) > 1 else every
            points = []
            for samples in chosen:
                ordered = sorted(seconds for _, seconds in samples)
                cut = min((len(ordered) - 1) // 2, max(ENOUGH, len(ordered) // 4))  # of few: the median
                middle = fmean(ordered[cut : len(ordered) - cut])
                points.append((fmean(width for width, _ in samples), middle, len(ordered)))
            knots = self._knots = _rising(sorted(points))
        return knots


def _bucket(width: float) -> int:
    """Each width below 16 by itself, wider ones eight to a doubling."""
    whole = max(1, round(width))
    octave = max(0, whole.bit_length() - 4)
    return octave * 16 + (whole >> octave)


def _rising(points: list[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """The closest rising curve (pool adjacent violators, weighted by the measurements behind each point)."""
    pools: list[tuple[float, int, list[float]]] = []  # seconds, weight, widths
    for width, seconds, weight in points:
        pools.append((seconds, weight, [width]))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (left, left_weight, before), (right, right_weight, after) = pools[-2:]
            total = left_weight + right_weight
            pools[-2:] = [((left * left_weight + right * right_weight) / total, total, before + after)]
    return [(width, seconds) for seconds, _, widths in pools for width in widths]


def _slope(knots: list[tuple[float, float]]) -> float:
    """Seconds per token at the last knot, over at least a doubling: closer points would give noise."""
    *others, (x1, y1) = knots
    if not others:
        return 0.0
    x0, y0 = next((knot for knot in reversed(others) if max(knot[0], x1) >= 2 * min(knot[0], x1)), others[0])
    return (y1 - y0) / (x1 - x0)
