"""Start draft-serve as a child process: for `prepare`, the demonstration, benchmarks and tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from draft.errors import UserError

_END_SECONDS = 30
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Server:
    """A running draft-serve."""

    url: str
    process: int

    def memory(self) -> int:
        """Return the resident bytes."""
        return int(psutil.Process(self.process).memory_info().rss)


@contextmanager
def draft_serve(options: Sequence[str], before_start: Callable[[], None] | None = None) -> Iterator[Server]:
    """Run draft-serve with these options on a free port of 127.0.0.1, from when it is ready until the block ends.

    before_start: called in the new process before its program, for instance to bind it to cores.

    Raises:
        UserError: it ended before it was ready; with the last line that it printed.
    """
    command = [sys.executable, "-m", "serving.cli", "--port", "0", *options]
    paths = [str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]  # where packages are not installed
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, preexec_fn=before_start
        )
        try:
            yield Server(_address(process, log), process.pid)
        finally:
            process.terminate()
            try:
                process.wait(_END_SECONDS)
            finally:
                process.kill()
                assert process.stdout is not None
                process.stdout.close()


def _address(process: subprocess.Popen[str], log: IO[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"https?://\S+:\d+", line):
            return found[0]
    log.seek(0)
    said = log.read().strip().splitlines() or ["nothing was said"]
    raise UserError(f"draft-serve ended before it was ready: {said[-1]}")
