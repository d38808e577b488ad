"""An annealing that the loss drives: an experiment beside the schedules of `draft.afa`, which count steps alone.

The activation stays while the training loss falls, and leaves when the loss has come to rest: beta follows the linear
schedule at the *annealed* step, which moves by `SLOW` a step while the loss falls and by 1 on a plateau. Whatever the
loss does, beta is exactly 0 after `LATEST` of the steps; the earliest end is the schedule's own `decay_ratio`.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

from rich.console import Console

from draft.afa import set_annealing_step
from draft.training.config import RunSettings
from draft.training.trainer import Trainer

SLOW = 0.25  # annealed steps for one optimiser step while the loss falls
LATEST = 0.6  # the share of the steps after which beta is 0, whatever the loss does
FALLING = 0.02  # the loss falls where its recent mean is this share below its older one
RECENT, OLDER = 0.7, 0.9  # decay of the two means


class Plateau:
    """The annealed step, from the losses of the optimiser steps."""

    def __init__(self, total_steps: int, decay_ratio: float) -> None:
        self.annealed = 0.0
        self._end, self._latest = decay_ratio * total_steps, max(decay_ratio, LATEST) * total_steps
        self._sums, self._weights = [0.0, 0.0], [0.0, 0.0]  # of the two means, recent and older

    def after(self, step: int, loss: float) -> float:
        """Return the annealed step after an optimiser step (counted from 1) with this loss."""
        for place, decay in enumerate((RECENT, OLDER)):
            self._sums[place] = decay * self._sums[place] + (1 - decay) * loss
            self._weights[place] = decay * self._weights[place] + (1 - decay)
        recent, older = (total / weight for total, weight in zip(self._sums, self._weights, strict=True))
        falls = recent < (1 - FALLING) * older
        self.annealed += SLOW if falls else 1.0
        self.annealed = max(self.annealed, self._end - (self._latest - step))  # by 1 a step, it ends in time
        return self.annealed


class AdaptiveTrainer(Trainer):
    """A run of `adapt`, in one process, whose beta follows `Plateau`.

    No checkpoint has the means, so an interrupted run begins again.
    """

    def __init__(self, settings: RunSettings, console: Console) -> None:
        super().__init__(settings, console, resume=False)

    @cached_property
    def plateau(self) -> Plateau:
        return Plateau(self.total_steps, self.settings.adapter.decay_ratio)

    def step(self) -> tuple[dict[str, Any], int]:
        metrics, tokens = super().step()
        self.plateau.after(self.done, metrics["loss"])
        return {**metrics, "beta": self._anneal()}, tokens

    def _anneal(self) -> float | None:
        fine = 4  # the annealed step is no whole number
        self.beta = set_annealing_step(self.saver, math.ceil(fine * self.plateau.annealed), fine * self.total_steps)
        return self.beta
