"""Which rows an optimiser step reads, and which of them a process reads: functions of the seed and the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

from draft.data.dataset import Row
from draft.data.examples import Batch, batches, collate, packed_batches
from draft.training.config import RunSettings


class Schedule:
    """The order of a run's rows.

    A step reads `gradient_accumulation` batches a process: two processes that accumulate one batch each read, and
    learn, what one process does that accumulates two.
    """

    def __init__(self, rows: list[Row], settings: RunSettings, *, processes: int = 1, packing: bool = False) -> None:
        training = settings.training
        self.rows = rows
        self.tokens_per_batch, self.seed = settings.data.tokens_per_batch, training.seed
        self.capacity = max(len(row.ids) for row in rows) if packing else None
        self.processes = processes
        self.batches_per_step = training.gradient_accumulation * processes
        self.steps_per_epoch = max(1, math.ceil(len(self.batches(0)) / self.batches_per_step))
        self.total_steps = training.max_steps or max(1, round(training.epochs * self.steps_per_epoch))
        self._positions = [sum(row.mask[2:]) for row in rows]

    def batches(self, epoch: int) -> list[list[int]]:
        """Row numbers of each batch of an epoch; packed ones stand in the order in which they are packed."""
        if self.capacity is None:
            return batches(self.rows, self.tokens_per_batch, self.seed, epoch)
        return packed_batches(self.rows, self.tokens_per_batch, self.capacity, self.seed, epoch)

    def windows(self, step: int) -> Iterator[list[list[int]]]:
        """The batches of each optimiser step, of all processes, from `step` to the last."""
        size = self.batches_per_step
        while step < self.total_steps:
            epoch, first = divmod(step, self.steps_per_epoch)
            order = self.batches(epoch)
            for start in range(first * size, self.steps_per_epoch * size, size):
                if step == self.total_steps:
                    return
                yield order[start : start + size] or order[:size]
                step += 1

    def share(self, window: list[list[int]], process: int) -> list[tuple[list[int], bool]]:
        """The batches of `window` that one process reads, and whether they count.

        All processes read equally many, or those with more would wait for the others forever: where the window can't be
        divided, a batch is read once more, with weight 0.
        """
        count = math.ceil(len(window) / self.processes)
        mine = [(rows, True) for rows in window[process :: self.processes]]
        return mine + [(window[0], False)] * (count - len(mine))

    def positions(self, window: list[list[int]]) -> int:
        """How many positions the first draft step of a window is trained on: by so many the loss is divided."""
        return sum(self._positions[row] for rows in window for row in rows)

    def tokens(self, window: list[list[int]]) -> int:
        """Tokens of a window, padding left out."""
        return sum(len(self.rows[row].ids) for rows in window for row in rows)

    def collate(self, rows: list[int]) -> Batch:
        return collate([self.rows[row] for row in rows], self.capacity)

    def home(self, row: int) -> list[int]:
        """The batch of the first epoch that has `row`.

        Hidden states that are kept are those of this batch: the last bits of a product depend on its shape, and a run
        that goes on after an interruption has to read the same bits as one that was never interrupted.
        """
        return self._homes[row]

    @cached_property
    def _homes(self) -> dict[int, list[int]]:
        return {row: rows for rows in self.batches(0) for row in rows}
