"""Keys and values in blocks that are allocated once, ragged batches over them, and the attention of such batches."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cpu_kernels.ops import BLOCK
from draft.errors import UserError

ATTENTION = "draftsmith_slots"  # the name of `attend` in transformers' table


@dataclass(frozen=True)
class LayerShape:
    """The tensors that one attention layer stores for each token."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of one token."""
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


def blocks_of(tokens: int) -> int:
    """Return the number of blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


class SlotCache:
    """The keys and values of several layers for several sequences, which join and leave independently.

    A sequence has a slot, for which blocks are reserved when it joins; they need not lie together. Entry i of a slot
    belongs to the token at position i, and is in its block i // BLOCK. A rollback lowers a slot's length and copies
    nothing: entries from the length on are stale, never attended to, and overwritten by the next tokens. Sliding-window
    layers keep all of their past too; the attention leaves out what is outside.
    """

    def __init__(self, shapes: list[LayerShape], slots: int, capacity: int, blocks: int | None = None) -> None:
        """capacity: the most tokens a slot can hold, drafted ones included. blocks: all that there are (default: enough
        for every slot at its capacity).

        All memory is allocated here; on a CPU the system provides pages as they are first written.
        """
        self.capacity = capacity
        self.blocks = slots * blocks_of(capacity) if blocks is None else blocks
        self.lengths = [0] * slots
        # the blocks of each slot, in order; -1: none. On the CPU: [slots, blocks of a slot]
        self.table = torch.full((slots, blocks_of(capacity)), -1)
        self._free_slots = list(reversed(range(slots)))
        self._held: list[list[int]] = [[] for _ in range(slots)]  # the same blocks
        # a heap: the lowest come first, so that a sequence's blocks mostly lie together, and few pages are touched
        self._returned: list[int] = []
        self._untouched = 0  # the blocks from this one on were never reserved
        # layers of one shape share a tensor, so that moving entries is one operation: [layers, heads, places, width]
        self._stacks: list[Tensor] = []
        self.layers: list[tuple[Tensor, Tensor]] = [None] * len(shapes)  # type: ignore[list-item]
        for shape in dict.fromkeys(shapes):
            members = [index for index, other in enumerate(shapes) if other == shape]
            keys, values = (
                torch.empty(
                    len(members), shape.heads, self.blocks * BLOCK, width, dtype=shape.dtype, device=shape.device
                )
                for width in (shape.key_width, shape.value_width)
            )
            self._stacks += [keys, values]
            for place, index in enumerate(members):
                self.layers[index] = keys[place], values[place]  # [heads, places, width] each

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self._stacks)

    @property
    def promised_bytes(self) -> int:
        """Bytes that the system counts as free, since they were never written."""
        on_cpu = all(store.device.type == "cpu" for store in self._stacks)
        return self.nbytes * (self.blocks - self._untouched) // max(1, self.blocks) if on_cpu else 0

    @property
    def free_blocks(self) -> int:
        return len(self._returned) + self.blocks - self._untouched

    def has_room(self, tokens: int) -> bool:
        """Return True if a sequence of so many tokens can join now."""
        return bool(self._free_slots) and blocks_of(tokens) <= self.free_blocks

    def acquire(self, tokens: int | None = None) -> int:
        """Return an empty slot with room for `tokens` (default: the capacity); there must be one."""
        count = blocks_of(self.capacity if tokens is None else tokens)
        assert self._free_slots and count <= self.free_blocks, f"{count} blocks, or a slot, are not free"
        slot = self._free_slots.pop()
        again = [heapq.heappop(self._returned) for _ in range(min(count, len(self._returned)))]
        new = range(self._untouched, self._untouched + count - len(again))
        self._untouched = new.stop
        self._held[slot] = [*again, *new]
        self.table[slot, :count] = torch.tensor(self._held[slot])
        self.lengths[slot] = 0
        return slot

    def release(self, slot: int) -> None:
        """Take a slot and its blocks back."""
        for block in self._held[slot]:
            heapq.heappush(self._returned, block)
        self._held[slot] = []
        self.table[slot] = -1
        self.lengths[slot] = 0
        self._free_slots.append(slot)

    def places(self, slot: int, entries: range) -> Tensor:
        """Return the places [n] of a slot's entries in the stores of each layer, on the CPU."""
        at = torch.arange(entries.start, entries.stop)
        return self.table[slot, at // BLOCK] * BLOCK + at % BLOCK

    def extend(self, slot: int, count: int) -> None:
        """Count `count` entries that were written after the slot's length."""
        length = self.lengths[slot] + count
        places = len(self._held[slot]) * BLOCK
        assert length <= places, f"{length} tokens do not fit in {places} places"
        self.lengths[slot] = length

    def keep(self, slot: int, base: int, entries: list[int]) -> None:
        """Keep the given entries (rising indices) of the block written at `base`, and nothing after it.

        A chain's accepted prefix is in place already; a tree's accepted path is moved together.
        """
        if entries != list(range(len(entries))):
            around = self.places(slot, range(base, base + entries[-1] + 1))
            moved = around[torch.tensor(entries)]
            for store in self._stacks:
                store[:, :, around[: len(entries)].to(store.device)] = store[:, :, moved.to(store.device)]
        self.lengths[slot] = base + len(entries)


@dataclass(frozen=True)
class Segment:
    """The tokens of one sequence in a pass.

    They are written to entries past, past + 1, ... of a cache slot. Keys before `base` are visible to all of them; from
    `base` on a token sees itself and, by `parents`, its ancestors in a tree whose nodes are the entries from base on
    (None: a chain).
    """

    slot: int
    base: int
    past: int
    ids: Sequence[int]
    parents: Sequence[int] | None = None  # of every entry from base on, counted from base; -1: the root

    @property
    def reach(self) -> int:
        """Keys in the slot after the pass."""
        return self.past + len(self.ids)

    @property
    def depths(self) -> list[int]:
        """The position of each entry from base on, relative to base: those in the cache, then those of this pass."""
        if self.parents is None:
            return list(range(self.reach - self.base))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def visible(self) -> Tensor:
        """Return [tokens, entries from base on] bool: the entries that each token sees."""
        size = self.reach - self.base
        if self.parents is None:
            return torch.ones(len(self.ids), size, dtype=torch.bool).tril(diagonal=size - len(self.ids))
        rows: list[list[bool]] = []
        for index, parent in enumerate(self.parents):
            row = list(rows[parent]) if parent >= 0 else [False] * size
            row[index] = True
            rows.append(row)
        return torch.tensor(rows[self.past - self.base :], dtype=torch.bool)


@dataclass
class RaggedBatch:
    """The tokens of several sequences laid end to end, as models and attention take them: N tokens in all."""

    segments: list[Segment]
    ids: Tensor  # [1, N]
    positions: Tensor  # [1, N]
    table: Tensor  # [segments, 5] int64 on the CPU: slot, base, past, start, count
    mask: Tensor  # [N, W] bool: the entries from its segment's base on that a token sees; [0, 0] when all are chains
    starts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, segments: list[Segment], device: torch.device, known: Tensor | None = None) -> RaggedBatch:
        """known: the ids [N] where they are on the device already; those of the segments are not read then."""
        starts, ids, positions, table = [], list[int](), list[int](), []
        for segment in segments:
            starts.append(len(ids))
            table.append((segment.slot, segment.base, segment.past, len(ids), len(segment.ids)))
            ids.extend(segment.ids)
            positions.extend(segment.base + depth for depth in segment.depths[segment.past - segment.base :])
        mask = torch.empty(0, 0, dtype=torch.bool)
        if any(segment.parents is not None for segment in segments):
            mask = torch.zeros(len(ids), max(segment.reach - segment.base for segment in segments), dtype=torch.bool)
            for start, segment in zip(starts, segments, strict=True):
                mask[start : start + len(segment.ids), : segment.reach - segment.base] = segment.visible()
        return cls(
            segments,
            _on_device(torch.tensor([ids]), device) if known is None else known[None],
            _on_device(torch.tensor([positions]), device),
            torch.tensor(table, dtype=torch.int64).view(-1, 5),
            _on_device(mask, device),
            starts,
        )

    def mask_within(self, window: int) -> Tensor:
        """Return the mask [N, W] with only those entries whose position is less than `window` before the token's."""
        mask = self.mask.clone()
        if mask.numel():
            for index, segment in enumerate(self.segments):
                tokens = self.rows(index)
                at = torch.tensor(segment.depths, device=mask.device)
                near = at > at[-len(segment.ids) :, None] - window
                mask[tokens.start : tokens.stop, : len(at)] &= near
        return mask

    def rows(self, index: int) -> range:
        """Return the rows of segment `index` in the batch."""
        return range(self.starts[index], self.starts[index] + len(self.segments[index].ids))


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU; where the device is CUDA, nobody waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# (query [1, heads, N, d], key, value [1, kv_heads, N, d], layer, scale, window, softcap) -> [1, N, heads, value_dim]
Kernel = Callable[[Tensor, Tensor, Tensor, "SlotLayer", float, int, float], Tensor]


