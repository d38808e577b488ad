"""What a client holds of a request while the engine works on it."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import aclosing, suppress
from dataclasses import dataclass

from draft.errors import UserError
from serving.engine.sequence import Completion, SamplingParams, Token

MAX_SPECULATION_LENGTH = 32  # beyond any acceptance length that a head reaches


class Overloaded(Exception):
    """The line is full."""


class EngineStopped(Exception):
    """The engine has ended, or gave this request up to end: nothing more will be generated."""


@dataclass(frozen=True)
class Speculation:
    """A request's own wishes. They change its speed, and the distribution of its text never.

    Raises:
        UserError: for a number of tokens out of range.
    """

    enabled: bool = True
    num_tokens: int | None = None  # the most that are drafted at a time; None: as the engine does. 0 is off
    rule: str | None = None  # None: the engine's

    def __post_init__(self) -> None:
        if self.num_tokens is not None:
            check_speculation_length(self.num_tokens)


def check_speculation_length(length: int) -> int:
    if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= MAX_SPECULATION_LENGTH:
        raise UserError(
            f"speculation_length = {length!r}: it must be a whole number from 0 (off) to {MAX_SPECULATION_LENGTH}."
        )
    return length


@dataclass(frozen=True)
class Times:
    """When things happened to a request, in seconds of time.monotonic(); 0 is not yet."""

    submitted: float
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


_NUMBERS = itertools.count()


class Request:
    """One request: `async for` follows it, `result()` waits for it, `cancel()` gives it up at the next step."""

    def __init__(self, prompt_ids: list[int], params: SamplingParams, speculation: Speculation) -> None:
        self.number = next(_NUMBERS)
        self.context = contextvars.copy_context()  # the asker's, for log lines about this request
        self.prompt_ids, self.params, self.speculation = prompt_ids, params, speculation
        self.times = Times(submitted=time.monotonic())
        self.arrivals: list[float] = []  # when tokens came, some at a time: seconds of time.monotonic()
        self.future: Future[Completion] = Future()
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._released: list[Token] = []
        self._listener: Callable[[], None] | None = None

    # the client's side

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end. Raises EngineStopped when the engine ends first, or whatever went wrong."""
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Give up: the slot is free after the engine's current step; the completion has what there was."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def done(self) -> bool:
        return self.future.done()

    async def __aiter__(self) -> AsyncIterator[Token | Completion]:
        """Each token when it is decided, and the completion at the end. One iteration a request.

        Leaving the iteration early cancels the request.
        """
        async with aclosing(self.bursts()) as bursts:
            async for tokens, completion in bursts:
                for token in tokens:
                    yield token
                if completion is not None:
                    yield completion

    async def bursts(self) -> AsyncGenerator[tuple[list[Token], Completion | None]]:
        """The same, with the tokens together that have come together; the last of them come with the completion."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(changed.set)

        self._listener = wake
        self.future.add_done_callback(lambda _: wake())
        try:
            while True:
                tokens, done = self._take()
                if done and (self.future.exception() is None or not tokens):
                    yield tokens, self.future.result()
                    return
                if tokens:  # what came before an error comes before it
                    yield tokens, None
                if done:
                    continue
                await changed.wait()
                changed.clear()
        finally:
            self._listener = None
            self.cancel()

    def _take(self) -> tuple[list[Token], bool]:
        """What has come, and whether that is all."""
        with self._lock:
            tokens, self._released = self._released, []
            return tokens, self.done

    # the engine's side

    def release(self, tokens: list[Token]) -> None:
        """Tokens whose text is certain."""
        if not tokens:
            return
        with self._lock:
            self._released.extend(tokens)
            self.arrivals.append(time.monotonic())
        listener = self._listener  # which the client's thread takes away
        if listener is not None:
            listener()

    def stamp(self, **times: float) -> None:
        self.times = Times(**{**self.times.__dict__, **times})

    def finish(self, completion: Completion, tokens: list[Token] | None = None) -> None:
        """The end, with the tokens that were not released before."""
        now = time.monotonic()
        self.stamp(finished=now)
        with self._lock, suppress(InvalidStateError):  # none sees the last tokens without the completion
            if tokens:
                self._released.extend(tokens)
                self.arrivals.append(now)
            self.future.set_result(completion)

    def fail(self, error: BaseException) -> None:
        self.stamp(finished=time.monotonic())
        with suppress(InvalidStateError):
            self.future.set_exception(error)
