"""Keys and values in slots that are allocated once; a rollback lowers a length, and copies nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_GRANULE = 256  # slots are allocated in multiples of this, so that requests of similar lengths share them


class SlotLayer(CacheLayerMixin):
    """The keys and values of one attention layer. Also the whole cache of a draft head (`KeyValueCache`).

    Slots from `length` on may hold entries that were rolled back: they are never returned, and are overwritten by
    what comes next.
    """

    is_sliding = False  # sliding-window layers keep all of their past too; their mask forgets what is outside

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0
        self._slots: tuple[Tensor, Tensor] | None = None  # [batch, kv_heads, capacity, head_dim] each

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append to the slots.

        key_states, value_states: [batch, kv_heads, new, head_dim] -> views [batch, kv_heads, past + new, head_dim]
        of everything that is live.
        """
        if self._slots is None:
            self.lazy_initialization(key_states, value_states)
        assert self._slots is not None
        start, end = self.length, self.length + key_states.shape[2]
        assert end <= self.capacity, f"{end} tokens do not fit in {self.capacity} slots"
        for slots, new in zip(self._slots, (key_states, value_states), strict=True):
            slots[:, :, start:end] = new
        self.length = end
        self.keys, self.values = (slots[:, :, :end] for slots in self._slots)
        return self.keys, self.values

    def clear(self, capacity: int) -> None:
        """Forget everything, and hold at least `capacity` tokens from now on."""
        self.length = 0
        if capacity > self.capacity:
            self.capacity = -(-capacity // _GRANULE) * _GRANULE
            self._slots = None

    def rollback(self, length: int) -> None:
        """Keep the first `length` tokens only."""
        assert 0 <= length <= self.length, f"cannot roll back from {self.length} to {length} tokens"
        self.length = length

    # what transformers asks of a cache's layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, _ = key_states.shape
        # keys and values may differ in width
        self._slots = (
            key_states.new_empty(batch, heads, self.capacity, key_states.shape[3]),
            value_states.new_empty(batch, heads, self.capacity, value_states.shape[3]),
        )
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that `update` will return, position of the first of them)."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity

    get_max_cache_shape = get_max_length  # its name in older versions


class SlotCache(Cache):
    """The target's cache, in the form that any Hugging Face decoder takes as `past_key_values`."""

    def __init__(self, num_layers: int) -> None:
        self.slot_layers = [SlotLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    @property
    def length(self) -> int:
        return self.slot_layers[0].length

    def clear(self, capacity: int) -> None:
        """Forget everything, and hold at least `capacity` tokens from now on."""
        for layer in self.slot_layers:
            layer.clear(capacity)

    def rollback(self, length: int) -> None:
        """Keep the first `length` tokens of every layer."""
        for layer in self.slot_layers:
            layer.rollback(length)


def causal_mask(past: int, new: int, device: torch.device) -> Tensor | None:
    """True = attend, [1, 1, new, past + new]: `new` tokens after `past` cached ones. None where attention needs none.

    Attention without a mask is causal only for an empty past, and sees everything only for one new token.
    """
    if past == 0 or new == 1:
        return None
    keys = torch.arange(past + new, device=device)
    return (keys <= keys[past:, None])[None, None]
