"""What surrounds a run: reproducible arithmetic, and a disk that fills up told in one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from draft.errors import UserError

WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let torch use only algorithms that give the same bits every time, and refuse the others by name."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted or before[0])
    memory.fill_uninitialized_memory = before[1] and not wanted  # nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = before[1]


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn what writing into `folder` raises into a UserError that says how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in WRITE_ERRORS:
            raise
        raise UserError(
            f"{str(folder)!r} could not be written to ({error}); make room, and the same command goes on from the last "
            "checkpoint."
        ) from error
