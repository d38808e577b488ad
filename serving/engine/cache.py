"""Keys and values in slots that are allocated once; a rollback lowers a slot's length and copies nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores for each token."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


class SlotCache:
    """The keys and values of several layers for several sequences, which join and leave independently.

    Entry i of a slot belongs to the token at position i. Entries from a slot's length on are stale: they are never
    attended to, and are overwritten by what comes next. Sliding-window layers keep all of their past too; the
    attention forgets what is outside.
    """

    def __init__(self, shapes: list[LayerShape], slots: int, capacity: int) -> None:
        """capacity: the most tokens a slot can hold, drafted ones included.

        Memory is asked for at once; on a CPU the system provides pages as they are first written.
        """
        self.capacity = capacity
        self.lengths = [0] * slots
        self._free = list(reversed(range(slots)))
        self._clean = False
        # layers of one shape share a tensor, so that moving entries is one operation:
        # [layers, slots, heads, capacity, width]
        self._stacks: list[tuple[Tensor, Tensor]] = []
        self.layers: list[tuple[Tensor, Tensor]] = [None] * len(shapes)  # type: ignore[list-item]
        for shape in dict.fromkeys(shapes):
            members = [index for index, other in enumerate(shapes) if other == shape]
            keys, values = (
                torch.empty(len(members), slots, shape.heads, capacity, width, dtype=shape.dtype, device=shape.device)
                for width in (shape.key_width, shape.value_width)
            )
            self._stacks.append((keys, values))
            for place, index in enumerate(members):
                self.layers[index] = keys[place], values[place]  # [slots, heads, capacity, width] each

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def used_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.layers[0][0].device

    def keep_clean(self) -> None:
        """Overwrite what the memory held before, and from now on what a slot held when another sequence gets it."""
        self._clean = True
        for stack in self._stacks:
            for store in stack:
                store.zero_()

    def acquire(self) -> int:
        """An empty slot; there must be one."""
        slot = self._free.pop()
        self.lengths[slot] = 0
        if self._clean:
            for stack in self._stacks:
                for store in stack:
                    store[:, slot].zero_()
        return slot

    def release(self, slot: int) -> None:
        self.lengths[slot] = 0
        self._free.append(slot)

    def extend(self, slot: int, count: int) -> None:
        """`count` entries were written after the slot's length."""
        length = self.lengths[slot] + count
        assert length <= self.capacity, f"{length} tokens do not fit in {self.capacity} places"
        self.lengths[slot] = length

    def keep(self, slot: int, base: int, entries: list[int]) -> None:
        """Of the block written at `base`, keep the given entries (rising indices into the block), and nothing after it.

        A chain's accepted prefix lies where it belongs already; a tree's accepted path is moved together.
        """
        if entries != list(range(len(entries))):
            moved = torch.tensor([base + entry for entry in entries])
            places = slice(base, base + len(entries))
            for stack in self._stacks:
                for store in stack:
                    store[:, slot, :, places] = store[:, slot, :, moved.to(store.device)]
        self.lengths[slot] = base + len(entries)
