"""The memory that the KV cache may have, and what fits into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cpu_kernels.ops import BLOCK
from draft.errors import UserError
from draft.memory import free_memory
from serving.engine.kv_cache import LayerShape, blocks_of

_KEPT_FREE = 0.125  # of what is free: activations, answers, other programs
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class CacheSize:
    """The number of blocks, their bytes in all layers, and the most tokens of one sequence."""

    blocks: int
    block_bytes: int
    capacity: int

    @property
    def tokens(self) -> int:
        return self.blocks * BLOCK

    def __str__(self) -> str:
        return f"{in_words(self.blocks * self.block_bytes)}, {self.tokens:,} tokens"


def fit_cache(
    shapes: Sequence[LayerShape], slots: int, capacity: int, least: int, memory: int | None = None
) -> CacheSize:
    """Return the size of a cache for `slots` sequences of at most `capacity` tokens, or of what fits into memory.

    shapes: of all layers, those of the head included. least: tokens without which nothing can be served. memory: bytes
    (default: those that are free, less a margin).

    Raises:
        UserError: when `memory` is more than is free, or too little for `least` tokens.
    """
    device = shapes[0].device
    block_bytes = BLOCK * sum(each.nbytes for each in shapes)
    free = free_memory(device)
    if memory is not None and memory > free:
        raise UserError(
            f"the KV cache's memory is {in_words(memory)}, and {in_words(free)} are free on {device}; "
            "give --kv-cache-memory a smaller size."
        )
    room = int(free * (1 - _KEPT_FREE)) if memory is None else memory
    blocks = min(slots * blocks_of(capacity), room // block_bytes)
    if blocks < blocks_of(least):
        raise UserError(
            f"the KV cache's memory is {in_words(room)}, of which a sequence takes {in_words(block_bytes)} for each "
            f"{BLOCK} tokens and at least {in_words(blocks_of(least) * block_bytes)}; "
            + ("free some memory." if memory is None else "give --kv-cache-memory a larger size.")
        )
    return CacheSize(blocks, block_bytes, min(capacity, blocks * BLOCK))


def check_free(what: str, size: int, promised: int, device: torch.device) -> None:
    """Refuse to take `size` bytes for `what` where so many are not free.

    promised: bytes that the system counts as free, and that caches will take as they fill.
    """
    room = max(0, free_memory(device) - promised)
    if size > room:
        raise UserError(
            f"{what} takes {in_words(size)}, and {in_words(room)} are free on {device} beside the KV caches; unload "
            "another head, or start the server with a smaller --kv-cache-memory."
        )


def in_words(size: int) -> str:
    """Return a number of bytes in decimal units: 9.1 GB."""
    value, unit = float(size), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"
