"""Machines and requests that a controller decodes in simulation, and what its choices are worth."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from operator import mul

from serving.engine.estimates import OFF, DraftPlan, RequestAcceptance, widened
from serving.engine.planner import Controller

CHAINS = [DraftPlan.chain(length) for length in range(1, 7)]
TREES = [DraftPlan(4, 8), DraftPlan(5, 16)]
REQUEST = 128  # tokens of each request


@dataclass
class Machine:
    """cost(N) = base + token * (tokens beyond the free ones), a draft step `draft`: milliseconds."""

    base: float
    token: float
    draft: float
    free: int = 0
    reading: float = 0.0  # a token of what the head catches up on, beside a draft step
    noise: float = 0.04  # standard deviation of log seconds
    outliers: float = 0.03  # share of passes that take five times as long
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def target(self, tokens: int) -> float:
        return (self.base + self.token * max(0, tokens - self.free)) / 1e3

    def drafting(self, plan: DraftPlan) -> float:
        return plan.length * self.draft / 1e3

    def catching_up(self, tokens: int) -> float:
        return (self.draft + self.reading * tokens) / 1e3

    def measured(self, seconds: float) -> float:
        return seconds * self.rng.lognormvariate(0, self.noise) * (5 if self.rng.random() < self.outliers else 1)

    def worth(self, plan: DraftPlan, rows: int, rate: float) -> float:
        """Tokens per second of a batch of equal rows."""
        return rows * expected(plan, rate) / (self.target(rows * (1 + plan.nodes)) + self.drafting(plan))


MACHINES: dict[str, dict[str, float]] = {
    "memory-bound": dict(base=20, token=0.05, draft=1.0),
    "two cores": dict(base=14, token=0.7, draft=1.3),
    "roofline": dict(base=10, token=0.4, draft=0.6, free=32),
    "compute-bound": dict(base=1, token=3.0, draft=0.6),
    "slow head": dict(base=20, token=0.1, draft=14.0),
}


@cache
def true_rates(plan: DraftPlan, rate: float) -> list[float]:
    chain = [rate] * plan.length
    return widened(chain, plan.nodes) if plan.kind == "tree" else chain


@cache
def expected(plan: DraftPlan, rate: float) -> float:
    return sum(accumulate(true_rates(plan, rate), mul, initial=1.0))


@dataclass
class Step:
    plan: DraftPlan
    tokens: float  # expected
    seconds: float  # without noise


@dataclass
class Simulation:
    """Runs a controller as the engine does. `batch` and `rate` may change between calls of `steps`."""

    controller: Controller
    machine: Machine
    batch: int = 1
    rate: float | Callable[[int], float] = 0.5  # of acceptance, or how it depends on the request's number
    seed: int = 0
    prompt: int = 0  # tokens of each request's prompt, which the head has not read
    request: int = REQUEST
    beside_prompts: bool = False  # parts of other prompts are read in each step, too

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.rows: list[tuple[RequestAcceptance, int]] = []  # tracker, number of the request
        self.requests = 0

    @property
    def plain(self) -> float:
        """Tokens per second without drafts."""
        return self.machine.worth(OFF, self.batch, 0.0)

    def steps(self, count: int) -> list[Step]:
        return [self.step() for _ in range(count)]

    def until_probe(self, limit: int) -> bool:
        """Step up to the next probe; False: there is none within so many steps."""
        probes = self.controller.probes
        return any(self.step() and self.controller.probes > probes for _ in range(limit))

    def step(self) -> Step:
        self.rows = [(row, number) for row, number in self.rows if row.emitted < self.request][: self.batch]
        while len(self.rows) < self.batch:
            self.requests += 1
            self.rows.append((self.controller.track(0, self.prompt), self.requests))
        for row, _ in self.rows:
            row.remaining = self.request - row.emitted
            row.cap = min(8, row.remaining - 1)
        plan = self.controller.choose([row for row, _ in self.rows])
        done, plans = Step(plan, 0.0, 0.0), [plan.capped(row.cap) for row, _ in self.rows]
        drafting = [row for (row, _), own in zip(self.rows, plans, strict=True) if own != OFF]
        if drafting:
            self._draft([own for own in plans if own != OFF], drafting, done)
        width = sum(1 + own.nodes for own in plans)
        done.seconds += self.machine.target(width)
        seconds = self.machine.measured(self.machine.target(width))
        self.controller.observe_target(width, seconds, ignore=self.beside_prompts)
        for (row, number), own in zip(self.rows, plans, strict=True):
            rate = self.rate(number) if callable(self.rate) else self.rate
            done.tokens += expected(own, rate)
            accepted = 0
            while accepted < own.length and self.rng.random() < true_rates(own, rate)[accepted]:
                accepted += 1
            row.observe(own, accepted, trimmed=row.emitted + accepted + 1 > self.request)
        return done

    def _draft(self, plans: list[DraftPlan], rows: list[RequestAcceptance], done: Step) -> None:
        if backlog := sum(row.backlog for row in rows):
            seconds = self.machine.catching_up(backlog)
            done.seconds += seconds
            self.controller.observe_catch_up(backlog, self.machine.measured(seconds))
        seconds = self.machine.drafting(max(plans, key=lambda plan: plan.length))
        done.seconds += seconds
        self.controller.observe_draft(plans, self.machine.measured(seconds))


def speed(steps: list[Step]) -> float:
    return sum(step.tokens for step in steps) / sum(step.seconds for step in steps)


def simulate(
    machine: str | dict, batch: int = 1, rate: float = 0.5, seed: int = 0, plans=(*CHAINS, *TREES)
) -> Simulation:
    """machine: its name, or what it costs."""
    costs = MACHINES[machine] if isinstance(machine, str) else machine
    return Simulation(Controller(plans), Machine(**costs, rng=random.Random(seed)), batch, rate, seed)


def best(simulation: Simulation) -> float:
    """Tokens per second of the best plan."""
    machine, batch, rate = simulation.machine, simulation.batch, simulation.rate
    return max(machine.worth(plan, batch, rate) for plan in simulation.controller.plans)
