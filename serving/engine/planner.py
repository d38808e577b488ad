"""Chooses what to draft in each step: as much as gives the most tokens per second, and nothing where that is fastest.

    rate(plan) = sum over requests of expected tokens / (pass over all their blocks + drafting)

The costs come from `StepCosts`, the expected tokens (1 + sum of products of acceptance rates) from `Acceptance`; both
are measured on the steps that are run anyway, so a plan is tried when what is known of it promises more than the
present one by MARGIN. What is not being run is looked at now and then by probes: without drafting, whether
drafting pays by now; while drafting, what a plain step costs by now. A probe goes on while it is no slower than
the present plan, and what it lost decides how long the next one waits.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draft.errors import UserError
from serving.engine.estimates import (
    ENOUGH,
    OFF,
    OVERALL_MEMORY,
    OVERALL_STRENGTH,
    Acceptance,
    DraftPlan,
    RequestAcceptance,
    StepCosts,
)

MARGIN = 1.04  # what a plan must promise over the present one, and over plain decoding, to replace it
PATIENCE = 8  # steps between decisions about an unchanged batch
PROBE_BUDGET = {False: 0.003, True: 0.008}  # share of the time that probes may lose beside plain decoding, and drafting
NEAR = 0.8  # of the present plan's rate must be promised by what is worth a probe while drafting
PROBE_STEPS = 3, 16  # a probe's fewest and most steps
PROBE_ROWS = 4  # one request in so many drafts in a probe beside plain decoding: the head must catch up on each
PROBE_GAP = 48  # steps between two probes, however little they lose
CATCH_UP_STEPS = 64  # steps that share the cost of catching up when drafting begins again, in a request of so many


@dataclass
class _Stretch:
    """Steps of one plan, as they turned out."""

    plan: DraftPlan
    run: int = 0  # steps
    steps: int = 0  # those of them without other work, of which tokens and seconds are
    tokens: int = 0
    seconds: float = 0.0
    expected: float = 0.0  # seconds, by the model
    catch_up: float = 0.0  # seconds, of all
    comparable: bool = True  # False: it held other work, too


class Controller:
    """Chooses the plans of one engine.

    Call in each step: choose, the observe methods as the parts are run, RequestAcceptance.observe. One thread
    calls these; `stats` may be called by any. All seconds are wall-clock.
    """

    def __init__(self, plans: Sequence[DraftPlan]) -> None:
        """plans: those to choose from, besides OFF."""
        self.plans = [OFF, *(plan for plan in plans if plan != OFF)]
        self.plan = OFF
        self.lock = threading.Lock()  # of all figures that `stats` reads
        self.costs = StepCosts()
        self.acceptance = Acceptance(OVERALL_MEMORY, OVERALL_STRENGTH)
        self.switches = self.probes = 0
        self.chosen: Counter[DraftPlan] = Counter()
        self._rates: dict[DraftPlan, float] = {}  # tokens per second that each plan promised at the last decision
        # seconds for which the plan was not to draft, and to draft: each has probes of its own, which requests that
        # come and go, and the switches they bring, put off no further and let begin no sooner
        self._clocks = {False: 0.0, True: 0.0}
        self._probe_at = {False: 0.0, True: 0.0}
        self._ran: Counter[DraftPlan] = Counter()  # the step, counted from the first, that last ran each plan
        self._wait = 0  # steps until the next decision
        self._rows: list[RequestAcceptance] = []  # of the present step
        self._emitted = 0  # by these rows before the present step
        self._step = _Stretch(OFF)
        self._probe: _Stretch | None = None

    def track(self, cap: int, backlog: int = 0) -> RequestAcceptance:
        """Return the tracker of a new request; see RequestAcceptance."""
        return RequestAcceptance(self.acceptance, cap, backlog)

    def choose(self, rows: Sequence[RequestAcceptance]) -> DraftPlan:
        """The plan for this step; each request drafts `plan.capped(row.cap)`.

        rows: of all requests that are decoded in the step, those that draft nothing (cap 0) too: they share its pass.
        Those that a probe leaves out get a cap of 0 for this step.
        """
        with self.lock:
            step, probe = self._step, self._probe  # the step before this one
            self._clocks[self.plan != OFF] += step.seconds + step.catch_up
            if probe and step.plan == probe.plan:
                probe.run += 1
                probe.catch_up += step.catch_up
                if step.comparable:
                    probe.steps += 1
                    probe.tokens += sum(row.emitted for row in self._rows) - self._emitted
                    probe.seconds += step.seconds
                    probe.expected += step.expected
            changed = len(rows) != len(self._rows)
            self._rows, self._emitted = list(rows), sum(row.emitted for row in rows)
            plan = self._next(changed) if any(row.cap > 0 for row in rows) else OFF
            if self._probe and self.plan == OFF:
                # the others draft nothing: those that the head would have most to read of
                able = sorted((row for row in rows if row.cap > 0), key=lambda row: row.backlog)
                for row in able[math.ceil(len(able) / PROBE_ROWS) :]:
                    row.cap = 0
            self._step = _Stretch(plan, expected=self._seconds(plan) if rows else 0.0)
            self.chosen[plan] += 1
            self._ran[plan] = self.chosen.total()
            return plan

    def observe_target(self, tokens: int, seconds: float, *, ignore: bool = False) -> None:
        """A pass of the target over `tokens` tokens, with the sampling and bookkeeping that follow it.

        ignore: the pass held something else too (a chunk of a prompt), and says nothing about decoding.
        """
        with self.lock:
            if ignore:
                self._step.comparable = False
            else:
                self.costs.target.observe(tokens, seconds)
            self._step.seconds += seconds

    def observe_draft(self, drafted: Sequence[DraftPlan], seconds: float) -> None:
        """Drafting for all requests that draft, each by its own plan, with re-reading what was accepted."""
        with self.lock:
            steps, nodes = max(plan.length for plan in drafted), sum(plan.nodes for plan in drafted)
            kind = "tree" if any(plan.kind == "tree" for plan in drafted) else "chain"
            self.costs.draft[kind].observe(nodes / steps, seconds / steps)
            self._step.seconds += seconds

    def observe_catch_up(self, tokens: int, seconds: float) -> None:
        """The head has read `tokens` tokens, of all requests, that the target decoded without it."""
        with self.lock:
            self.costs.catch_up.observe(tokens, seconds)
            self._step.catch_up += seconds

    def stats(self) -> dict[str, Any]:
        """Return the controller's estimates and counts; JSON-able, seconds."""
        with self.lock:
            rates, plain = self._rates, self._rates.get(OFF, 0.0)
            return {
                "plan": str(self.plan),
                "expected_gain": rates[self.plan] / plain if plain and self.plan in rates else None,
                "expected_tokens_per_second": {str(plan): rate for plan, rate in rates.items()},
                "target_seconds": self.costs.target.table(),
                "draft_step_seconds": {kind: curve.table() for kind, curve in self.costs.draft.items()},
                "catch_up_seconds": self.costs.catch_up.table(),
                "acceptance": {
                    str(plan): self.acceptance.rates(plan) for plan in self.plans if plan == self._shape(plan) != OFF
                },
                "steps": {str(plan): count for plan, count in self.chosen.items()},
                "switches": self.switches,
                "probes": self.probes,
            }

    def _next(self, changed: bool) -> DraftPlan:
        """Go on with a probe or the plan, or decide anew. changed: there are more requests or fewer."""
        self._wait -= 1
        if self._probe and not changed and self._keeps_up(self._probe):
            return self._probe.plan
        if self._probe:
            # let the next one wait until what this one lost is PROBE_BUDGET of the time; by the model: a step that
            # something else slowed down must not put it off for long
            lost = self._probe.expected + self._probe.catch_up - self._probe.tokens / self._rates[self.plan]
            self._set_probe(self.plan, lost / PROBE_BUDGET[self.plan != OFF])
            self._probe = None
        elif self._wait > 0 and not changed:
            return self.plan
        self._decide()
        drafting = self.plan != OFF
        known = self.costs.target.known(self._width(self.plan))
        if known and self._clocks[drafting] >= self._probe_at[drafting] and len(self._rates) > 1:
            self._begin_probe()
        return self._probe.plan if self._probe else self.plan

    def _begin_probe(self) -> None:
        """Without drafting, try what promises most; while drafting, what rested longest: OFF, or what comes near."""
        rates, present = self._rates, self._rates[self.plan]
        if self.plan == OFF:
            plan = max((plan for plan in rates if plan != OFF), key=lambda plan: rates[plan])
            for acceptance in (self.acceptance, *(row.own for row in self._rows)):
                acceptance.forget()
        else:
            near = [plan for plan in rates if plan not in (OFF, self.plan) and rates[plan] >= NEAR * present]
            plan = min([OFF, *near], key=lambda plan: self._ran[plan])
        self._probe = _Stretch(plan)
        self.probes += 1

    def _keeps_up(self, probe: _Stretch) -> bool:
        fewest, most = PROBE_STEPS
        if self.plan == OFF and len(self._rows) > 1:
            fewest *= 2  # in which few requests draft
        slower = probe.tokens < self._rates[self.plan] * probe.seconds
        return probe.run < most and (probe.steps < fewest or not slower)

    def _set_probe(self, plan: DraftPlan, wait: float = 0.0) -> None:
        """Let the next probe beside this plan, or others that draft if it does, wait for so many seconds or more."""
        drafting = plan != OFF
        self._probe_at[drafting] = self._clocks[drafting] + max(wait, PROBE_GAP * self._seconds(plan))

    def _decide(self) -> None:
        """Choose the plan."""
        self._rates = rates = self._promised()
        best = max(rates, key=lambda plan: rates[plan])
        safe = max((plan for plan in (OFF, self.plan) if plan in rates), key=lambda plan: rates[plan])
        plan = best if rates[best] > MARGIN * rates[safe] else safe
        if not self._probe_at[plan != OFF] or OFF != self.plan != plan != OFF:
            self._set_probe(plan)
        self.switches += plan != self.plan
        self.plan = plan
        self._wait = PATIENCE if self.costs.target.known(self._width(plan)) else ENOUGH

    def _promised(self) -> dict[DraftPlan, float]:
        """Estimate the tokens per second of each plan whose cost is known, for the present requests."""
        shapes = {self._shape(plan): self.acceptance.rates(self._shape(plan)) for plan in self.plans}
        expected = {shape: [row.expected(shape, rates) for row in self._rows] for shape, rates in shapes.items()}
        promised = {}
        for plan in self.plans:
            if plan != OFF and self._width(plan) > self.costs.target.reach:
                continue
            tokens = sum(
                ladder[min(plan.length, row.cap)]
                for row, ladder in zip(self._rows, expected[self._shape(plan)], strict=True)
            )
            seconds = self._seconds(plan) + self._catch_up_share(plan)
            promised[plan] = tokens / seconds if seconds else 0.0
        return promised

    def _shape(self, plan: DraftPlan) -> DraftPlan:
        """Return the plan whose acceptance rates hold for this one too: the longest chain's for all chains."""
        chains = [other for other in self.plans if other.kind == "chain"]
        return max(chains, key=lambda chain: chain.length) if plan.kind == "chain" else plan

    def _width(self, plan: DraftPlan) -> int:
        """Return the tokens of a pass of the target."""
        return sum(1 + plan.capped(row.cap).nodes for row in self._rows)

    def _seconds(self, plan: DraftPlan) -> float:
        """Estimate the seconds of a step, catching up aside."""
        width = self._width(plan)
        steps = max(plan.capped(row.cap).length for row in self._rows)
        drafting = self.costs.draft_seconds(plan.kind, steps, width - len(self._rows))
        return self.costs.target(width) + drafting

    def _catch_up_share(self, plan: DraftPlan) -> float:
        """Estimate the seconds of a step's share of what the head must read before it can draft.

        A request that ends soon has fewer steps to share it.
        """
        late = [row for row in self._rows if row.cap > 0 and row.backlog]
        if plan == OFF or not late:
            return 0.0
        backlog = sum(row.backlog for row in late)
        shares = sum(row.backlog / min(CATCH_UP_STEPS, row.remaining) for row in late)
        return self.costs.catch_up(backlog) * shares / backlog


class Fixed(Controller):
    """Always the same plan, with the same interface and the same statistics."""

    def __init__(self, plan: DraftPlan) -> None:
        super().__init__([plan])
        self.plan = plan

    def _next(self, changed: bool) -> DraftPlan:
        return self.plan


def make_controller(speculation: str, length: int, tree_size: int) -> Controller:
    """Return the controller that chooses among the plans of this kind of speculation."""
    sizes = [size for size in sorted({8, 16, 32, tree_size}) if 0 < length < size <= tree_size]
    trees = list(dict.fromkeys(DraftPlan.tree(length, size) for size in sizes))
    if speculation == "auto":
        return Controller([*(DraftPlan.chain(k) for k in range(1, length + 1)), *trees])
    if speculation == "tree" and length and not trees:
        raise UserError(
            f"tree_size = {tree_size}: a tree has more nodes than its depth, {length}; choose a larger one."
        )
    return Fixed({"off": OFF, "chain": DraftPlan.chain(length), "tree": trees[-1] if trees else OFF}[speculation])
