"""`vllm serve` as a child process, with the exported head, on loopback."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from draft.errors import UserError
from draft.files import cache_folder

_READY_SECONDS = 1800  # the largest model is loaded from the slowest disk
_END_SECONDS = 30
_LAST_LINES = 20
# options of vLLM by which it would not be where, or as, it is looked for here
_OURS = ("--host", "--port", "--uds", "--api-key", "--root-path", "--ssl-certfile", "--ssl-keyfile", "--headless")
# On Linux the child ends with this process, whatever ends that. The child's own Python sees to it, since Python that
# runs between fork and exec may deadlock where there are threads; the program keeps the setting.
_FOLLOW = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class VllmServer:
    """A running `vllm serve`. It ends with the thread that starts it, which should be the process's main one."""

    def __init__(self, target: str, head: str | None, speculation_length: int, arguments: Sequence[str]) -> None:
        """Start it; arguments: more options of vLLM.

        Raises:
            UserError: there is no `vllm`, the head cannot be exported for it, or an argument is not the user's to give.
        """
        taken = (*_OURS, "--speculative-config") if head is not None else _OURS
        for word in arguments:
            if (name := word.partition("=")[0].replace("_", "-")) in taken:
                raise UserError(f"{name} cannot be passed to vLLM: draft-serve gives it; leave it out.")
        program = shutil.which("vllm")
        if program is None:
            raise UserError(
                "--engine vllm: there is no program vllm on the PATH; install it (pip install vllm) and activate its "
                "environment, or give the address of one that runs elsewhere: --upstream URL."
            )
        command = _command(target, head, speculation_length)[1:]  # without the name of the program
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._stopping = False
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._deadline = time.monotonic() + _READY_SECONDS
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FOLLOW, str(os.getpid()), program, *command, "--host", "127.0.0.1",
             "--port", str(port), "--disable-uvicorn-access-log", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,  # Ctrl-C is for this process, which ends the child
        )  # fmt: skip
        self._copying = threading.Thread(target=self._copy_log, name="vllm-log", daemon=True)
        self._copying.start()

    def _copy_log(self) -> None:
        """Pass its output on to standard error, and keep the last lines."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line.rstrip())
            sys.stderr.write(line)

    def check(self) -> None:
        """Raise UserError once it has ended, or has had its time to become ready."""
        if self._process.poll() is not None:
            raise self._ended()
        if time.monotonic() > self._deadline:
            raise UserError(f"vllm serve was not ready after {_READY_SECONDS} seconds; its last lines: {self._last()}")

    def attend(self) -> None:
        """Wait for its end, and raise UserError unless `stop` brought it about."""
        self._process.wait()
        if not self._stopping:
            raise self._ended()

    def stop(self) -> None:
        """End it, with the processes that it started; a second call changes nothing."""
        if self._stopping:
            return
        self._stopping = True
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ended(self) -> UserError:
        self._copying.join(5.0)  # unless something that it started holds the pipe
        return UserError(f"vllm serve ended with status {self._process.wait()}; its last lines: {self._last()}")

    def _last(self) -> str:
        return " | ".join(filter(None, self._lines)) or "it printed nothing"


def _command(target: str, head: str | None, speculation_length: int) -> list[str]:
    """Return `vllm serve` with the target and, where there is a head, its export."""
    from draft.heads.checkpoint import head_sha256
    from draft.interop.exporting import export_head
    from draft.interop.formats import target_shape

    if head is None:
        return ["vllm", "serve", target_shape(target).path]
    out = cache_folder() / "exported" / head_sha256(head)
    exported = export_head(head, "vllm", out, target=target, speculation_length=speculation_length)
    return shlex.split(exported.commands["vLLM"])
