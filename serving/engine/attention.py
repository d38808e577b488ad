"""Attention of a ragged batch over slots of keys and values, put in the place of transformers' own.

transformers calls `attend` in the attention layers of any decoder that takes an AttentionInterface, and builds no mask
for it: what a token sees follows from its segment. Grouped heads share keys and values without repeating them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from transformers import AttentionInterface

from draft.errors import UserError
from serving.engine.batch import Batch, Segment
from serving.engine.cache import LayerShape
from serving.engine.padding import Padded

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
