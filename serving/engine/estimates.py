"""Plans of what to draft, and estimates of how much of it is accepted and of what a step costs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import mul
from statistics import fmean

BRANCHING = 8  # children that a tree's node may have, and nodes that the head reads at a depth
INITIAL_RATE = 0.7  # of a head that was never seen: high enough for it to be tried
OVERALL_MEMORY, ROW_MEMORY = 256, 64  # verifications after which an observation weighs 1/e
OVERALL_STRENGTH, ROW_STRENGTH = 3, 16  # verifications that the prior of an estimate is worth
KEPT_AFTER_PAUSE = 20  # verifications that all that was known before a pause is worth


@dataclass(frozen=True)
class DraftPlan:
    """The drafts for each request in a step: `nodes` tokens, the deepest `length` after the last known one."""

    length: int = 0  # steps of the head
    nodes: int = 0  # tokens to verify

    @classmethod
    def chain(cls, length: int) -> DraftPlan:
        return cls(length, length)

    @classmethod
    def tree(cls, depth: int, nodes: int) -> DraftPlan:
        """Return a tree of so many nodes, or of as many as find room at that depth."""
        return cls(depth, min(nodes, BRANCHING) if depth == 1 else nodes)

    @cached_property
    def kind(self) -> str:
        """ "off", "chain" or "tree"."""
        return "off" if self.nodes == 0 else "chain" if self.nodes == self.length else "tree"

    def capped(self, cap: int) -> DraftPlan:
        """This plan for a request that can use at most `cap` drafted tokens in a row."""
        if cap >= self.length:
            return self
        return DraftPlan.chain(cap) if self.kind == "chain" or cap == 0 else DraftPlan.tree(cap, self.nodes)

    @property
    def tree_nodes(self) -> int:
        """Nodes of the tree; 0: a chain."""
        return self.nodes if self.kind == "tree" else 0

    def __str__(self) -> str:
        return {"off": "off", "chain": f"chain {self.length}", "tree": f"tree {self.nodes}x{self.length}"}[self.kind]


OFF = DraftPlan()


class Acceptance:
    """Acceptance rate of each position, given that all before it were accepted: for chains, and for each size of tree.

    Rates are exponentially weighted means.
    """

    def __init__(self, memory: int, strength: int) -> None:
        """memory: verifications after which an observation weighs 1/e; strength: those that a prior is worth."""
        self._fading, self._strength = memory / (memory + 1), strength
        self._counts: dict[int, list[list[float]]] = {}  # nodes of the tree (0: chain) -> [accepted, tried] by position

    def observe(self, plan: DraftPlan, accepted: int) -> None:
        """Count one verification of `plan` that accepted `accepted` tokens."""
        self._scale(self._fading)
        counts = self._counts.setdefault(plan.tree_nodes, [])
        counts.extend([0.0, 0.0] for _ in range(len(counts), plan.length))
        for position in range(min(accepted + 1, plan.length)):  # what follows a rejection was not judged
            counts[position][0] += position < accepted
            counts[position][1] += 1

    def forget(self) -> None:
        """After a pause: keep the estimates, but let few new observations outweigh them."""
        most = max((tried for counts in self._counts.values() for _, tried in counts), default=0.0)
        if most > KEPT_AFTER_PAUSE:
            self._scale(KEPT_AFTER_PAUSE / most)

    def rates(self, plan: DraftPlan, prior: list[float] | None = None) -> list[float]:
        """Estimate the rate of each position of `plan`, drawn towards `prior` where little was observed.

        Without a prior a position is thought to be as good as the one before it, and a tree as `widened` makes of
        a chain: what was never drafted, or not for long, is looked at with optimism and so gets tried.
        """
        if prior is None and plan.kind == "tree":
            prior = widened(self.rates(DraftPlan.chain(plan.length)), plan.nodes)
        rates: list[float] = []
        counts = self._counts.get(plan.tree_nodes, [])
        for position in range(plan.length):
            accepted, tried = counts[position] if position < len(counts) else (0.0, 0.0)
            expected = prior[position] if prior else rates[-1] if rates else INITIAL_RATE
            rates.append((accepted + self._strength * expected) / (tried + self._strength))
        return rates

    def _scale(self, factor: float) -> None:
        for counts in self._counts.values():
            counts[:] = [[accepted * factor, tried * factor] for accepted, tried in counts]


class RequestAcceptance:
    """One request's acceptance, which begins with the overall one (see Controller.track).

    cap: the drafted tokens in a row it can still use: 0 when it wants no speculation, otherwise at most the tokens
    that remain to it less one; the engine lowers it. backlog: tokens decoded that the head has not read; the engine
    adds those of a prompt that was read without the head. remaining: the most tokens it may still emit.
    """

    def __init__(self, overall: Acceptance, cap: int, backlog: int = 0) -> None:
        self.cap, self.backlog = cap, backlog
        self.remaining = math.inf
        self._overall, self.own = overall, Acceptance(ROW_MEMORY, ROW_STRENGTH)
        self.emitted = 0  # tokens; the controller compares it before and after a step

    def observe(self, plan: DraftPlan, accepted: int, *, trimmed: bool = False) -> None:
        """Count, after each step, what was drafted for this request (`plan.capped(cap)`, or OFF) and accepted.

        trimmed: the request ended within the block, so that the tokens after the end were not judged; such a
        verification is not learned from.
        """
        self.emitted += accepted + 1
        self.backlog = self.backlog + 1 if plan == OFF else 0
        if plan != OFF and not trimmed:
            self.own.observe(plan, accepted)
            self._overall.observe(plan, accepted)

    def expected(self, plan: DraftPlan, overall: list[float]) -> list[float]:
        """Expect the tokens of a step that drafts 0, 1, ... of the `length` positions of `plan`: 1 + sums of products.

        overall: the overall rates of `plan`.
        """
        return list(accumulate(accumulate(self.own.rates(plan, overall), mul), initial=1.0))


def widened(chain: list[float], nodes: int) -> list[float]:
    """Guess a tree's rate at each depth: a level of several candidates misses more seldom than one does.

    The exponent fits what EAGLE reports of chains and of trees of 25 to 60 nodes; measurements soon outweigh it.
    """
    exponent = 1 + 0.2 * math.log(max(1.0, nodes / len(chain)))
    return [1 - (1 - rate) ** exponent for rate in chain]


# ---- costs of a step's parts, as functions of the number of tokens, from the steps that are run ----


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
