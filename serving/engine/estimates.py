"""Plans of what to draft, and estimates of how much of it is accepted and of what a step costs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from statistics import median_low

from serving.engine.verification import bin_of

BRANCHING = 8  # children that a tree's node may have, and nodes that the head reads at a depth


@dataclass(frozen=True)
class DraftPlan:
    """The drafts for one request in a step: those of the head, and behind them what is copied."""

    length: int = 0  # steps of the head, at most: a chain may end before
    nodes: int = 0  # tokens that it drafts
    copied: int = 0  # tokens from lookup

    @classmethod
    def chain(cls, length: int) -> DraftPlan:
        return cls(length, length)

    @classmethod
    def tree(cls, depth: int, nodes: int) -> DraftPlan:
        """Return a tree of so many nodes, or of as many as find room at that depth."""
        return cls(depth, min(nodes, BRANCHING) if depth == 1 else nodes)

    @classmethod
    def lookup(cls, copied: int) -> DraftPlan:
        return cls(0, 0, copied)

    @cached_property
    def kind(self) -> str:
        """The sources of the drafts: "off", "chain", "tree", "lookup" or "chain + lookup"."""
        drafted = "" if self.nodes == 0 else "chain" if self.nodes == self.length else "tree"
        return " + ".join(filter(None, (drafted, "lookup" if self.copied else ""))) or "off"

    def with_copies(self, copied: int) -> DraftPlan:
        """This plan with so many copied tokens."""
        return self if copied == self.copied else DraftPlan(self.length, self.nodes, copied)

    def capped(self, row: RequestEstimate) -> DraftPlan:
        """This plan for a request that can use less."""
        length = min(self.length, row.head)
        if length == self.length and not self.copied:
            return self
        copied = min(self.copied, row.room - length) if row.match or length else 0
        if self.tree_nodes and length:
            return DraftPlan.tree(length, self.nodes)
        return DraftPlan(length, length, copied)

    @property
    def tree_nodes(self) -> int:
        """Nodes of the tree; 0: a chain."""
        return self.nodes if self.nodes > self.length else 0

    def __str__(self) -> str:
        return self.kind.replace("chain", f"chain {self.length}").replace("tree", f"tree {self.nodes}x{self.length}")


OFF = DraftPlan()


# ---- acceptance ----

HEAD, DRAFTED = 0, -1  # sources; above 0: lookup after a match of so many tokens
LONGEST_MATCH, LAST_POSITION = 8, 7  # longer matches, and later positions of copied tokens, share their figures
INITIAL_RATE = 0.7  # of a head that was never seen: high enough for it to be tried
OVERALL_MEMORY, ROW_MEMORY = 256, 64  # observations after which one weighs 1/e
OVERALL_STRENGTH, ROW_STRENGTH = 3, 10  # observations that the prior of an estimate is worth
KEPT_AFTER_PAUSE = 20  # observations that all that was known before a pause is worth
NEGLIGIBLE = 0.02  # probability of acceptance below which no further token is considered
BINS = 16  # of confidence


class Acceptance:
    """Acceptance rates by source and position, given that all tokens before were accepted: weighted means.

    HEAD: what the head drafts, where a chain that ended before by itself counts as rejected; DRAFTED: how often one
    did not. Lookup is observed in every step, whatever was drafted: the emitted tokens tell what would have been
    accepted.
    """

    def __init__(self, overall: Acceptance | None = None, of_head: Acceptance | None = None) -> None:
        """overall: the prior of one request's rates; None: these are those of all requests. of_head: the prior of the
        rates of its head, where that has figures of its own."""
        self._overall, self._of_head = overall, of_head or overall
        self._fading = 1 - 1 / (OVERALL_MEMORY if overall is None else ROW_MEMORY)
        self._strength = OVERALL_STRENGTH if overall is None else ROW_STRENGTH
        self._cells: dict[tuple[int, int], tuple[float, float]] = {}  # (source, position) -> (accepted, tried)
        self._known: dict[tuple[int, int], float] = {}  # overall rates since the last observation: all requests ask

    def observe(self, source: int, position: int, accepted: bool) -> None:
        hits, tried = self._cells.get((source, position), (0.0, 0.0))
        self._cells[source, position] = hits * self._fading + accepted, tried * self._fading + 1
        self._known.clear()

    def forget_head(self) -> None:
        """After a pause: keep the estimates of the head, but let few new observations outweigh them."""
        for cell, (hits, tried) in self._cells.items():
            if cell[0] <= HEAD and tried > KEPT_AFTER_PAUSE:
                self._cells[cell] = hits * KEPT_AFTER_PAUSE / tried, KEPT_AFTER_PAUSE
        self._known.clear()

    def rate(self, source: int, position: int) -> float:
        """Estimate a rate, drawn towards the prior where little was observed."""
        cell = source, position
        if (known := self._known.get(cell)) is not None:
            return known
        hits, tried = self._cells.get(cell, (0.0, 0.0))
        overall = self._of_head if source <= HEAD else self._overall
        prior = self._guess(source, position) if overall is None else overall.rate(source, position)
        rate = (hits + self._strength * prior) / (tried + self._strength)
        if self._overall is None:
            self._known[cell] = rate
        return rate

    def _guess(self, source: int, position: int) -> float:
        """Guess from what is alike: the position before, or what a longer match gives at once."""
        if source > HEAD:
            after = min(source + 1, LONGEST_MATCH)
            return self.rate(after, position - 1) if position else source / (source + 2)
        return self.rate(source, position - 1) if position else INITIAL_RATE if source == HEAD else 1.0


class Calibration:
    """Acceptance of the head's tokens by the largest probability that it gave to any token in their place."""

    def __init__(self) -> None:
        self._cells = [[0.0, 0.0] for _ in range(BINS)]
        self.rates = tuple((place + 0.5) / BINS for place in range(BINS))  # at first: as it says itself

    def observe(self, confidence: float, accepted: bool) -> None:
        place = bin_of(confidence, BINS)
        cell, fading = self._cells[place], 1 - 1 / OVERALL_MEMORY
        cell[:] = cell[0] * fading + accepted, cell[1] * fading + 1
        rate = (cell[0] + OVERALL_STRENGTH * (place + 0.5) / BINS) / (cell[1] + OVERALL_STRENGTH)
        self.rates = (*self.rates[:place], rate, *self.rates[place + 1 :])


