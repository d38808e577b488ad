"""A transformers cache whose rows have a length each, and the attention function that reads it without copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache

from draft.errors import UserError
from draft.target import Target
from draft.target.target import attending_by

_ATTENTION = "draftsmith_rows"


class RowCache(Cache):
    """Keys and values of rows with a length each, allocated once: [rows, kv_heads, capacity, head_dim] a layer."""

    def __init__(self, layers: int, rows: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.size = rows, capacity
        self.stored: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.first: int | None = None  # the place that a prefill starts at, or None while decoding
        self.lengths = torch.empty(0, dtype=torch.int64)
        self.reach = 0

    def prefill_at(self, place: int) -> None:
        """The next pass reads whole prompts, for the rows from `place` on."""
        self.first = place

    def decode_at(self, lengths: Tensor, reach: int) -> None:
        """The next pass reads one token a row: at `lengths` [rows], seeing the first `reach` places of the cache."""
        self.first, self.lengths, self.reach = None, lengths, reach

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """[rows, kv_heads, new, head_dim] each -> what may be attended to: [rows, kv_heads, keys, head_dim] each."""
        pair = self.stored[layer_idx]
        if pair is None:
            pair = self.stored[layer_idx] = self._allocate(key_states), self._allocate(value_states)
        count, _heads, new, _dim = key_states.shape
        if self.first is not None:
            for store, states in zip(pair, (key_states, value_states), strict=True):
                store[self.first : self.first + count, :, :new] = states
            return key_states, value_states
        rows = torch.arange(count, device=key_states.device)
        for store, states in zip(pair, (key_states, value_states), strict=True):
            store[rows, :, self.lengths] = states[:, :, 0]
        return pair[0][:count, :, : self.reach], pair[1][:count, :, : self.reach]

    def _allocate(self, states: Tensor) -> Tensor:
        rows, capacity = self.size
        return states.new_zeros(rows, states.shape[1], capacity, states.shape[3])  # zeros: a masked NaN is still NaN

    def move(self, source: int, destination: int, length: int) -> None:
        for pair in self.stored:
            for store in pair or ():
                store[destination, :, :length] = store[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.first is not None else int(self.lengths.max())


def _row_attention(
    module: torch.nn.Module,
    query: Tensor,  # [rows, heads, tokens, head_dim]
    key: Tensor,  # [rows, kv_heads, keys, head_dim]
    value: Tensor,
    attention_mask: Tensor,  # [rows or 1, 1, tokens, keys] bool
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row without repeating keys and values: a group's queries stand in as its tokens."""
    if s_aux is not None:
        raise UserError("this target's attention has sinks, which `prepare` does not know; use another target.")
    rows, heads, tokens, width = query.shape
    if sliding_window is not None:
        places = torch.arange(key.shape[2], device=key.device)
        now = attention_mask.sum(dim=-1, keepdim=True) - 1  # each token's own place
        attention_mask = attention_mask & (places > now - sliding_window)
    if tokens == 1:
        query = query.view(rows, key.shape[1], -1, width)
        return _attend(query, key, value, attention_mask, scaling, softcap).reshape(rows, 1, heads, -1), None
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return _attend(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Shapes as in `_row_attention`, with as many key-value heads as heads, or tokens that stand for them."""
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value


AttentionInterface.register(_ATTENTION, _row_attention)


@contextmanager
def row_attention(target: Target) -> Iterator[None]:
    """Let the target's decoder use our attention function while the block runs."""
    with attending_by(target, _ATTENTION):
        yield
