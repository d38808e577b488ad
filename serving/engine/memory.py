"""The memory that the KV cache may have, and what fits into it."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from cpu_kernels.ops import BLOCK
from draft.errors import UserError
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


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take: on CUDA of the device, otherwise of the system."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    rooms = [psutil.virtual_memory().available, *_rooms_of_groups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        rooms.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(rooms))


def _rooms_of_groups(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield what each control group of this process may still take; cached files give way, so they count as free."""
    for line in process.read_text().splitlines() if process.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, limit, usage, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, cached = root / "memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = top / path.strip("/")  # in a container its own group is the top, whatever the path says
        for group in (folder, *folder.parents):
            if group.is_relative_to(top) and (group / limit).is_file():
                allowed, figures = (group / limit).read_text().strip(), (group / "memory.stat").read_text().split()
                files = int(figures[figures.index(cached) + 1]) if cached in figures else 0
                if allowed != "max":
                    yield int(allowed) - int((group / usage).read_text()) + files
