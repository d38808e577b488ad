"""The gate between steps of training, beside a simulated server."""

import pytest

from draft.learning.gate import _LONGEST_WAIT, Gate
from draft.learning.server import Load, ServerAway


class World:
    """A clock, and a server that decodes more slowly while training works."""

    def __init__(self, slowdown: float = 0.5, rate: float = 100.0) -> None:
        self.time, self.working = 0.0, False
        self.slowdown, self.rate = slowdown, rate  # of work; steps a second while training rests
        self.gaps = self.seconds = self.waiting = 0.0
        self.away = False
        self.tokens = 0.0

    def pass_time(self, seconds: float, working: bool) -> None:
        rate = self.rate * (1 - self.slowdown * working)
        self.time += seconds
        self.gaps += seconds * rate
        self.seconds += seconds if rate else 0.0

    def load(self) -> Load:
        if self.away:
            raise ServerAway("away")
        return Load(self.gaps, self.seconds, self.waiting)

    def gate(self, budget: float = 0.1) -> Gate:
        return Gate(self.load, budget, clock=lambda: self.time, sleep=lambda seconds: self.pass_time(seconds, False))

    def train(self, gate: Gate, seconds: float, step: float = 0.7) -> None:
        end = self.time + seconds
        while self.time < end:
            gate()
            self.pass_time(step, True)


@pytest.mark.parametrize("slowdown", [0.0, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("budget", [0.05, 0.1])
def test_the_server_loses_no_more_than_the_budget(slowdown, budget):
    world = World(slowdown)
    gate = world.gate(budget)
    world.train(gate, 900)
    lost = 1 - world.gaps / (world.rate * world.time)
    assert lost <= 1.1 * budget and gate.loss == pytest.approx(lost, abs=0.01)
    assert gate.slowdown == pytest.approx(slowdown, abs=0.01)
    # and no less is worked than that allows
    allowed = min(0.95, budget / slowdown if slowdown else 1)
    assert gate.worked / (gate.worked + gate.rested) > 0.85 * allowed


def test_a_server_that_does_nothing_costs_no_pause():
    world = World(rate=0.0)
    gate = world.gate()
    world.train(gate, 300)
    assert gate.slowdown == 0 and gate.rested < 0.07 * world.time


def test_training_waits_while_the_queue_is_longer_than_usual():
    world = World(slowdown=0.0)
    gate = world.gate()
    world.train(gate, 60)
    world.waiting, rested = 5.0, gate.rested
    world.train(gate, 3 * _LONGEST_WAIT)
    assert gate.rested - rested > 2 * _LONGEST_WAIT  # each time a minute, since it stays
    world.waiting, rested, began = 0.0, gate.rested, world.time
    world.train(gate, 60)
    assert gate.rested - rested < 0.1 * (world.time - began)


def test_a_queue_that_is_always_there_is_the_server_s_own():
    world = World(slowdown=0.0)
    world.waiting = 8.0
    gate = world.gate()
    world.train(gate, 3600)
    rested, began = gate.rested, world.time
    world.train(gate, 600)
    assert gate.rested - rested < 0.1 * (world.time - began)


def test_a_server_that_is_away_or_started_again_is_no_reason_to_stop():
    world = World(slowdown=0.5)
    gate = world.gate()
    world.train(gate, 300)
    world.away = True
    world.train(gate, 60)
    world.away, world.gaps, world.seconds = False, 0.0, 0.0
    world.train(gate, 300)
    assert gate.slowdown == pytest.approx(0.5, abs=0.01)


def test_a_run_that_is_to_end_is_not_held_up():
    world = World(slowdown=0.9)
    gate = world.gate()
    world.train(gate, 60)
    gate.signals = [15]
    before = gate.rested
    world.pass_time(5.0, True)
    gate()
    assert gate.rested == before
