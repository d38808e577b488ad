"""Keys and values in slots that are allocated once; a rollback lowers a slot's length and copies nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from transformers import AttentionInterface

from draft.errors import UserError

if TYPE_CHECKING:
    from serving.engine.padding import Padded


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


# One ragged forward pass: the tokens of all sequences laid end to end, and where each of them may look.


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


# Attention of a ragged batch over slots of keys and values, put in the place of transformers' own.
#
# transformers calls `attend` in the attention layers of any decoder that takes an AttentionInterface, and builds no
# mask
# for it: what a token sees follows from its segment. Grouped heads share keys and values without repeating them.


NAME = "draftsmith_slots"


@dataclass
class SlotLayer:
    """What one attention layer works on: its slots, and the batch of the present pass."""

    keys: Tensor  # [slots, kv_heads, capacity, head_dim]
    values: Tensor  # [slots, kv_heads, capacity, value_dim]
    view: View
    kernel: Kernel


@dataclass
class View:
    """The batch that a model is reading; one object for all layers of a model, filled anew for each pass."""

    batch: Batch
    positions: Tensor  # [N]
    table: Tensor  # [segments, 5]
    mask: Tensor  # [N, W], or [0, 2] where all are chains
    masks: dict[int, Tensor]  # window -> the same with only what is within it
    padded: Padded | None = None  # in the place of all of these, while a pass of fixed shape runs
    compiled: bool = False  # whether torch.compile reads it, which must not build again for other numbers of segments

    @classmethod
    def empty(cls) -> View:
        nothing = torch.empty(0, dtype=torch.int64)
        return cls(Batch.of([], torch.device("cpu")), nothing, nothing.view(0, 5), nothing.view(0, 2).bool(), {})

    def show(self, batch: Batch) -> None:
        self.batch, self.positions, self.table, self.mask = batch, batch.positions[0], batch.table, batch.mask
        for window in self.masks:
            self.masks[window] = batch.mask_within(window)
        if self.compiled:
            mark_unbacked(self.table, 0)
            for mask in (self.mask, *self.masks.values()):
                mark_unbacked(mask, [0, 1])


@dataclass(frozen=True)
class Sight:
    """What the tokens of one sequence see of its keys."""

    visible: Tensor | None  # [rows, 1, tokens, keys] bool; None: everything
    is_chain: bool  # causal, from the end of the keys backwards
    window: int  # 0: none


# (query [rows, heads, tokens, d], keys, values [rows, kv_heads, keys, d], sight, scale, softcap)
# -> [rows, tokens, heads, value_dim]
Formula = Callable[[Tensor, Tensor, Tensor, Sight, float, float], Tensor]
# (query [1, heads, N, d], key, value [1, kv_heads, N, d], layer, scale, window, softcap) -> [1, N, heads, value_dim]
Kernel = Callable[[Tensor, Tensor, Tensor, SlotLayer, float, int, float], Tensor]


def slot_attention_by(formula: Formula) -> Kernel:
    """Attention in plain PyTorch, for any device and dtype, sequence by sequence; padded passes at once."""

    def slot_attention(
        query: Tensor, key: Tensor, value: Tensor, layer: SlotLayer, scale: float, window: int, softcap: float
    ) -> Tensor:
        """Write the new keys and values to their slots, and attend.

        query: [1, heads, N, head_dim]; key, value: [1, kv_heads, N, ...]; window: a token sees that many positions up
        to its own (0: all); softcap: scores are bounded by it (0: not). Returns [1, N, heads, value_dim].
        """
        if layer.view.padded is not None:
            return _attend_padded(formula, layer.view.padded, query, key, value, layer, scale, window, softcap)
        mixed = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        start = 0
        for segment in layer.view.batch.segments:
            rows = slice(start, start + len(segment.ids))
            start = rows.stop
            reach = segment.past + len(segment.ids)
            layer.keys[segment.slot, :, segment.past : reach] = key[0, :, rows]
            layer.values[segment.slot, :, segment.past : reach] = value[0, :, rows]
            keys, values = (slots[segment.slot, None, :, :reach] for slots in (layer.keys, layer.values))
            visible = _visible(segment, layer.view, rows, reach, window)
            sight = Sight(None if visible is None else visible[None, None], segment.parents is None, window)
            mixed[:, rows] = formula(query[:, :, rows], keys, values, sight, scale, softcap)
        return mixed

    return slot_attention


def _attend_padded(
    formula: Formula,
    padded: Padded,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: SlotLayer,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """All rows of a padded pass at once: query [1, heads, rows * tokens, d] -> [1, rows * tokens, heads, value_dim]."""
    shape = padded.shape
    writers = padded.slots.repeat_interleave(shape.tokens, output_size=shape.rows * shape.tokens)
    layer.keys[writers, :, padded.places] = key[0].transpose(0, 1)
    layer.values[writers, :, padded.places] = value[0].transpose(0, 1)
    keys, values = (slots[:, :, : shape.reach].index_select(0, padded.slots) for slots in (layer.keys, layer.values))
    by_row = query[0].unflatten(1, (shape.rows, shape.tokens)).transpose(0, 1)  # [rows, heads, tokens, d]
    mixed = formula(by_row, keys, values, Sight(padded.visible(window), False, window), scale, softcap)
    return mixed.flatten(0, 1)[None]


def _visible(segment: Segment, view: View, rows: slice, reach: int, window: int) -> Tensor | None:
    """[tokens, reach] bool: what each token of a segment sees; None: everything."""
    positions = view.positions[rows]
    places = torch.arange(reach, device=positions.device)
    if segment.parents is None:
        if len(segment.ids) == 1 and not 0 < window < reach:
            return None
        visible = places <= positions[:, None]
    else:
        block = view.masks.get(window, view.mask)[rows, : reach - segment.base]
        visible = torch.cat([block.new_ones(len(block), segment.base), block], dim=1)
        if window:  # of the block, the mask says it
            visible &= (places >= segment.base) | (places > positions[:, None] - window)
        return visible
    return visible & (places > positions[:, None] - window) if window else visible


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
    """What transformers calls: `module` is the attention layer, to which `SlotLayer` was attached."""
    if s_aux is not None:
        raise UserError("this target's attention has sinks, which the engine does not know; use another target.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: SlotLayer | Probe = module.draftsmith  # type: ignore[assignment]
    if isinstance(layer, Probe):
        layer.saw(module, key, value, Scoring(scale, sliding_window or 0, softcap or 0.0))
        return query.new_zeros(*query.transpose(1, 2).shape[:-1], value.shape[-1]), None
    return layer.kernel(query, key, value, layer, scale, sliding_window or 0, softcap or 0.0), None


AttentionInterface.register(NAME, attend)


@dataclass(frozen=True)
class Scoring:
    """How an attention layer scores keys."""

    scale: float
    window: int  # 0: none
    softcap: float  # 0: none


class Probe:
    """Attached to every module for one pass, it finds those that attend, and what each of them stores."""

    def __init__(self) -> None:
        self.found: dict[nn.Module, LayerShape] = {}
        self.scoring: list[Scoring] = []  # in the same order
        self.again = 0  # calls of modules that had attended before

    def saw(self, module: nn.Module, key: Tensor, value: Tensor, scoring: Scoring) -> None:
        self.again += module in self.found
        self.found[module] = LayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
        self.scoring.append(scoring)
