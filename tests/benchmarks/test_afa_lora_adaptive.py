"""benchmarks.afa_lora.adaptive: beta waits while the loss falls, and is 0 in time whatever the loss does."""

import math

import pytest

from benchmarks.afa_lora.adaptive import LATEST, Plateau
from draft.afa import beta_at

TOTAL = 100
LOSSES = {
    "flat": lambda step: 2.0,
    "falling": lambda step: math.exp(-step / 20),
    "falling, then flat": lambda step: max(2.5, 3.0 - step / 20),
    "rising": lambda step: step,
}


def betas(loss, decay_ratio=0.3):
    plateau = Plateau(TOTAL, decay_ratio)
    return [beta_at(math.ceil(4 * plateau.after(step, loss(step))), 4 * TOTAL, decay_ratio) for step in range(1, 101)]


@pytest.mark.parametrize("decay_ratio", [0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_beta_falls_to_exactly_zero_in_time(name, decay_ratio):
    found = betas(LOSSES[name], decay_ratio)
    assert all(later <= earlier for earlier, later in zip(found, found[1:], strict=False))
    zero = found.index(0.0) + 1
    assert decay_ratio * TOTAL <= zero <= max(decay_ratio, LATEST) * TOTAL
    assert found[zero:] == [0.0] * (TOTAL - zero)


def test_the_activation_stays_while_the_loss_falls():
    assert betas(LOSSES["flat"]) == [beta_at(step, TOTAL) for step in range(1, TOTAL + 1)]
    falling, mixed = betas(LOSSES["falling"]), betas(LOSSES["falling, then flat"])
    assert falling.index(0.0) + 1 == LATEST * TOTAL and falling[20] > 0.7 > betas(LOSSES["flat"])[20]
    assert betas(LOSSES["flat"]).index(0.0) < mixed.index(0.0) < falling.index(0.0)