class HeadEstimate:
    """The planner's figures of one head: its acceptance in all requests, and what its steps cost."""

    def __init__(self) -> None:
        self.acceptance = Acceptance()  # of HEAD and DRAFTED
        self.calibrations = Calibration(), Calibration()  # of greedy requests, and of those that sample
        # seconds of one step, by its tokens; of reading what the target decoded while the head did not draft
        self.draft = {"chain": Curve(), "tree": Curve()}
        self.catch_up = Curve()
        self.floor = 0.0  # survival from which one more token pays in the present step


class RequestEstimate:
    """The planner's estimates of one request. The engine sets the public fields before each step."""

    def __init__(self, overall: Acceptance, drafter: HeadEstimate | None = None) -> None:
        """overall: of all requests; drafter: of the request's head."""
        self.drafter = drafter or HeadEstimate()  # without a head nothing is learned of it
        self._overall, self._of_head = overall, overall if drafter is None else drafter.acceptance
        self.own = Acceptance(overall, self._of_head)
        self.room = 0  # the most tokens that may be drafted now
        self.head = 0  # the most of them that the head may draft
        self.match = 0  # tokens of the suffix that has occurred before; 0: nothing can be copied
        self.backlog = 0  # tokens that the target has read and the head has not
        self.remaining: float = math.inf  # the most tokens that may still be emitted
        self.emitted = 0  # tokens

    def observe(self, emitted: int, *, by_head: bool, copied: int = 0) -> None:
        """Count the tokens of a step; by_head: the head drafted in it, and reads what was accepted when it does again.

        copied: so many of the tokens were copied behind the head's, which then adds to what it must read. What the head
        drafted is observed by `observe_head`, and what would have been copied by `observe_lookup`.
        """
        self.emitted += emitted
        self.backlog = copied if by_head else self.backlog + emitted

    def observe_head(self, planned: int, drafted: int, accepted: int) -> None:
        """Count `accepted` of `drafted` tokens in a row, where the plan allowed `planned`.

        What follows a rejection was not judged. Nor may it tell how long chains are: that depends on tokens that were
        withheld, and the next plans would, too (see verification.py).
        """
        for acceptance in (self.own, self._of_head):
            for position in range(min(accepted + 1, planned)):
                acceptance.observe(HEAD, position, position < accepted)
                acceptance.observe(DRAFTED, position, position < drafted)

    def observe_lookup(self, match: int, accepted: int, judged: int) -> None:
        """Count the tokens that were copied, or would have been: `accepted` in a row, of `judged` that are known."""
        source = min(match, LONGEST_MATCH)
        for position in range(min(accepted + 1, judged, LAST_POSITION + 1)):
            for acceptance in (self.own, self._overall):
                acceptance.observe(source, position, position < accepted)

    def survival(self, source: int, count: int) -> list[float]:
        """Return the probability that 1, 2, ... up to `count` tokens of a source are accepted, while it matters."""
        shares: list[float] = []
        share = 1.0
        for position in range(count):
            if source <= HEAD or position <= LAST_POSITION:
                rate = self.own.rate(source, position)
            share *= rate
            if share < NEGLIGIBLE:
                break
            shares.append(share)
        return shares


# ---- costs of a step's parts, as functions of the number of tokens, from the steps that are run ----

