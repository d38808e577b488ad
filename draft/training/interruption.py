"""Ctrl-C and SIGTERM end a run at the end of an optimiser step, so that what is saved is a whole step's."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was told to stop, and saved its state after `step`."""

    def __init__(self, number: int | None, step: int) -> None:
        """number: the signal; None: another process received it."""
        super().__init__(f"interrupted and saved after step {step}")
        self.exit_code = 128 + (number or signal.SIGTERM)
        self.step = step


class Interruption:
    """A context in which the first signal only sets `received`; a second one does what it always does."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # others can't set handlers
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
