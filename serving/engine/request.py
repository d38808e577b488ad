"""One request: its options, the client's handle of it, what it gives back, and the queue in which it waits."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from draft.errors import UserError
from draft.evaluation.tau import acceptance_length
from serving.engine.sampling import SamplingParams

if TYPE_CHECKING:
    from serving.engine.heads import LoadedHead

MAX_SPECULATION_LENGTH = 32  # beyond any acceptance length that a head reaches
_NUMBERS = itertools.count()
T = TypeVar("T")


class Overloaded(Exception):
    """The queue is full."""


class EngineStopped(Exception):
    """The engine has ended, or gave this request up to end: nothing more will be generated."""


@dataclass(frozen=True)
class Speculation:
    """A request's options of speculation. They change its speed, and never the distribution of its text.

    Raises:
        UserError: for a number of tokens out of range.
    """

    enabled: bool = True
    num_tokens: int | None = None  # the most that are drafted at a time; None: as the engine does. 0 is off
    rule: str | None = None  # None: the engine's
    head: str | None = None  # the name of the one that drafts; None: as the engine chooses

    def __post_init__(self) -> None:
        if self.num_tokens is not None:
            check_speculation_length(self.num_tokens)


def check_speculation_length(length: int) -> int:
    if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= MAX_SPECULATION_LENGTH:
        raise UserError(
            f"speculation_length = {length!r}: it must be a whole number from 0 (off) to {MAX_SPECULATION_LENGTH}."
        )
    return length


@dataclass
class Times:
    """When things happened to a request, in seconds of time.monotonic(); 0 is not yet."""

    submitted: float
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


class Request:
    """One request: `async for` follows it, `result()` waits for it, `cancel()` gives it up at the next step."""

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        speculation: Speculation,
        checks: LoadedHead | None = None,
    ) -> None:
        """checks: a head whose self-check this request is a part of."""
        self.checks = checks
        self.number = next(_NUMBERS)
        self.context = contextvars.copy_context()  # the client's, for log lines about this request
        self.prompt_ids, self.params, self.speculation = prompt_ids, params, speculation
        self.times = Times(submitted=time.monotonic())
        self.arrivals: list[float] = []  # when tokens came, some at a time: seconds of time.monotonic()
        self.future: Future[Completion] = Future()
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._released: list[Token] = []
        self._last: list[Token] = []  # the tokens that come with the completion
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
        """Yield each token when it is decided, and the completion at the end. One iteration a request.

        Leaving the iteration early cancels the request.
        """
        async with aclosing(self.bursts()) as bursts:
            async for tokens, completion in bursts:
                for token in tokens:
                    yield token
                if completion is not None:
                    yield completion

    async def bursts(self) -> AsyncGenerator[tuple[list[Token], Completion | None]]:
        """Yield tokens together that have come together; the last of them come with the completion."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(changed.set)

        self._listener = wake
        self.future.add_done_callback(lambda _: wake())
        try:
            while True:
                with self._lock:
                    done = self.done
                    tokens, self._released = self._released, []
                    if done:  # nobody sees the last tokens without the completion
                        tokens, self._last = tokens + self._last, []
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

    # the engine's side

    def release(self, tokens: list[Token]) -> None:
        """Hand out tokens whose text is certain."""
        if not tokens:
            return
        with self._lock:
            self._released.extend(tokens)
            self.arrivals.append(time.monotonic())
        listener = self._listener  # which the client's thread takes away
        if listener is not None:
            listener()

    def finish(self, completion: Completion, tokens: Sequence[Token] = ()) -> None:
        """End the request; tokens: those that were not released before."""
        self.times.finished = time.monotonic()
        if tokens:
            self._last = list(tokens)
            self.arrivals.append(self.times.finished)
        with suppress(InvalidStateError):
            self.future.set_result(completion)  # under no lock: its callbacks may look at the request

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        self.times.finished = time.monotonic()
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass
class Token:
    """One token of an answer."""

    id: int
    text: str  # what it adds to the text ("" while a character is incomplete); a special token's name
    logprob: float | None  # natural log of the target's own probability: before penalties, temperature and truncation
    special: bool  # special tokens are not in the answer's text
    accepted_position: int | None  # 0-based draft position, or None: supplied by the target itself
    top: list[tuple[int, float]] | None = None  # the most probable ids and their logprobs, falling
    rejected: int | None = None  # what had been drafted here, the first of several, where the target chose another
    drafted: int = 0  # tokens in a row that had been drafted for the verification which decided this one
    copied: bool = False  # the draft that was accepted or rejected here was copied by lookup, and not the head's


