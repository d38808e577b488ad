"""Batches of a run: which rows an optimiser step reads, and the target's hidden states of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from torch import Tensor

from draft.data.dataset import Row, open_dataset
from draft.data.examples import Batch, batches, collate, packed_batches
from draft.errors import UserError
from draft.evaluation.compare import general_rows
from draft.heads.base import Features
from draft.memory import whole_memory
from draft.target import Target, TargetOutput
from draft.training.config import RunSettings


@dataclass(frozen=True)
class Window:
    """Batches of one optimiser step."""

    share: list[tuple[list[int], bool]]  # row numbers of this process's batches; false: read, but with weight 0
    positions: int  # trained on in the first draft step, over all processes: by so many the loss is divided
    tokens: int  # over all processes, padding left out


class Batches:
    """The batches of a run, a function of the seed and the step alone.

    A step reads `gradient_accumulation` batches a process: two processes that accumulate one batch each read, and
    learn, what one process does that accumulates two.
    """

    def __init__(
        self, rows: list[Row], settings: RunSettings, target: Target, *, rank: int = 0, processes: int = 1
    ) -> None:
        training, packing = settings.training, settings.data.packing
        self.rows, self.target, self.rank, self.processes = rows, target, rank, processes
        self.tokens_per_batch, self.seed = settings.data.tokens_per_batch, training.seed
        packing = target.device.type == "cuda" if packing is None else packing
        self.capacity = max(len(row.ids) for row in rows) if packing else None
        self.per_step = training.gradient_accumulation * processes
        self._epoch = lru_cache(maxsize=1)(self._order)
        self.steps_per_epoch = max(1, math.ceil(len(self._epoch(0)) / self.per_step))
        self.total_steps = training.max_steps or max(1, round(training.epochs * self.steps_per_epoch))
        self.features = FeatureSource(target)
        self._positions = [sum(row.mask[2:]) for row in rows]

    def window(self, step: int) -> Window:
        """The batches of the optimiser step after `step` steps.

        All processes read equally many, or those with more would wait for the others forever: where the batches can't
        be divided, one is read once more, with weight 0.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        order, size = self._epoch(epoch), self.per_step
        window = order[place * size : (place + 1) * size] or order[:size]  # packing makes an epoch shorter than another
        share = [(rows, True) for rows in window[self.rank :: self.processes]]
        share += [(window[0], False)] * (math.ceil(len(window) / self.processes) - len(share))
        rows = [row for batch in window for row in batch]
        return Window(share, sum(self._positions[row] for row in rows), sum(len(self.rows[row].ids) for row in rows))

    def read(self, rows: list[int]) -> tuple[Batch, Features]:
        """The batch of some rows on the target's device, and the target's states of it."""
        batch = self._collate(rows)
        return batch, self.features.get(batch, rows)

    def states(self, rows: list[int]) -> dict[int, Tensor]:
        """Fresh states of each row: [tokens, kept layers * hidden] on the CPU."""
        return self.features.states(self._collate(rows), rows)

    def first(self, least_tokens: int) -> Iterator[tuple[Features, Tensor]]:
        """Features and attention masks of the first rows, never packed: at least so many tokens."""
        tokens = 0
        for rows in batches(self.rows, self.tokens_per_batch, self.seed, epoch=0):
            batch = collate([self.rows[row] for row in rows]).to(self.target.device)
            yield self.features.get(batch, rows), batch.attention_mask.bool()
            tokens += sum(len(self.rows[row].ids) for row in rows)
            if tokens >= least_tokens:
                return

    def remember(self) -> None:
        """Keep the hidden states in memory, those of a row from its batch in the first epoch.

        The last bits of a product depend on its shape, and a run that goes on after an interruption has to read the
        same bits as one that was never interrupted.
        """
        first = {row: rows for rows in self._order(0) for row in rows}
        self.features.kept = Remembered(lambda row: self.states(first[row]))

    def _order(self, epoch: int) -> list[list[int]]:
        """Row numbers of each batch of an epoch; packed ones are in the order in which they are packed."""
        if self.capacity is None:
            return batches(self.rows, self.tokens_per_batch, self.seed, epoch)
        return packed_batches(self.rows, self.tokens_per_batch, self.capacity, self.seed, epoch)

    def _collate(self, rows: list[int]) -> Batch:
        return collate([self.rows[row] for row in rows], self.capacity).to(self.target.device)


class Kept(Protocol):
    """Hidden states that stay between epochs: row number -> [tokens, kept layers * hidden] on the CPU."""

    def __getitem__(self, row: int, /) -> Tensor: ...


class Remembered(dict[int, Tensor]):
    """Hidden states in memory, computed when one of their batch is first read."""

    def __init__(self, compute: Callable[[int], dict[int, Tensor]]) -> None:
        """compute: a row's number -> the states of all rows of its batch."""
        super().__init__()
        self.compute = compute

    def __missing__(self, row: int) -> Tensor:
        self.update(self.compute(row))
        return self[row]


