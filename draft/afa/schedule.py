"""How beta, the weight of the non-linear branch of AFA-LoRA, falls from 1 to 0."""

from __future__ import annotations

import math
from collections.abc import Callable

from draft.errors import UserError

EXPONENT = 5.0  # the exponential schedule falls by e^-5 before it is rescaled to reach 0

# beta as a function of t = step / (decay_ratio * total_steps) in [0, 1): 1 at t = 0, 0 at t = 1
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
    "exponential": lambda t: (math.exp(-EXPONENT * t) - math.exp(-EXPONENT)) / -math.expm1(-EXPONENT),
}


def zero_step(total_steps: int, decay_ratio: float) -> int:
    """The first optimiser step after which beta is exactly 0."""
    # 0.07 * 100 is 7.000000000000001 in binary: the slack keeps such a product from costing one step more
    return max(1, math.ceil(decay_ratio * total_steps - 1e-9))


def beta_at(step: int, total_steps: int, decay_ratio: float = 0.3, schedule: str = "linear") -> float:
    """beta after `step` of `total_steps` optimiser steps: 1 at first, exactly 0 after decay_ratio of them.

    Linear after AFA-LoRA (arXiv 2512.22455): max(0, 1 - step / (decay_ratio * total_steps)). Raises UserError
    for an unknown schedule, a decay_ratio outside (0, 1], a total below 1 or a negative step.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if not 0 < decay_ratio <= 1:
        raise UserError(f"decay_ratio is {decay_ratio}: choose a number above 0 and up to 1")
    if total_steps < 1 or step < 0:
        raise UserError(f"step {step} of {total_steps} is no optimiser step: count from 0 to a total of at least 1")
    if step >= zero_step(total_steps, decay_ratio):
        return 0.0
    return SCHEDULES[schedule](step / (decay_ratio * total_steps))