@dataclass
class Completion:
    """The answer to one request."""

    prompt_ids: list[int]
    token_ids: list[int]  # an EOS token included, and a stop id where the request keeps it
    tokens: list[Token]
    text: str  # special tokens left out
    finish_reason: str  # "length", "eos_token", "stop_sequence", or "cancelled"
    seed: int | None  # None for a greedy request without one: nothing was random
    stats: SpeculationStats
    stop_reason: str | int | None = None  # the stop string, or the stop id, that ended it


class Verification(NamedTuple):
    """The figures of one verification, in tokens."""

    depth: int  # drafted in a row
    accepted: int
    copied: int = 0  # so many of those in a row, the last ones, were copied by lookup; the head drafted the others

    @property
    def accepted_copies(self) -> int:
        return max(0, self.accepted - (self.depth - self.copied))


@dataclass
class SpeculationStats:
    """Counts of one request's speculation. Only tokens that are in the answer count as emitted or accepted.

    A verification is one pass of the target after the prefill; without speculation it has no drafted tokens and
    emits one token.
    """

    drafted: int = 0
    emitted: int = 0  # by verifications: the bonus token included, the one that the prefill gave excluded
    steps: list[Verification] = field(default_factory=list)
    head: str | None = None  # the name of the one that drafted; None: none did
    head_fingerprint: str | None = None  # of its weights; None: they are not of a file
    prefill_seconds: float = 0.0  # the prompt through the target, up to the first token
    decode_seconds: float = 0.0  # the steps that follow; the head reads the prompt in the first of them that drafts
    known: bool = True  # False: another server answered, and gave no figures

    @property
    def verifications(self) -> int:
        return len(self.steps)

    @property
    def accepted(self) -> int:
        return sum(step.accepted for step in self.steps)

    @property
    def drafted_per_position(self) -> list[int]:
        """Verifications that drafted a token at each draft position."""
        deepest = max((step.depth for step in self.steps), default=0)
        return [sum(step.depth > position for step in self.steps) for position in range(deepest)]

    @property
    def accepted_per_position(self) -> list[int]:
        """Verifications that accepted a token at each draft position; as long as `drafted_per_position`."""
        deepest = max((step.depth for step in self.steps), default=0)
        return [sum(step.accepted > position for step in self.steps) for position in range(deepest)]

    @property
    def by_source(self) -> dict[str, dict[str, int]]:
        """Drafted and accepted tokens of the head and of lookup."""
        copied, copies = sum(step.copied for step in self.steps), sum(step.accepted_copies for step in self.steps)
        return {
            "head": {"drafted": self.drafted - copied, "accepted": self.accepted - copies},
            "lookup": {"drafted": copied, "accepted": copies},
        }

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted / verifications; nan when there was no verification."""
        return acceptance_length(self.emitted, self.verifications)

    def count(self, depth: int, drafted: int, accepted: int, emitted: int, copied: int = 0) -> None:
        """Add one verification: of `drafted` tokens, up to `depth` in a row, with the tokens accepted and emitted."""
        self.steps.append(Verification(depth, accepted, copied))
        self.drafted += drafted
        self.emitted += emitted

    def settle(self, emitted: int) -> None:
        """Leave so many emitted tokens, after a stop string took back the others."""
        self.emitted = left = emitted
        for index, step in enumerate(self.steps):
            self.steps[index] = step._replace(accepted=min(step.accepted, left))
            left = max(0, left - step.accepted - 1)


class RequestQueue:
    """Requests that wait for a slot and room in the cache: bounded, first come first served, safe in any thread."""

    def __init__(self, max_requests: int, max_tokens: int | None) -> None:
        """Bounds of those that wait behind the free slots: requests, and tokens of their prompts and answers."""
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.closed = False
        self._waiting: deque[Request] = deque()
        self._posted: deque[tuple[Callable[[], None], Future[Any]]] = deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def check_open(self) -> None:
        if self.closed:
            raise EngineStopped("the engine has ended")

    def check_room(self, tokens: int, free_slots: int, requests: int = 1) -> None:
        """Raise Overloaded or EngineStopped when so many requests, of so many tokens, would be turned away now."""
        self.check_open()
        waiting = [request for request in list(self._waiting) if not request.cancelled]
        if len(waiting) + requests > self.max_requests + free_slots:
            more = f" beyond the {free_slots} for which there is a slot" if free_slots else ""
            came = f", {requests} more came" if requests > 1 else ""
            raise Overloaded(
                f"{len(waiting)} requests wait already{came}, and max_waiting is {self.max_requests}{more}"
            )
        queued = _tokens(waiting)
        if self.max_tokens is not None and waiting and queued + tokens > self.max_tokens:
            raise Overloaded(
                f"{queued} tokens wait already, {tokens} more came, and max_waiting_tokens is {self.max_tokens}"
            )

    def join(self, requests: Sequence[Request], free_slots: int | None, *, first: bool = False) -> None:
        """Append all requests or none; raises as `check_room`.

        free_slots: None when the caller bounds their number. first: before those that wait already.
        """
        with self._changed:
            if free_slots is None:
                self.check_open()
            else:
                self.check_room(_tokens(requests), free_slots, len(requests))
            if first:
                self._waiting.extendleft(reversed(requests))
            else:
                self._waiting.extend(requests)
            self._changed.notify()

    def post(self, work: Callable[[], T]) -> Future[T]:
        """Let the thread that takes requests out do some work before it goes on; EngineStopped once it has ended."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            self.check_open()
            self._posted.append((run, future))
            self._changed.notify()
        return future

    def run_posted(self) -> None:
        """Do the work that was posted."""
        while True:
            with self._changed:
                if not self._posted:
                    return
                run, _ = self._posted.popleft()
            run()

    def next(self, fits: Callable[[Request], bool] = lambda _: True) -> Request | None:
        """Take out the first request that is still wanted, if it fits: none overtakes one that waits for room."""
        while True:
            with self._changed:
                if not self._waiting or not fits(self._waiting[0]):
                    return None
                request = self._waiting.popleft()
            if request.future.set_running_or_notify_cancel():
                return request

    def drop_cancelled(self) -> None:
        """Answer the requests that were cancelled while they waited, wherever they are in the queue."""
        with self._changed:
            cancelled = {request for request in self._waiting if request.cancelled}
            if cancelled:
                self._waiting = deque(request for request in self._waiting if request not in cancelled)
        for request in cancelled:
            request.finish(Completion(request.prompt_ids, [], [], "", "cancelled", None, SpeculationStats()))

    def wait(self) -> None:
        """Wait until a request joins, work is posted, or the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._posted or self.closed)

    def close(self) -> list[Request]:
        """Let nobody join any more; returns those who still waited."""
        with self._changed:
            self.closed = True
            left, posted = list(self._waiting), list(self._posted)
            self._waiting.clear()
            self._posted.clear()
            self._changed.notify_all()
        for _, future in posted:
            future.set_exception(EngineStopped("the engine has ended"))
        return left


def _tokens(requests: Sequence[Request]) -> int:
    return sum(len(request.prompt_ids) + request.params.max_new_tokens for request in requests)
