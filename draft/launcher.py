"""Start draft-serve as a child process: for `prepare`, the demonstration, benchmarks and tests."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from draft.errors import UserError

_READY_SECONDS = 1800  # the largest model is loaded from the slowest disk
_END_SECONDS = 30
_ROOT = Path(__file__).resolve().parents[1]
_STARTER = "DRAFTSMITH_STARTER"  # variable with the number of the process that a draft-serve ends with
_PR_SET_PDEATHSIG = 1


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
def draft_serve(options: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run draft-serve with these options on a free port of 127.0.0.1, from when it is ready until the block ends.

    On Linux it also ends when this process is killed, and when the thread that called this ends.

    environment: variables of the new process, besides those of this one.

    Raises:
        ServerEnded: it ended before it was ready, or before the block did, with the last line that it printed; or it
            was not ready in half an hour.
    """
    command = [sys.executable, "-m", "serving.cli", "--port", "0", *options]
    paths = [str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]  # where packages are not installed
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), _STARTER: str(os.getpid())}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **own, **(environment or {})},
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
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def end_with_starter() -> None:
    """End this process with the one that started it by `draft_serve`, if one did: at its very beginning, on Linux.

    The new process sees to it, since Python that runs between fork and exec may deadlock where there are threads.
    """
    starter = os.environ.pop(_STARTER, None)
    if starter is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(starter):  # which ended before the line above
            sys.exit(1)


def _address(process: subprocess.Popen[str], log: IO[str]) -> str:
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(_READY_SECONDS, give_up)
    timer.start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"https?://\S+:\d+", line):
                return found[0]
    finally:
        timer.cancel()
    if late.is_set():
        log.seek(0)
        with tempfile.NamedTemporaryFile("w", prefix="draft-serve-", suffix=".log", delete=False) as kept:
            shutil.copyfileobj(log, kept)
        raise ServerEnded(f"draft-serve was not ready after {_READY_SECONDS} seconds; read its log: {kept.name}")
    message = _last_line(log)
    if process.wait() == 2 and message.startswith("draft-serve: "):  # a sentence for the user
        raise ServerEnded(message.removeprefix("draft-serve: "))
    raise ServerEnded(f"draft-serve ended before it was ready: {message}")


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    return (log.read().strip().splitlines() or ["it printed nothing"])[-1]