@dataclass
class SlotLayer:
    """One attention layer's keys and values, and the batch of the present pass."""

    keys: Tensor  # [kv_heads, places, head_dim]
    values: Tensor  # [kv_heads, places, value_dim]
    view: View
    kernel: Kernel


@dataclass
class View:
    """The batch that a model is reading; one object for all layers of a model, filled anew for each pass."""

    cache: SlotCache
    batch: RaggedBatch
    windows: dict[int, Tensor]  # window -> the batch's mask with only the entries within it
    _places: list[Tensor] | None = None

    @classmethod
    def empty(cls, cache: SlotCache, windows: Iterable[int] = ()) -> View:
        """windows: those of the model's layers that have one."""
        batch = RaggedBatch.of([], torch.device("cpu"))
        return cls(cache, batch, dict.fromkeys(windows, batch.mask))

    def show(self, batch: RaggedBatch) -> None:
        self.batch, self._places = batch, None
        for window in self.windows:
            self.windows[window] = batch.mask_within(window)

    @property
    def places(self) -> list[Tensor]:
        """The places [reach] of each segment's keys, on the batch's device; the C++ kernels find them by themselves."""
        if self._places is None:
            device, segments = self.batch.ids.device, self.batch.segments
            self._places = [
                _on_device(self.cache.places(segment.slot, range(segment.reach)), device) for segment in segments
            ]
        return self._places

    def mask(self, window: int) -> Tensor:
        """Return the mask [N, W] of layers with this window (0: none), or [0, 0] where all are chains."""
        return self.windows.get(window, self.batch.mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over the slots; transformers calls it in each attention layer of any decoder that takes an
    AttentionInterface, and builds no mask for it: its segment says what a token sees.

    module: the attention layer, to which a `SlotLayer` was attached, or a `Probe`.
    """
    if s_aux is not None:
        raise UserError("this target's attention has sinks, which the engine does not know; use another target.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: SlotLayer | Probe = module.draftsmith  # type: ignore[assignment]
    if isinstance(layer, Probe):
        layer.record(module, key, value, Scoring(scale, sliding_window or 0, softcap or 0.0))
        return query.new_zeros(*query.transpose(1, 2).shape[:-1], value.shape[-1]), None
    return layer.kernel(query, key, value, layer, scale, sliding_window or 0, softcap or 0.0), None


AttentionInterface.register(ATTENTION, attend)


@dataclass(frozen=True)
class Scoring:
    """The way in which an attention layer scores keys."""

    scale: float
    window: int  # 0: none
    softcap: float  # 0: none


class Probe:
    """Attached to every module for one pass, it finds those that attend, and the shape of their keys and values."""

    def __init__(self) -> None:
        self.found: dict[nn.Module, tuple[LayerShape, Scoring]] = {}
        self.again = 0  # calls of modules that had attended before

    def record(self, module: nn.Module, key: Tensor, value: Tensor, scoring: Scoring) -> None:
        self.again += module in self.found
        shape = LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
        self.found[module] = shape, scoring


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, layer: SlotLayer, scale: float, window: int, softcap: float
) -> Tensor:
    """Write the new keys and values to their places, and attend, sequence by sequence, on any device in any dtype.

    query: [1, heads, N, head_dim]; key, value: [1, kv_heads, N, ...]; window: a token sees that many positions up
    to its own (0: all); softcap: scores are bounded by it (0: not). Returns [1, N, heads, value_dim].
    """
    mixed = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    groups, start = query.shape[1] // key.shape[1], 0
    for segment, places in zip(layer.view.batch.segments, layer.view.places, strict=True):
        rows = slice(start, start + len(segment.ids))
        start = rows.stop
        layer.keys[:, places[segment.past :]] = key[0, :, rows]
        layer.values[:, places[segment.past :]] = value[0, :, rows]
        keys, values = (store.index_select(1, places)[None] for store in (layer.keys, layer.values))
        visible = _visible(segment, layer.view, rows, window)
        # a group's queries are further tokens of their key-value head, so that nothing is repeated
        grouped = query[:, :, rows].reshape(1, key.shape[1], -1, query.shape[3])  # [1, kv_heads, groups * tokens, d]
        sight = None if visible is None else visible.repeat(groups, 1)[None, None]
        if softcap:  # PyTorch's own attention has no bounded scores
            attended = bounded_attention(grouped, keys, values, sight, scale, softcap)
        else:
            attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=sight, scale=scale)
        mixed[:, rows] = attended.reshape(1, query.shape[1], len(segment.ids), -1).transpose(1, 2)
    return mixed


def bounded_attention(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attend with scores of softcap * tanh(scores / softcap); arguments as of scaled_dot_product_attention."""
    scores = query @ keys.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    return weights @ values


def _visible(segment: Segment, view: View, rows: slice, window: int) -> Tensor | None:
    """Return [tokens, reach] bool: the keys that each token of a segment sees; None: all."""
    if segment.parents is None and len(segment.ids) == 1 and not 0 < window < segment.reach:
        return None
    positions = view.batch.positions[0, rows]
    entries = torch.arange(segment.reach, device=positions.device)
    if segment.parents is None:
        visible = entries <= positions[:, None]
        return visible & (entries > positions[:, None] - window) if window else visible
    block = view.mask(window)[rows, : segment.reach - segment.base]
    visible = torch.cat([block.new_ones(len(block), segment.base), block], dim=1)
    if window:  # the block's mask has the window in it
        visible &= (entries >= segment.base) | (entries > positions[:, None] - window)
    return visible