class FeatureSource:
    """The target's hidden states: one pass a batch, or none where they are kept."""

    def __init__(self, target: Target, kept: Kept | None = None) -> None:
        self.target, self.kept = target, kept
        self.layers: Sequence[int] = target.default_auxiliary_layers  # a head may read others

    def get(self, batch: Batch, rows: list[int]) -> Features:
        """Features of `batch`, whose conversations are the training rows `rows`."""
        with torch.no_grad():
            kept, size = kept_layers(self.target, self.layers), self.target.hidden_size
            if self.kept is None:
                states = self._run(batch)
            else:  # as `_run` gives them, zeros on the padding
                states = torch.zeros(*batch.input_ids.shape, len(kept) * size, dtype=self.target.dtype)
                for row, (line, start, length) in zip(rows, _places(batch), strict=True):
                    states[line, start : start + length] = self.kept[row]
                states = states.to(self.target.device)
            output = TargetOutput(states[..., -size:], states, kept)
            return Features(self.target.embedding(batch.input_ids), output.states_of(self.layers), output.last_hidden)

    def states(self, batch: Batch, rows: list[int]) -> dict[int, Tensor]:
        """A pass of the target, taken apart: row number -> [tokens, kept layers * hidden] on the CPU."""
        passed = self._run(batch)
        places = zip(rows, _places(batch), strict=True)
        return {row: passed[line, start : start + length].to("cpu", copy=True) for row, (line, start, length) in places}

    def _run(self, batch: Batch) -> Tensor:
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


def _places(batch: Batch) -> Sequence[tuple[int, int, int]]:
    """Position of each conversation: (row of the batch, first token, number of tokens)."""
    return batch.places or [(line, 0, int(length)) for line, length in enumerate(batch.attention_mask.sum(1))]


def kept_layers(target: Target, layers: Sequence[int]) -> tuple[int, ...]:
    """The layers whose states are computed and kept for a head that reads `layers`, each once; last the output."""
    return (*(layer for layer in layers if layer != target.output_layer), target.output_layer)


def fits_in_memory(target: Target, layers: Sequence[int], tokens: int) -> bool:
    """True when the states kept of `tokens` tokens take less than a third of this machine's or container's memory.

    Of all of it, not of what is free at the moment: a run has to go the same way each time it is started.
    """
    size = tokens * len(kept_layers(target, layers)) * target.hidden_size * target.dtype.itemsize
    return size < whole_memory() / 3


def load_rows(settings: RunSettings, target: Target, console: Console) -> tuple[list[Row], list[Row]]:
    """Rows to train on, of all data folders in their order, and the few that are replayed on the way.

    A prompt that one data set holds out is not trained on from another.

    Raises:
        UserError: when they belong to another target, or when none can be trained on.
    """
    datasets = [open_dataset(Path(folder)) for folder in settings.data.data]
    for dataset in datasets:
        dataset.check_target(target)
    offered = [row for dataset in datasets for row in dataset.rows("train")]
    held_out = [row for dataset in datasets for row in dataset.rows("held-out")]
    ids = {row.id for row in held_out}
    kept = [row for row in offered if row.id not in ids]
    train = [row for row in kept if sum(row.mask[2:])]
    if share := settings.data.mix_general:
        train += _general_rows(settings, target, train, ids, share / (1 - share))
    if settings.data.every_position:
        train = [replace(row, mask=[True] * len(row.ids)) for row in train]
    if not train:
        reason = "the prompts of all are held out in another data set" if offered and not kept else "the data are small"
        raise UserError(
            f"{', '.join(settings.data.data)}: no training rows, for {reason}; prepare data of other prompts, or more."
        )
    if left_out := len(offered) - len(kept):
        console.print(f"{left_out} training rows are left out: their prompts are held out in another data set.")
    greedy = [row for row in held_out if row.greedy]
    count = min(settings.training.eval_rows, len(greedy))
    return train, [greedy[place * len(greedy) // count] for place in range(count)]  # of all data sets


def _general_rows(
    settings: RunSettings, target: Target, train: list[Row], held_out: set[str], ratio: float
) -> list[Row]:
    """General rows to mix in, each at most once: `ratio` of the tokens of the rows of the domain.

    Raises:
        UserError: when there are none for this target, or too few.
    """
    folder = settings.data.general
    if folder is None:
        offered = general_rows(target, "train")
        if offered is None:
            raise UserError(
                f"--mix-general {settings.data.mix_general}: no general conversations ship for target {target.title}; "
                "let it write some with `draft-train prepare --out DIR`, and pass --general DIR."
            )
    else:
        dataset = open_dataset(Path(folder))
        dataset.check_target(target)
        offered = dataset.rows("train")
    offered = [row for row in offered if row.id not in held_out and sum(row.mask[2:])]
    random.Random(settings.training.seed).shuffle(offered)
    wanted = ratio * sum(len(row.ids) for row in train)
    chosen: list[Row] = []
    for row in offered:
        if wanted <= 0:
            return chosen
        chosen.append(row)
        wanted -= len(row.ids)
    if wanted > 0:
        raise UserError(
            f"--mix-general {settings.data.mix_general}: the general conversations have {wanted:,.0f} tokens too few "
            "for that share of this data; give more with --general DIR, or choose a smaller share."
        )
    return chosen
