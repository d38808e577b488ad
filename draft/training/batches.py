"""Which rows an optimiser step reads, and which of them a process reads: functions of the seed and the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from torch import Tensor

from draft.data.dataset import Row, open_dataset
from draft.data.examples import Batch, batches, collate, packed_batches
from draft.errors import UserError
from draft.heads.base import Features
from draft.target import Target, TargetOutput
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


# The rows of a run: what it trains on, and the few that are replayed on the way.


@dataclass(frozen=True)
class Rows:
    train: list[Row]
    held_out: list[Row]  # greedy ones, a few, for the replay during training


def load_rows(settings: RunSettings, target: Target, console: Console) -> Rows:
    """The rows of all data folders, in their order; what one of them holds out is not trained on from another.

    Raises:
        UserError: when they belong to another target, or when none can be trained on.
    """
    train: list[Row] = []
    held_out: list[Row] = []
    for folder in settings.data.data:
        dataset = open_dataset(Path(folder))
        dataset.check_target(target)
        train += dataset.rows("train")
        held_out += dataset.rows("held-out")
    train = _without(train, held_out, settings.data.data, console)
    train = [row for row in train if sum(row.mask[2:])]
    if not train:
        raise UserError(f"{', '.join(settings.data.data)}: no training rows; prepare a larger data set.")
    return Rows(train, [row for row in held_out if row.greedy][: settings.training.eval_rows])


def _without(train: list[Row], held_out: list[Row], folders: list[str], console: Console) -> list[Row]:
    """The rows whose prompts no data set holds out: each has a split of its own, and two may share prompts."""
    ids = {row.id for row in held_out}
    kept = [row for row in train if row.id not in ids]
    if train and not kept:
        raise UserError(
            f"{', '.join(folders)}: no training rows, for the prompts of all of them are held out in another data set; "
            "prepare data of other prompts."
        )
    if left_out := len(train) - len(kept):
        console.print(f"{left_out} training rows are left out: their prompts are held out in another data set.")
    return kept


# The target's hidden states for a batch: computed in this process, or kept from a first pass in memory or on disk.


Home = Callable[[int], tuple[Batch, list[int]]]


class Kept(Protocol):
    """Where hidden states stay between epochs: row number -> [tokens, kept layers * hidden] on the CPU."""

    def __contains__(self, row: object, /) -> bool: ...

    def __getitem__(self, row: int, /) -> Tensor: ...


class FeatureSource:
    """Runs the target once per batch, or once per row when `remember` is set or `kept` is given."""

    def __init__(
        self, target: Target, *, remember: bool = False, kept: Kept | None = None, home: Home | None = None
    ) -> None:
        """home: the batch that a row's states are computed in when they are remembered; None: whichever comes first."""
        self.target = target
        self.layers: Sequence[int] = target.default_auxiliary_layers  # a head may read others
        self.kept = kept
        self.remember = remember
        self._memory: dict[int, Tensor] = {}
        self._home = home

    def get(self, batch: Batch, rows: list[int]) -> Features:
        """Features of `batch`, whose conversations are the training rows `rows`."""
        with torch.no_grad():
            if self.kept is not None:
                states = self._lay_out(self.kept, batch, rows)
            elif self.remember:
                self._remember(batch, rows)
                states = self._lay_out(self._memory, batch, rows)
            else:
                states = self.run(batch)
            kept = kept_layers(self.target, self.layers)
            output = TargetOutput(states[..., -self.target.hidden_size :], states, kept)
            return Features(self.target.embedding(batch.input_ids), output.states_of(self.layers), output.last_hidden)

    def run(self, batch: Batch) -> Tensor:
        """The states of `kept_layers` from a pass of the target: [batch, tokens, kept layers * hidden].

        Padding on the right needs no mask: no real token sees what follows it. Where conversations are packed,
        transformers finds them by where the positions start again, and builds the block-diagonal mask in whatever form
        the layer's attention takes, sliding windows included.
        """
        inner = kept_layers(self.target, self.layers)[:-1]
        with torch.no_grad():
            output = self.target.forward(batch.input_ids, layers=inner, position_ids=batch.position_ids)
            if output.auxiliary is None:
                return output.last_hidden
            return torch.cat([output.auxiliary, output.last_hidden], dim=-1)

    def states(self, batch: Batch, rows: list[int]) -> dict[int, Tensor]:
        """A pass of the target, taken apart: row number -> [tokens, kept layers * hidden] on the CPU."""
        passed = self.run(batch)
        places = zip(rows, places_in(batch), strict=True)
        return {row: passed[line, start : start + length].to("cpu", copy=True) for row, (line, start, length) in places}

    def _remember(self, batch: Batch, rows: list[int]) -> None:
        for row in rows:
            if row not in self._memory:
                self._memory.update(self.states(*(self._home(row) if self._home else (batch, rows))))

    def _lay_out(self, kept: Kept, batch: Batch, rows: list[int]) -> Tensor:
        """Kept rows as `run` gives them, zeros on the padding."""
        width = len(kept_layers(self.target, self.layers)) * self.target.hidden_size
        states = torch.zeros(*batch.input_ids.shape, width, dtype=self.target.dtype)
        for row, (line, start, length) in zip(rows, places_in(batch), strict=True):
            states[line, start : start + length] = kept[row]
        return states.to(self.target.device)


def kept_layers(target: Target, layers: Sequence[int]) -> tuple[int, ...]:
    """The layers whose states are computed and kept for a head that reads `layers`, each once; last the output."""
    return (*(layer for layer in layers if layer != target.output_layer), target.output_layer)


def places_in(batch: Batch) -> Sequence[tuple[int, int, int]]:
    """Where each conversation lies: (row of the batch, first token, number of tokens)."""
    return batch.places or [(line, 0, int(length)) for line, length in enumerate(batch.attention_mask.sum(1))]


def fits_in_memory(target: Target, layers: Sequence[int], tokens: int) -> bool:
    """Whether the states kept of `tokens` tokens take less than a third of this machine's memory.

    Of all of it, not of what is free at the moment: a run has to go the same way each time it is started.
    """
    import psutil

    size = tokens * len(kept_layers(target, layers)) * target.hidden_size * target.dtype.itemsize
    return size < psutil.virtual_memory().total / 3
