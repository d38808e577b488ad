"""The cost model: robust against single slow steps, rising, and sane at widths that were never run."""

import random

import pytest

from serving.engine.costs import WINDOW, Curve, StepCosts


def curve_of(points: dict[float, float], repeats: int = 5) -> Curve:
    curve = Curve()
    for width, seconds in points.items():
        for _ in range(repeats):
            curve.observe(width, seconds)
    return curve


def test_nothing_measured_costs_nothing_and_reaches_nowhere():
    curve = Curve()
    assert curve(7) == 0.0 and curve.reach == 0.0 and not curve.known(7)


def test_interpolates_between_measured_widths_and_goes_on_with_the_last_slope():
    curve = curve_of({1: 10.0, 4: 10.6, 8: 12.6, 16: 16.6})
    assert curve(4) == 10.6
    assert curve(6) == pytest.approx(11.6)
    assert curve(64) == pytest.approx(16.6 + 48 * 0.5)


def test_below_the_narrowest_width_a_pass_costs_at_least_its_share():
    assert curve_of({8: 8.0, 16: 15.0})(4) == pytest.approx(4.5)
    assert curve_of({8: 8.0, 16: 24.0})(4) == pytest.approx(4.0)  # the queue would say 0


def test_slow_steps_of_a_busy_machine_do_not_count():
    rng = random.Random(0)
    curve = Curve()
    for step in range(200):
        curve.observe(5, 20.0 * rng.lognormvariate(0, 0.03) * (30 if step % 6 == 0 else 1))
        assert step < 2 or curve(5) < 21.5
    assert curve(5) == pytest.approx(20.0, rel=0.03)


def test_a_machine_that_stays_slower_is_believed_within_a_window():
    curve = curve_of({5: 20.0}, repeats=100)
    for _ in range(WINDOW * 3 // 4):
        curve.observe(5, 40.0)
    assert curve(5) == 40.0


def test_noise_never_makes_a_wider_pass_cheaper():
    rng = random.Random(1)
    curve = Curve()
    for _ in range(10):
        for width in range(1, 200, 3):
            curve.observe(width, 20 + 0.01 * width + rng.gauss(0, 2))
    costs = [curve(width) for width in range(1, 400)]
    assert costs == sorted(costs)
    assert costs[100] == pytest.approx(21, rel=0.03)


def test_a_calibration_is_known_at_once_and_gives_way_to_measurements():
    curve = Curve()
    curve.seed(8, 5.0)
    assert curve.known(8) and not curve.known(9) and curve(8) == 5.0
    for _ in range(WINDOW):
        curve.observe(8, 7.0)
    assert curve(8) == 7.0


def test_reach_grows_step_by_step():
    curve = curve_of({1: 1.0})
    assert curve.reach == 2
    curve.observe(2, 1.0)
    assert curve.reach == 8


@pytest.mark.parametrize("width", [2, 15, 16, 33, 100, 500])
def test_a_width_shares_its_figure_only_with_its_neighbours(width: int):
    curve = curve_of({width: 1.0})
    assert curve.known(width)
    assert not curve.known(max(width + 1, round(width * 1.15)))
    assert not curve.known(min(width - 1, round(width * 0.85)))


def test_a_tree_is_drafted_at_the_cost_of_a_chain_until_one_was_measured():
    costs = StepCosts()
    for _ in range(3):
        costs.draft["chain"].observe(4, 0.5)
    assert costs.draft_seconds("chain", 6, 24) == pytest.approx(3.0)
    assert costs.draft_seconds("tree", 6, 24) == pytest.approx(3.0)
    assert costs.draft_seconds("off", 0, 0) == 0.0
    for _ in range(3):
        costs.draft["tree"].observe(4, 0.8)
    assert costs.draft_seconds("tree", 6, 24) == pytest.approx(4.8)
