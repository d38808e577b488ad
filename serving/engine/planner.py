"""Choice of what to draft for each request in each step: what gives the most tokens a second, which may be nothing.

    rate = sum over requests of expected tokens / (one pass over all their blocks + the head's steps)

The costs come from `StepCosts`, the expected tokens (1 + sums of products of acceptance rates) from `Acceptance`; both
are measured on the steps that are run anyway. First the best of the plans that are alike for all requests is taken,
then each request may take another one, given those of the others. What the estimates say of the head when it does not
draft, and of plain steps when it does, is checked by probes now and then; what one loses decides how long the next one
waits. Lookup needs none: what it would have drafted is compared with what was emitted.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from draft.errors import UserError
from serving.engine.estimates import (
    DRAFTED,
    HEAD,
    LONGEST_MATCH,
    OFF,
    Acceptance,
    DraftPlan,
    HeadEstimate,
    RequestEstimate,
    StepCosts,
)
from serving.engine.verification import DraftTree, calibrated

MARGIN = 1.03  # what plans must promise over plain decoding, to replace it
ROW_MARGIN = 0.1  # of its share of the tokens must be gained by a request that takes another plan than the others
PROBE_BUDGET = 0.005  # share of the time that probes may lose
PROBE_STEPS = 3, 16  # a probe's fewest and most steps
PROBE_ROWS = 4  # one request in so many drafts in a probe of the head, which must catch up on each
PROBE_GAP = 48  # steps between two probes, however little they lose
CATCH_UP_STEPS = 64  # steps that share the cost of catching up when drafting begins again, in a request of so many
COPIES = (1, 2, 3, 5, 7, 11, 15, 23, 31)  # tokens of lookup's plans

_CHAINS = [DraftPlan.chain(length) for length in range(33)]
_LOOKUPS = {count: DraftPlan.lookup(count) for count in COPIES}


class Option(NamedTuple):
    """A plan for one request, and what to expect of it."""

    plan: DraftPlan
    tokens: float = 1.0  # emitted
    nodes: float = 0.0  # drafted
    steps: float = 0.0  # of the head
    seconds: float = 0.0  # a step's share of what the head must read first
    head: HeadEstimate | None = None  # that takes the steps


_NOTHING = Option(OFF)


@dataclass
class _Probe:
    """Steps that look at what is not in use."""

    what: str  # "head", or "off": plain steps
    steps: int = 0
    tokens: int = 0  # emitted
    seconds: float = 0.0  # catching up aside
    cost: float = 0.0  # seconds of all, by the model: a slow moment must not put off the next probe for long

    def goes_on(self, rate: float) -> bool:
        """Test that it has not taken its fewest steps, or is no slower than what is in use."""
        fewest, most = PROBE_STEPS
        return self.steps < fewest or (self.steps < most and self.tokens >= rate * self.seconds)


class Controller:
    """Chooses the plans of one engine.

    Call in each step: choose, the observe methods as the parts are run, those of RequestEstimate. One thread calls
    these; `stats` may be called by any. All seconds that go in and out are wall-clock, and those inside at the pace of
    the calibration (see `StepCosts`).
    """

    def __init__(self, length: int) -> None:
        """length: of the longest chain of the head."""
        self.length = length
        self.lock = threading.Lock()  # of all figures that `stats` reads
        self.costs = StepCosts()
        self.acceptance = Acceptance()  # of copies; that of heads is in their own figures
        self.head = HeadEstimate()  # of requests whose head is not told
        self.plans: list[DraftPlan] = []  # of the present step
        self.tail_floor = math.inf  # survival from which one more copied token pays; see `HeadEstimate.floor`
        self.chosen: Counter[str] = Counter()
        self.probes = 0
        self._rates: dict[str, float] = {}  # tokens per second that plans promised at the last decision
        self._choice: tuple[list[Option], float] = [], 0.0  # of the present step, with the width of its pass
        self._rows: list[RequestEstimate] = []  # of the present step
        self._emitted = 0  # by these rows before the present step
        self.drafting = False  # a head drafts, by the last decision
        self._idle = False  # a head that could draft does not, by the last decision
        # seconds in which a probe of the head, and of plain steps, could have been due: requests that come and go, and
        # the plans that change with them, let it begin no sooner
        self._clock = {"head": 0.0, "off": 0.0}
        self._seconds = 0.0  # of the present step
        self._expected = 0.0  # the same by the model
        self._late = 0.0  # what the head's catching up adds to the present one
        self._known = 0  # tokens in the present one without drafts, those of prompts, too
        self._readers = 0  # requests whose prompts are being read
        self._plain = 0.0  # seconds of a pass without drafts and prompts, but with a token of each reader
        self._slope = 0.0  # seconds that a token adds to the present one, over a doubling
        self._probe: _Probe | None = None
        self._probe_at = {"head": 0.0, "off": 0.0}  # on its clock

    def track(self, head: HeadEstimate | None = None) -> RequestEstimate:
        """Return the estimates of a new request; head: that drafts for it."""
        return RequestEstimate(self.acceptance, head or self.head)

    def choose(self, rows: Sequence[RequestEstimate], prompts: int = 0, readers: int = 0) -> list[DraftPlan]:
        """Return the plans of this step.

        rows: of all requests that are decoded in the step, those that draft nothing (room 0) too: they share its pass.
        prompts: tokens of prompts that its pass reads, too; readers: requests whose prompts are not read to the end.
        """
        with self.lock:
            self._end_step(rows)
            self._known, self._readers = len(rows) + prompts, readers
            self._plain = self.costs.target(len(rows) + readers)
            self._slope = self.costs.slope(self._known) if rows else 0.0
            self.plans = [option.plan for option in self._decide(rows)] if rows else []
            return self.plans

    def observe_plans(self, plans: Sequence[DraftPlan]) -> None:
        """The plans of this step as they were carried out: with what was copied behind chains."""
        with self.lock:
            self.plans = list(plans)
            self.chosen.update(map(str, plans))

    def calibration(self, row: RequestEstimate, *, samples: bool) -> tuple[float, ...] | None:
        """Return what `Job` takes; None: nothing is learned from confidences. samples: the request is not greedy."""
        return row.drafter.calibrations[samples].rates

    def tail(self, row: RequestEstimate, chain: DraftTree, match: int, *, samples: bool) -> int:
        """Return how many tokens to copy behind a chain, after which the match is `match` tokens long.

        Each must pay by itself: its chance of acceptance times the present tokens per second.
        """
        rates = row.drafter.calibrations[samples].rates
        share = math.prod(calibrated(rates, each) for each in chain.confidences)
        survival = (
            row.survival(min(match, LONGEST_MATCH), row.room - len(chain)) if match and self.tail_floor < 1 else []
        )
        return sum(share * each >= self.tail_floor for each in survival)

    def observe_target(self, tokens: int, seconds: float, *, ignore: bool = False) -> None:
        """A pass of the target over `tokens` tokens, with the sampling and bookkeeping that follow it.

        ignore: the pass held something else too (a chunk of a prompt), and says nothing about decoding.
        """
        with self.lock:
            if not ignore:
                self.costs.observe_target(tokens, seconds)
            self._seconds += seconds / self.costs.pace

    def observe_draft(self, trees: Sequence[DraftTree], seconds: float, head: HeadEstimate | None = None) -> None:
        """Drafting of what a head drafts, with re-reading what was accepted."""
        with self.lock:
            steps, nodes = max(tree.depth - tree.copied for tree in trees), sum(tree.drawn for tree in trees)
            kind = "chain" if all(tree.is_chain for tree in trees) else "tree"
            seconds /= self.costs.pace
            (head or self.head).draft[kind].observe(nodes / steps, seconds / steps)
            self._seconds += seconds

    def observe_catch_up(self, tokens: int, seconds: float, head: HeadEstimate | None = None) -> None:
        """A head has read `tokens` tokens, of all its requests, that the target decoded without it."""
        with self.lock:
            seconds /= self.costs.pace
            (head or self.head).catch_up.observe(tokens, seconds)
            self._late += seconds

    def observe_confidence(self, row: RequestEstimate, chain: DraftTree, accepted: int, *, samples: bool) -> None:
        """The head's tokens of a chain, of which `accepted` were."""
        for position, confidence in enumerate(chain.confidences[: accepted + 1]):
            row.drafter.calibrations[samples].observe(confidence, position < accepted)

    def stats(self, head: HeadEstimate | None = None, length: int | None = None) -> dict[str, Any]:
        """Return the controller's estimates and counts; JSON-able, seconds.

        head: whose figures they contain; length: of its longest chain.
        """
        head, length = head or self.head, self.length if length is None else length
        with self.lock:
            plans, plain, present = Counter(map(str, self.plans)), self._rates.get("off"), self._rates.get("chosen")
            matches, pace = range(1, LONGEST_MATCH + 1), self.costs.pace
            rates = {name: rate / pace for name, rate in self._rates.items() if name != "chosen"}
            return {
                "plan": ", ".join(plans) or "off",
                "why": self._reason(head),
                "expected_gain": present / plain if plain and present else None,
                "expected_tokens_per_second": rates,
                "target_seconds": self.costs.target.table(pace),
                "draft_step_seconds": {kind: curve.table(pace) for kind, curve in head.draft.items()},
                "catch_up_seconds": head.catch_up.table(pace),
                "acceptance": {
                    "head": [head.acceptance.rate(HEAD, position) for position in range(length)],
                    "lookup": {str(match): self.acceptance.rate(match, 0) for match in matches},
                },
                "confidence": dict(zip(("greedy", "sampled"), (each.rates for each in head.calibrations), strict=True)),
                "steps": dict(self.chosen),
                "probes": self.probes,
            }

    def _end_step(self, rows: Sequence[RequestEstimate]) -> None:
        """Account for the step before, and for the probe that it was a part of."""
        for what, runs in (("off", self.drafting), ("head", self._idle or not self.drafting)):
            self._clock[what] += runs * (self._seconds + self._late)
        if probe := self._probe:
            probe.steps += 1
            probe.tokens += sum(row.emitted for row in self._rows) - self._emitted
            probe.seconds += self._seconds
            probe.cost += self._expected + self._late
        self._rows, self._emitted = list(rows), sum(row.emitted for row in rows)
        self._seconds = self._late = 0.0

    def _decide(self, rows: Sequence[RequestEstimate]) -> list[Option]:
        plain = [_NOTHING] * len(rows)
        self._rates = {"off": self._rate(plain)}
        # the first steps tell what a plain one costs
        chosen = self._best(rows, plain) if self.costs.target.narrowest <= len(rows) else plain
        self.drafting = any(option.steps for option in chosen)
        self._rates["chosen"] = rate = self._rate(chosen)
        chosen = self._probed(rows, chosen, rate)
        nodes = sum(option.nodes for option in chosen)
        self._expected = self._seconds_of(nodes, _draft_seconds(chosen))
        slope = self.costs.slope(self._known + nodes)
        # a probe looks at whole chains
        self.tail_floor = math.inf if self._probe else rate * slope
        for head in {row.drafter for row in rows}:
            drafting = sum(option.head is head for option in chosen)
            head.floor = 0.0 if self._probe else rate * (slope + head.draft["chain"](drafting))
        self._choice = chosen, len(rows) + nodes
        return chosen

    def _best(self, rows: Sequence[RequestEstimate], plain: list[Option]) -> list[Option]:
        """Return the best plans that are alike, but for requests for which another one is better."""
        rates = self._rates
        # no draft gains where its tokens are accepted less often than this, and then none is worth a look
        floor = rates["off"] * self.costs.target.least_slope(self._known)
        chains = [self._chains(row) if row.head and row.own.rate(HEAD, 0) > floor else [_NOTHING] for row in rows]
        chosen, best = plain, rates["off"]
        for length in range(1, max(map(len, chains))):
            alike = _alike(chains, length)
            rates[f"chain {length}"] = rate = self._rate(alike)
            if rate > best:
                chosen, best = alike, rate
        for place, row in enumerate(rows):
            match = min(row.match, LONGEST_MATCH)
            others = self._copies(row) if match and row.own.rate(match, 0) > floor else []
            if chosen[place].nodes and len(rows) > 1:
                others.append(_NOTHING)
            if others:
                chosen, best = self._with_another(chosen, place, others, best)
        return chosen if best > (1.0 if self.drafting else MARGIN) * rates["off"] else plain

    def _with_another(
        self, chosen: list[Option], place: int, others: list[Option], best: float
    ) -> tuple[list[Option], float]:
        """Return plans, and their rate, in which one request may have another plan, given those of the rest."""
        rest = [*chosen[:place], *chosen[place + 1 :]]
        tokens, nodes = sum(each.tokens for each in rest), sum(each.nodes for each in rest)
        drafting, late = _draft_seconds(rest), sum(each.seconds for each in rest)
        tokens += self._readers
        found, least = None, best * (1 + ROW_MARGIN / len(chosen) if len(chosen) > 1 else 1.0)
        for option in others:  # none with steps of the head
            seconds = self._seconds_of(nodes + option.nodes, drafting) + late
            rate = (tokens + option.tokens) / seconds if seconds else 0.0
            if rate > least and len(chosen) + nodes + option.nodes <= self.costs.target.reach:
                found, least = option, rate
        return (chosen, best) if found is None else ([*chosen[:place], found, *chosen[place + 1 :]], least)

    def _chains(self, row: RequestEstimate) -> list[Option]:
        """Return nothing, and chains of 1 to row.head tokens."""
        late = row.drafter.catch_up(row.backlog) if row.backlog else 0.0
        shares = row.survival(HEAD, row.head)
        tokens = [*accumulate(shares, initial=1.0)]
        nodes = [*accumulate(row.survival(DRAFTED, row.head), initial=0.0)]
        options = [_NOTHING]
        for length in range(1, row.head + 1):
            drafted = nodes[min(length, len(nodes) - 1)]
            emitted = tokens[min(length, len(shares))]
            share = late / max(1.0, min(CATCH_UP_STEPS, row.remaining / emitted))
            options.append(Option(_CHAINS[length], emitted, drafted, drafted, share, row.drafter))
        return options

    @staticmethod
    def _copies(row: RequestEstimate) -> list[Option]:
        """Return copies of several lengths."""
        tokens = [*accumulate(row.survival(min(row.match, LONGEST_MATCH), row.room), initial=1.0)]
        return [Option(_LOOKUPS[count], tokens[count], count) for count in COPIES if count < len(tokens)]

    def _rate(self, chosen: Sequence[Option]) -> float:
        """Estimate the tokens per second of these plans; 0: they go beyond what is known of the costs."""
        nodes = sum(option.nodes for option in chosen)
        if any(option.steps for option in chosen) and len(chosen) + nodes > self.costs.target.reach:
            return 0.0
        seconds = self._seconds_of(nodes, _draft_seconds(chosen)) + sum(option.seconds for option in chosen)
        return (sum(option.tokens for option in chosen) + self._readers) / seconds if seconds else 0.0

    def _seconds_of(self, nodes: float, drafting: float) -> float:
        """Estimate the present step with so many drafted tokens, and so many seconds of the heads' steps.

        The time of prompts is left out, since they are read in any case, but drafts are as dear as beside them. Those
        that read count as if they decoded: they soon will, and a token that is emitted now saves its share of a pass
        with them, not of the present narrow one. Few drafts are no cheaper than many: neighbouring widths differ by
        less than their noise.
        """
        if not nodes:
            return self._plain
        target = self.costs.target
        added = max(target(self._known + nodes) - target(self._known), nodes * self._slope)
        return self._plain + added + drafting

    # probes

    def _probed(self, rows: Sequence[RequestEstimate], chosen: list[Option], rate: float) -> list[Option]:
        """Return the plans of a probe, when there is one, or those that were chosen."""
        able = sorted((place for place, row in enumerate(rows) if row.head), key=lambda place: rows[place].backlog)
        in_use = {option.head for option in chosen if option.steps}
        idle = [place for place in able if rows[place].drafter not in in_use]  # whose head drafts for nobody
        self._idle = bool(idle)
        gap, probe = PROBE_GAP * self.costs.target(len(rows)), self._probe
        if probe and not (able and probe.goes_on(rate)):
            lost = probe.cost - probe.tokens / rate if rate else 0.0
            self._probe_at[probe.what] = self._clock[probe.what] + max(gap, lost / PROBE_BUDGET)
            self._probe = None
        plain_known = self.costs.target.known(len(rows))
        for what, places in (("off", able if in_use else []), ("head", idle)):
            if not self._probe and places and rate and (plain_known or (what == "head" and in_use)):
                self._probe_at[what] = self._probe_at[what] or self._clock[what] + gap
                due = self._clock[what] >= self._probe_at[what]
                if due and (what == "off" or self._could_pay(rows, chosen, idle, rate)):
                    self._begin_probe(what, [rows[place] for place in places])
        if self._probe is None:
            return chosen
        if self._probe.what == "off":
            return [_NOTHING] * len(rows)
        chains = [self._chains(row) for row in rows]
        longest = max(row.head for row in rows)
        alike = _alike(chains, max(range(1, longest + 1), key=lambda length: self._rate(_alike(chains, length))))
        looked_at = idle or able
        few = set(looked_at[: math.ceil(len(looked_at) / PROBE_ROWS)])
        return [alike[place] if place in few else option for place, option in enumerate(chosen)]

    def _could_pay(self, rows: Sequence[RequestEstimate], chosen: list[Option], idle: list[int], rate: float) -> bool:
        """Test that idle heads would be used if they were always right: otherwise nothing can be found out about
        them."""
        others = [option for place, option in enumerate(chosen) if place not in idle]
        tokens, nodes = sum(each.tokens for each in others) + self._readers, sum(each.nodes for each in others)
        best = 0.0
        for each in range(1, max(row.head for row in rows) + 1):
            drafts = [Option(OFF, 1.0 + each, each, each, 0.0, rows[place].drafter) for place in idle]
            seconds = self._seconds_of(nodes + len(idle) * each, _draft_seconds([*others, *drafts]))
            best = max(best, (tokens + len(idle) * (1.0 + each)) / seconds)
        return best > MARGIN * rate

    def _begin_probe(self, what: str, rows: Sequence[RequestEstimate]) -> None:
        self._probe = _Probe(what)
        self.probes += 1
        if what == "head":
            heads = {row.drafter: row.drafter.acceptance for row in rows}
            for acceptance in (*heads.values(), *(row.own for row in self._rows if row.drafter in heads)):
                acceptance.forget_head()

    def _reason(self, head: HeadEstimate) -> str:
        """State in one line what was chosen, and why."""
        chosen, width = self._choice
        if not chosen:
            return "nothing has been decoded yet"
        plans = ", ".join(f"{plan} for {count}" for plan, count in Counter(map(str, self.plans)).items())
        reason, costs, ms = self._cause(any(each.nodes for each in chosen)), self.costs, 1e3 * self.costs.pace
        passes = ", ".join(f"{n:.0f}: {ms * costs.target(n):.3g} ms" for n in dict.fromkeys((len(chosen), width)))
        step = ms * head.draft["chain"](1)
        return f"{plans}: {reason} (a pass of {passes}" + (f"; a step of the head {step:.3g} ms)" if step else ")")

    def _cause(self, drafts: bool) -> str:
        rates = {name: rate / self.costs.pace for name, rate in self._rates.items()}
        plain = rates["off"]
        best = max((name for name in rates if name not in ("off", "chosen")), key=rates.__getitem__, default="")
        if self._probe:
            return f"a probe of {'plain steps' if self._probe.what == 'off' else 'the head'}"
        if drafts:
            return f"{rates['chosen']:.0f} tokens a second expected, {plain:.0f} without drafts"
        return f"{plain:.0f} tokens a second expected" + (f", {rates[best]:.0f} with {best}" if best else "")


