"""Several processes that write one data set: which prompts are whose, and who may touch what when.

parts/shard-1-of-4/     the responses of one process
parts/shard-1-of-4.done when it has them all
parts/*.lock            held while a process works; the system lets go of it when the process ends, however it does
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from draft.errors import UserError


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of the work; index counts from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        return f"shard-{self.index}-of-{self.count}"

    def holds(self, index: int) -> bool:
        """Whether conversation `index` is this shard's."""
        return index % self.count == self.index

    @property
    def others(self) -> list[Shard]:
        return [Shard(index, self.count) for index in range(self.count)]


def parse_shard(text: str | None) -> Shard | None:
    """`0/4` is the first of four. Without it, the place that `accelerate launch` or `torchrun` gave this process.

    Raises:
        UserError: for what is not of this form, or out of range.
    """
    if text is None:
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        return Shard(int(rank), int(world)) if rank.isdecimal() and world.isdecimal() and int(world) > 1 else None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text!r} is not of the form 0/4, with the first number from 0 to below the second.")
    return Shard(int(index), int(count))


def missing_shards(folder: Path, count: int | None) -> list[Shard]:
    """The shards of an unfinished data set that are not done; none where it is not written in shards."""
    shards = Shard(0, count).others if count else []
    return [shard for shard in shards if not (folder / "parts" / f"{shard.name}.done").is_file()]


def mark_done(folder: Path, shard: Shard) -> None:
    (folder / "parts" / f"{shard.name}.done").touch()


@contextmanager
def locked(folder: Path, name: str, *, wait: bool, busy: str = "") -> Iterator[None]:
    """Hold parts/NAME.lock; where another process has it, wait, or refuse with `busy`."""
    path = folder / "parts" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(busy) from error
        yield
