"""Estimates of the acceptance of drafted tokens: overall, of one request, and of shapes that were not tried."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

import pytest

from serving.engine.acceptance import INITIAL_RATE, Acceptance, Plan, RequestAcceptance


def test_longer_chains_are_looked_at_again_when_deeper_positions_have_improved():
    acceptance = Acceptance(memory=256, strength=3)
    for _ in range(100):
        acceptance.observe(Plan.chain(6), 2)
    assert acceptance.rates(Plan.chain(6))[2] < 0.1
    for _ in range(2000):
        acceptance.observe(Plan.chain(2), 2)
    assert acceptance.rates(Plan.chain(6))[2] > 0.9


def test_a_new_request_begins_with_the_overall_rates_and_leaves_them_as_it_shows_its_own():
    overall = Acceptance(memory=256, strength=3)
    plan, other = Plan.chain(3), RequestAcceptance(overall, cap=8)
    for _ in range(200):
        other.observe(plan, 3)
    row = RequestAcceptance(overall, cap=8)
    rates = overall.rates(plan)
    assert row.expected(plan, rates) == pytest.approx(list(accumulate(accumulate(rates, mul), initial=1.0)))
    for _ in range(60):
        row.observe(plan, 0)
    assert row.expected(plan, rates)[-1] < 2 < 3 < other.expected(plan, rates)[-1]


def test_rates_are_conditional_on_what_came_before():
    acceptance = Acceptance(memory=10**6, strength=1)
    for step in range(4000):
        acceptance.observe(Plan.chain(3), (0, 1, 3, 3)[step % 4])
    assert acceptance.rates(Plan.chain(3)) == pytest.approx([3 / 4, 2 / 3, 1.0], abs=0.01)


def test_a_verification_cut_short_by_the_end_of_the_request_teaches_nothing():
    overall = Acceptance(memory=256, strength=3)
    row = RequestAcceptance(overall, cap=8)
    row.observe(Plan.chain(4), 1, trimmed=True)
    assert overall.rates(Plan.chain(4)) == pytest.approx([INITIAL_RATE] * 4) and row.emitted == 2


def test_weights_stay_finite_over_a_long_life():
    acceptance = Acceptance(memory=4, strength=1)
    for _ in range(10_000):
        acceptance.observe(Plan.chain(2), 1)
    assert acceptance.rates(Plan.chain(2)) == pytest.approx([0.95, 0.2], abs=0.06)


def test_trees_are_guessed_from_chains_and_then_measured():
    acceptance = Acceptance(memory=256, strength=3)
    for step in range(1000):
        acceptance.observe(Plan.chain(4), 4 * (step % 2))
    chain, guess = acceptance.rates(Plan.chain(4)), acceptance.rates(Plan(4, 16))
    assert all(low < high < 1 for low, high in zip(chain, guess, strict=True))
    for _ in range(200):
        acceptance.observe(Plan(4, 16), 0)
    assert acceptance.rates(Plan(4, 16))[0] < 0.05 < chain[0]