def _draft_seconds(chosen: Sequence[Option]) -> float:
    """Estimate the seconds of the heads' steps: the chains of one head are drafted together."""
    runs: dict[HeadEstimate, tuple[float, int]] = {}  # -> steps of the longest, requests
    for option in chosen:
        if option.steps and option.head is not None:
            longest, count = runs.get(option.head, (0.0, 0))
            runs[option.head] = max(longest, option.steps), count + 1
    return sum(longest * head.draft["chain"](count) for head, (longest, count) in runs.items())


def _alike(chains: list[list[Option]], length: int) -> list[Option]:
    """Return chains of one length, but for requests that have shorter ones only."""
    return [own[min(length, len(own) - 1)] for own in chains]


class Fixed(Controller):
    """Always the same plan, with the same interface and the same statistics."""

    def __init__(self, plan: DraftPlan) -> None:
        super().__init__(plan.length)
        self.plan, self.drafting = plan, plan.length > 0

    def calibration(self, row: RequestEstimate, *, samples: bool) -> tuple[float, ...] | None:
        return None

    def stats(self, head: HeadEstimate | None = None, length: int | None = None) -> dict[str, Any]:
        return {**super().stats(head, length), "plan": str(self.plan)}

    def _decide(self, rows: Sequence[RequestEstimate]) -> list[Option]:
        chosen = [Option(self.plan.capped(row)) for row in rows]
        self._choice = chosen, len(rows) + sum(each.plan.nodes + each.plan.copied for each in chosen)
        return chosen

    def _cause(self, drafts: bool) -> str:
        return "the only plan of this mode"


def make_controller(speculation: str, length: int, tree_size: int) -> Controller:
    """Return the controller that chooses among the plans of this kind of speculation."""
    if speculation == "auto":
        return Controller(length)
    if speculation == "tree" and length and tree_size <= length:
        raise UserError(
            f"tree_size = {tree_size}: a tree has more nodes than its depth, {length}; choose a larger one."
        )
    tree = DraftPlan.tree(length, tree_size) if length else OFF
    return Fixed({"off": OFF, "chain": DraftPlan.chain(length), "tree": tree}[speculation])
