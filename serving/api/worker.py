"""The line of requests: one thread owns the engine and serves them one at a time, in order.

The event loop only ever takes a lock that is held for microseconds, so health and metrics answer during generation.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from serving.engine import Completion, Engine, SamplingParams

log = logging.getLogger(__name__)

# after one of these the accelerator's context is gone for good; running out of memory is not among them
_FATAL: tuple[type[BaseException], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))


class Overloaded(Exception):
    """The line is full."""


class EngineStopped(Exception):
    """The engine's thread has ended: nothing will be generated any more."""


@dataclass(eq=False)
class Job:
    """One request on its way through the line."""

    prompt_ids: list[int]
    params: SamplingParams
    speculation_length: int  # 0: decoded plainly
    rule: str
    future: Future[Completion] = field(default_factory=Future)
    abandoned: threading.Event = field(default_factory=threading.Event)
    submitted: float = field(default_factory=time.monotonic)  # seconds
    started: float = 0.0  # seconds, same clock


class Worker:
    """Runs `engine` in a thread of its own. `max_waiting` requests may wait behind the one that runs."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self._engine = engine
        self._max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopped

    @property
    def running(self) -> int:
        return int(self._running is not None)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def check_room(self) -> None:
        """Raises Overloaded or EngineStopped when a request handed in now would be turned away."""
        if not self.alive:
            raise EngineStopped
        if self.waiting + self.running > self._max_waiting:
            raise Overloaded

    def submit(self, prompt_ids: list[int], params: SamplingParams, *, speculation_length: int, rule: str) -> Job:
        """Put a request at the end of the line; its `future` gives the Completion.

        Raises:
            Overloaded: the line is full.
            EngineStopped: the thread has ended.
        """
        job = Job(prompt_ids, params, speculation_length, rule)
        with self._changed:
            self.check_room()
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Give up a request: it leaves the line at once, or the engine at its next step."""
        job.abandoned.set()
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)
        job.future.cancel()  # no effect on one that runs

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread after the engine's current step; whoever still waits gets EngineStopped."""
        with self._changed:
            self._stopped = True
            if self._running is not None:
                self._running.abandoned.set()
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._serve(job)
        except BaseException:
            log.critical("the engine's thread died; restart the server", exc_info=True)
        finally:
            self._turn_everyone_away()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopped)
            if self._stopped:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _serve(self, job: Job) -> None:
        wanted = job.future.set_running_or_notify_cancel()
        completion: Completion | None = None
        failure: Exception | None = None
        if wanted:
            job.started = time.monotonic()
            try:
                completion = self._engine.generate(
                    job.prompt_ids,
                    job.params,
                    speculative=job.speculation_length > 0,
                    speculation_length=job.speculation_length,
                    rule=job.rule,
                    cancelled=job.abandoned.is_set,
                )
            except _FATAL:
                raise
            except Exception as error:  # this request's misfortune, not the server's
                failure = error
        with self._changed:
            self._running = None  # before the answer, so that whoever has it finds room in the line
        if failure is not None:
            job.future.set_exception(failure)
        elif completion is not None and completion.finish_reason == "cancelled":
            job.future.set_exception(EngineStopped())  # cut short by stop(), or by a client that no longer listens
        elif completion is not None:
            job.future.set_result(completion)

    def _turn_everyone_away(self) -> None:
        with self._changed:
            self._stopped = True
            left = [job for job in (self._running, *self._waiting) if job is not None]
            self._running = None
            self._waiting.clear()
        for job in left:
            with suppress(InvalidStateError):  # cancelled by its client meanwhile
                job.future.set_exception(EngineStopped())
