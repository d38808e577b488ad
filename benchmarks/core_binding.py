"""Binding of threads to cores: some for the engine's arithmetic, others for sockets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

CAN_BIND = hasattr(os, "sched_setaffinity")


@dataclass(frozen=True)
class Cores:
    """Cores for the arithmetic, and cores for the sockets: a server's event loop, and clients."""

    engine: tuple[int, ...]
    io: tuple[int, ...]

    @classmethod
    def split(cls) -> Cores:
        """Give half of the cores that this process may use to each; a single one is shared."""
        allowed = sorted(os.sched_getaffinity(0)) if CAN_BIND else list(range(os.cpu_count() or 1))
        half = max(1, len(allowed) // 2)
        return cls(tuple(allowed[:half]), tuple(allowed[half:] or allowed))

    def __str__(self) -> str:
        if not CAN_BIND:
            return "processes are bound to no cores: this system cannot"
        engine, io = (", ".join(map(str, cores)) for cores in (self.engine, self.io))
        return f"engine on core {engine}; server I/O and client on core {io}"


def bind(thread: int, cores: Sequence[int]) -> None:
    """Bind a thread to cores, and with it the threads that it starts from now on.

    thread: the system's number, a process's number being that of its first thread; 0: the calling thread.
    """
    if CAN_BIND:
        os.sched_setaffinity(thread, cores)


@contextmanager
def bound(cores: Sequence[int]) -> Iterator[None]:
    """Bind the calling thread to cores until the block ends."""
    before = os.sched_getaffinity(0) if CAN_BIND else ()
    bind(0, cores)
    try:
        yield
    finally:
        bind(0, tuple(before))
