"""The learning rate: of each step, and of each parameter."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from draft.training.config import RunSettings


def parameter_groups(parameters: list[nn.Parameter], *, scaled: bool) -> list[dict[str, Any]]:
    """One group a parameter, with `scale`, its share of the learning rate.

    Adam moves every weight by about the rate, whatever its size. `fc` reads raw residual streams of large scale and has
    small weights: a rate that suits the other matrices would overwrite it in a few steps. So the share falls with the
    root mean square of the starting weights, below that of a common initialisation (0.02).
    """
    sizes = [float(parameter.detach().float().pow(2).mean().sqrt()) for parameter in parameters]
    return [
        # what starts at zero says nothing about its size
        {"params": [parameter], "scale": min(1.0, size / 0.02) if scaled and size else 1.0}
        for parameter, size in zip(parameters, sizes, strict=True)
    ]


def learning_rate_at(step: int, total_steps: int, settings: RunSettings) -> float:
    """The rate of the step after `step` steps: a linear rise, then a cosine to a tenth of the peak."""
    warmup = max(1, round(settings.training.warmup_ratio * total_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
