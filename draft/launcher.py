"""Start draft-serve as a child process: for `prepare`, the demonstration, benchmarks and tests."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from draft.errors import UserError

_END_SECONDS = 30
_ROOT = Path(__file__).resolve().parents[1]
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class ServerEnded(UserError):
    """A server that ended by itself."""


@dataclass(frozen=True)
class Server:
    """A running draft-serve."""

    url: str
    process: int

    def memory(self) -> int:
        """Return the resident bytes."""
        return int(psutil.Process(self.process).memory_info().rss)


@contextmanager
def draft_serve(
    options: Sequence[str],
    before_start: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run draft-serve with these options on a free port of 127.0.0.1, from when it is ready until the block ends.

    On Linux it also ends when this process is killed, and when the thread that called this ends.

    before_start: called in the new process before its program, for instance to bind it to cores.
    environment: variables of the new process, besides those of this one.

    Raises:
        ServerEnded: it ended before it was ready, or before the block did; with the last line that it printed.
    """
    command = [sys.executable, "-m", "serving.cli", "--port", "0", *options]
    paths = [str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]  # where packages are not installed
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | dict(environment or {})
    starter = os.getpid()

    def prepare_child() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != starter:  # killed before the line above
                os._exit(1)
        if before_start is not None:
            before_start()

    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=variables,
            preexec_fn=prepare_child,
            start_new_session=True,  # Ctrl-C is for this process, which ends the server
        )
        try:
            server = Server(_address(process, log), process.pid)
            try:
                yield server
            except UserError as error:
                if process.poll() is not None:
                    raise ServerEnded(
                        f"draft-serve ended with status {process.returncode}: {_last_line(log)}"
                    ) from error
                raise
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
    message = _last_line(log)
    if process.wait() == 2 and message.startswith("draft-serve: "):  # a sentence for the user
        raise ServerEnded(message.removeprefix("draft-serve: "))
    raise ServerEnded(f"draft-serve ended before it was ready: {message}")


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    return (log.read().strip().splitlines() or ["it printed nothing"])[-1]
