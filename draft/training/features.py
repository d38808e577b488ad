"""The target's hidden states for a batch: computed in this process, or kept from a first pass in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from draft.data.examples import Batch
from draft.target import Target, TargetOutput

Home = Callable[[int], tuple[Batch, list[int]]]


@dataclass(frozen=True)
class Features:
    """What training reads of the target, for a right-padded batch."""

    embeds: Tensor  # [batch, tokens, hidden]
    auxiliary: Tensor  # [batch, tokens, layers * hidden]
    last_hidden: Tensor  # [batch, tokens, hidden], after the final norm


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