WINDOW = 15  # measurements kept of each width: their median leaves out steps that another process slowed down
PACE_WINDOW = 5  # passes whose median tells how fast the machine is at present
FIRST = 5  # passes of a width that the later ones are compared with
STEADY = 1.2  # paces nearer to 1 are noise
ENOUGH = 3  # measurements of a width before it counts as known


class Curve:
    """Seconds as a function of a width (tokens in a pass): straight lines between the widths that were measured.

    A narrower pass never costs more than a wider one: noise that says so is left out.
    """

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._knots: list[tuple[float, float]] = []  # (width, seconds), both rising

    def observe(self, width: float, seconds: float, count: int = 1) -> None:
        """Add a measurement of a width above 0; count: how many it is worth."""
        bucket = _bucket(width)
        samples = self._samples.setdefault(bucket, deque(maxlen=WINDOW))
        samples.extend([seconds] * count)
        self._medians[bucket] = median_low(samples)
        known = [each for each in self._medians if len(self._samples[each]) >= ENOUGH]
        knots, least = list[tuple[float, float]](), math.inf
        for each in sorted(known if len(known) > 1 else self._medians, reverse=True):
            least = min(least, self._medians[each])
            knots.append((each, least))
        self._knots = knots[::-1]

    def known(self, width: float) -> bool:
        """Test that (about) this width itself has been measured often enough."""
        return len(self._samples.get(_bucket(width), ())) >= ENOUGH

    @property
    def narrowest(self) -> float:
        """The narrowest pass whose cost is known; infinite while none is."""
        return min((each for each, samples in self._samples.items() if len(samples) >= ENOUGH), default=math.inf)

    @property
    def reach(self) -> float:
        """The widest pass whose cost can be told: twice the only known width, or four times the widest of several."""
        return (4 if len(self._knots) > 1 else 2) * self._knots[-1][0] if self._knots else 0.0

    def __call__(self, width: float) -> float:
        """Seconds at this width; 0 while nothing has been measured at all."""
        knots = self._knots
        if not knots:
            return 0.0
        if width <= knots[0][0] or len(knots) == 1:
            return knots[0][1]
        right = min(bisect_left(knots, (width, 0.0)), len(knots) - 1)  # beyond the last one: on with the last slope
        left = right - 1
        while width > knots[right][0] and left and knots[right][0] < 2 * knots[left][0]:
            left -= 1  # of a doubling at least: closer points would give noise
        (x0, y0), (x1, y1) = knots[left], knots[right]
        return y0 + (y1 - y0) * (width - x0) / (x1 - x0)

    def least_slope(self, width: float) -> float:
        """Return the least that a token costs of any number of tokens beyond a width; 0 while that is not known."""
        knots = self._knots
        if len(knots) < 2:
            return 0.0
        here, far = self(width), 2 * max(width, knots[-1][0])
        beyond = [(seconds - here) / (each - width) for each, seconds in knots if each > width]
        return max(0.0, min([*beyond, (self(2 * far) - self(far)) / far]))

    def table(self, pace: float = 1.0) -> dict[str, float]:
        """Width -> seconds, for people; pace: that of the machine."""
        return {f"{width:.4g}": pace * seconds for width, seconds in self._knots}


def _bucket(width: float) -> int:
    """Each width below 16 by itself, wider ones eight to a doubling: the narrowest of each."""
    whole = max(1, round(width))
    return whole >> (fine := max(0, whole.bit_length() - 4)) << fine


class StepCosts:
    """The cost of a ragged pass of the target, by its tokens, and the machine's pace; what heads cost is in their
    `HeadEstimate`.

    Other processes make a machine slow for a while, and a width that is not run then would look cheap. So all curves
    are in seconds of a calm machine: what is measured is divided by `pace`, which tells how much longer the last passes
    took than the first ones of their width did. Not than those of the calibration, which are passes alone: what
    sampling and bookkeeping add to a step would look like a slow machine, and never be learned.
    """

    def __init__(self) -> None:
        self.pace = 1.0
        self._first: dict[int, list[float]] = {}  # seconds of the first passes of each width
        self._ratios: deque[float] = deque(maxlen=PACE_WINDOW)
        self.target = Curve()

    def calibrate(self, tokens: int, seconds: float) -> None:
        """Take the figure of a pass that was run for it."""
        self.target.observe(tokens, seconds, ENOUGH)

    def observe_target(self, tokens: int, seconds: float) -> None:
        """Take the figure of a pass, and the machine's pace from it."""
        first = self._first.setdefault(_bucket(tokens), [])
        if len(first) >= ENOUGH:
            self._ratios.append(seconds / median_low(first))
            pace = median_low(self._ratios)
            self.pace = pace if max(pace, 1 / pace) > STEADY else 1.0
        if len(first) < FIRST:
            first.append(seconds / self.pace)
        self.target.observe(tokens, seconds / self.pace)

    def slope(self, tokens: float) -> float:
        """Estimate what one more token costs in a pass of so many, over a doubling."""
        return (self.target(2 * tokens) - self.target(tokens)) / tokens
