"""One ragged forward pass: the tokens of all sequences laid end to end, and where each of them may look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The tokens of one sequence in a pass.

    They are written to places past, past + 1, ... of a cache slot. Keys before `base` are visible to all of them; from
    `base` on a token sees itself and, by `parents`, its ancestors in a tree whose nodes are the places from base on
    (None: a chain).
    """

    slot: int
    base: int
    past: int
    ids: Sequence[int]
    parents: Sequence[int] | None = None  # of every place from base on, counted from base; -1: the root

    @property
    def all_depths(self) -> list[int]:
        """How far the position of each place from base on is from base, those in the cache included."""
        if self.parents is None:
            return list(range(self.past - self.base + len(self.ids)))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    @property
    def depths(self) -> list[int]:
        """The same of this pass's tokens: position - base."""
        return self.all_depths[self.past - self.base :]

    def visible(self) -> list[list[bool]]:
        """[tokens][places from base on]: the token's ancestors and itself."""
        assert self.parents is not None
        rows: list[list[bool]] = []
        for index, parent in enumerate(self.parents):
            row = list(rows[parent]) if parent >= 0 else [False] * len(self.parents)
            row[index] = True
            rows.append(row)
        return rows[self.past - self.base :]


@dataclass
class Batch:
    """A pass in the form that models and attention take. N tokens, in the order of the segments."""

    segments: list[Segment]
    ids: Tensor  # [1, N]
    positions: Tensor  # [1, N]
    table: Tensor  # [segments, 5] int64 on the CPU: slot, base, past, start, count
    mask: Tensor  # [N, W] bool: which places from its segment's base on a token sees; [0, 2] when all are chains
    starts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, segments: list[Segment], device: torch.device, known: Tensor | None = None) -> Batch:
        """known: the ids [N] where they are on the device already; those of the segments are not read then."""
        starts, ids, positions, table = [], list[int](), list[int](), []
        for segment in segments:
            starts.append(len(ids))
            table.append((segment.slot, segment.base, segment.past, len(ids), len(segment.ids)))
            ids.extend(segment.ids)
            positions.extend(segment.base + depth for depth in segment.depths)
        return cls(
            segments,
            on_device(torch.tensor([ids]), device) if known is None else known[None],
            on_device(torch.tensor([positions]), device),
            torch.tensor(table, dtype=torch.int64).view(-1, 5),
            on_device(_mask(segments, len(ids)), device),
            starts,
        )

    def mask_within(self, window: int) -> Tensor:
        """The mask [N, W] with only those places whose position is less than `window` before the token's."""
        mask = self.mask.clone()
        if mask.numel():
            for index, segment in enumerate(self.segments):
                own = self.rows(index)
                at = torch.tensor(segment.all_depths, device=mask.device)
                near = at > at[-len(segment.ids) :, None] - window
                mask[own.start : own.stop, : len(at)] &= near
        return mask

    def rows(self, index: int) -> range:
        """Where the tokens of segment `index` are."""
        return range(self.starts[index], self.starts[index] + len(self.segments[index].ids))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU there; where that is a CUDA device, nobody waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _mask(segments: list[Segment], tokens: int) -> Tensor:
    if all(segment.parents is None for segment in segments):
        return torch.empty(0, 2, dtype=torch.bool)  # 2: a row's length as any, where a compiler looks at it
    return block_mask(segments, tokens)


def block_mask(segments: list[Segment], tokens: int) -> Tensor:
    """[tokens, W] bool: which places from its segment's base on a token sees, of chains too."""
    width = max(segment.past + len(segment.ids) - segment.base for segment in segments)
    mask = torch.zeros(tokens, width, dtype=torch.bool)
    start = 0
    for segment in segments:
        count, reach = len(segment.ids), segment.past + len(segment.ids) - segment.base
        if segment.parents is None:
            block = torch.ones(count, reach, dtype=torch.bool).tril(diagonal=reach - count)
        else:
            block = torch.tensor(segment.visible(), dtype=torch.bool)
        mask[start : start + count, :reach] = block
        start += count
    return mask
