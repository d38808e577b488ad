"""A ragged pass in one of a few fixed shapes: its sequences as rows of as many tokens each.

Padding repeats: a row's last token again up to the row's width, and the first row again up to the number of rows. What
is computed twice is written twice to the same place with the same value, so there is no place to keep for waste, and
no token without anything to see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.kv_cache import Batch, block_mask, on_device

WIDEST = 64  # tokens of a row; a part of a prompt that is longer runs as it is
_WASTE = 3.0  # a padded pass has at most that many times the tokens of the ragged one ...
_LITTLE = 64  # ... or these, which cost about what one does
_SHORTEST = 64  # keys
_MOST_KEYS = 1 << 15  # of all rows: each layer gathers them


@dataclass(frozen=True)
class Shape:
    """What is fixed about a pass."""

    rows: int  # sequences
    tokens: int  # of each
    block: int  # places from a segment's base on
    reach: int  # keys, of which a token sees some

    @classmethod
    def around(cls, batch: Batch, capacity: int) -> Shape | None:
        """The least shape that holds the batch; None: padding would waste too much.

        capacity: the places of a slot.
        """
        segments = batch.segments
        widest = max(len(segment.ids) for segment in segments)
        longest = max(segment.past + len(segment.ids) for segment in segments)
        block = max(segment.past + len(segment.ids) - segment.base for segment in segments)
        shape = cls(
            _doubled(len(segments)), _doubled(widest), _doubled(block), min(capacity, max(_SHORTEST, _doubled(longest)))
        )
        padded, own = shape.rows * shape.tokens, batch.ids.shape[1]
        wasteful = padded > max(_LITTLE, _WASTE * own) or shape.rows * shape.reach > _MOST_KEYS
        return None if widest > WIDEST or wasteful else shape


class Padded:
    """The tensors of one shape that a pass reads: always the same ones, filled anew for each pass."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        rows, count, block = shape.rows, shape.rows * shape.tokens, shape.block
        self.shape = shape
        sizes = {"source": count, "place": count, "slot": rows, "base": rows, "depth": rows * block}
        self._numbers = torch.zeros(sum(sizes.values()), dtype=torch.int64, device=device)
        parts = dict(zip(sizes, self._numbers.split(list(sizes.values())), strict=True))
        self.source = parts["source"]  # [rows * tokens] the ragged pass's token that stands there
        self.places = parts["place"]  # [rows * tokens] of the slot, where keys and values go
        self.slots, self.bases = parts["slot"], parts["base"]  # [rows]
        self.depths = parts["depth"].view(rows, block)  # of each place from the base on: its position - base
        self.block = torch.zeros(count, block, dtype=torch.bool, device=device)  # which of those places a token sees
        self.ids, self.positions = (torch.zeros(count, dtype=torch.int64, device=device) for _ in range(2))
        self._visible: dict[int, Tensor] = {}

    def fill(self, batch: Batch) -> Tensor:
        """Take a batch; returns where its tokens, in their order, stand among the padded ones [N]."""
        shape, segments = self.shape, batch.segments
        rows = [*range(len(segments)), *[0] * (shape.rows - len(segments))]
        numbers: list[list[int]] = [[], [], [], [], []]
        for row in rows:
            segment, own = segments[row], batch.rows(row)
            inside = [min(index, len(own) - 1) for index in range(shape.tokens)]
            depths = segment.all_depths
            for part, values in zip(
                numbers,
                (
                    [own[index] for index in inside],
                    [segment.past + index for index in inside],
                    [segment.slot],
                    [segment.base],
                    depths + [0] * (shape.block - len(depths)),
                ),
                strict=True,
            ):
                part.extend(values)
        device = self.ids.device
        self._numbers.copy_(on_device(torch.tensor([value for part in numbers for value in part]), device))
        seen = block_mask(segments, batch.ids.shape[1])
        block = seen.new_zeros(len(self.block), shape.block)
        block[:, : seen.shape[1]] = seen[torch.tensor(numbers[0])]
        self.block.copy_(on_device(block, device))
        for own_tokens, given in ((self.ids, batch.ids), (self.positions, batch.positions)):
            torch.index_select(given[0], 0, self.source, out=own_tokens)
        there = [
            row * shape.tokens + index for row, segment in enumerate(segments) for index in range(len(segment.ids))
        ]
        return on_device(torch.tensor(there), device)

    def begin(self) -> None:
        """A pass begins: what follows from the tensors is computed again."""
        self._visible.clear()

    def visible(self, window: int) -> Tensor:
        """[rows, 1, tokens, reach] bool: which keys each token sees; window: up to its own position, 0: all."""
        if window not in self._visible:
            self._visible[window] = self._sight(window)
        return self._visible[window]

    def _sight(self, window: int) -> Tensor:
        shape = self.shape
        from_base = torch.arange(shape.reach, device=self.ids.device) - self.bases[:, None]  # [rows, reach]
        inside = from_base.clamp(0, shape.block - 1)
        block = self.block.view(shape.rows, shape.tokens, shape.block)
        visible = block.gather(2, inside[:, None].expand(-1, shape.tokens, -1))
        visible = torch.where((from_base < 0)[:, None], True, visible & (from_base < shape.block)[:, None])
        if window:
            # before the base a place is a position; a tree's places lie side by side at one
            position = torch.where(from_base < 0, from_base, self.depths.gather(1, inside)) + self.bases[:, None]
            visible &= position[:, None] > self.positions.view(shape.rows, shape.tokens, 1) - window
        return visible[:, None]


def _doubled(count: int) -> int:
    """The least power of two that is not below."""
    return 1 << (count - 1).bit_length()
