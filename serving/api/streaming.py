"""One HTTP request's sequences, which are submitted, followed and cancelled together, and server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from serving.api.errors import NO_RETRY, ApiError, api_error, unavailable
from serving.api.service import Service
from serving.engine import Completion, Request, SamplingParams, Speculation, Token

log = logging.getLogger(__name__)

Burst = tuple[int, list[Token], Completion | None]  # index of the sequence, its new tokens, its end
T = TypeVar("T")


class Generation:
    """The sequences of one HTTP request, from their submission to `close`.

    A deadline or the server's end cancels them, and then `completions` and `bursts` raise the ApiError that says why.
    """

    def __init__(
        self,
        service: Service,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        speculation: Speculation,
        received: float,
    ) -> None:
        """Submit all or none; received: seconds of time.monotonic().

        Raises:
            UserError, Overloaded, EngineStopped: as Engine.submit_all. ApiError: the server ends.
        """
        self.requests = service.check_open().submit_all(prompts, params, speculation)
        if service.metrics is not None:
            for request in self.requests:
                service.metrics.watch(request, received)
        self._reason: ApiError | None = None  # for which all were cancelled
        self._ending = service.ending()
        self._ending.add_done_callback(lambda future: None if future.cancelled() else self._end(future.result()))
        self._timer: asyncio.TimerHandle | None = None
        seconds = service.limits.request_seconds
        if seconds is not None:
            message = f"the request took longer than the server allows, {seconds:g} seconds"
            error = ApiError("incomplete_generation", message, code="timeout", headers=NO_RETRY)
            left = seconds - (time.monotonic() - received)
            self._timer = asyncio.get_running_loop().call_later(max(0.0, left), self._end, error)

    def _end(self, reason: ApiError) -> None:
        self._reason = self._reason or reason
        for request in self.requests:
            request.cancel()

    def close(self) -> None:
        """Cancel what still runs."""
        self._ending.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for request in self.requests:
            request.cancel()

    async def completions(self, http: HttpRequest) -> list[Completion]:
        """Wait for all, or for the client to leave; nothing runs on for a client that left."""
        try:
            await unless_disconnected(self._all_done(), http)
            try:
                return [self._checked(request.result(0)) for request in self.requests]
            except Exception as error:
                raise api_error(error) from error
        finally:  # also when the server, shutting down, cancels this very task
            self.close()

    async def _all_done(self) -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def wake(_: Any) -> None:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(done.set)

        for request in self.requests:
            request.future.add_done_callback(wake)
        while not all(request.done for request in self.requests):
            await done.wait()
            done.clear()

    async def bursts(self) -> AsyncGenerator[Burst]:
        """Yield tokens as they come, those of one step together."""
        try:
            async with aclosing(_merged(self.requests)) as merged:
                async for index, tokens, completion in merged:
                    if completion is not None:
                        self._checked(completion)
                    yield index, tokens, completion
        finally:
            self.close()

    def _checked(self, completion: Completion) -> Completion:
        if completion.finish_reason == "cancelled":
            raise self._reason or unavailable("the request was cancelled")
        return completion


async def _merged(requests: list[Request]) -> AsyncGenerator[Burst]:
    queue: asyncio.Queue[Burst | BaseException] = asyncio.Queue()

    async def follow(index: int, request: Request) -> None:
        try:
            async with aclosing(request.bursts()) as bursts:
                async for tokens, completion in bursts:
                    queue.put_nowait((index, tokens, completion))
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(index, request)) for index, request in enumerate(requests)]
    try:
        left = len(requests)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            left -= item[2] is not None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(work: Awaitable[T], http: HttpRequest) -> T:
    """Return the result of `work`, or cancel it and raise an ApiError when the client leaves first."""

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError("cancelled", "the client closed the connection")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


# Server-sent events.


# json.dumps would make one for each event. ASCII: some clients end lines at U+0085, U+2028 and U+2029, too
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def event(data: Any, prefix: bytes = b"data: ") -> bytes:
    """Return one event, on a single line as some clients need it."""
    return prefix + _encode(data).encode() + b"\n\n"


def finite(value: float | None) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


class EventStream(EventSourceResponse):
    """A stream of events that the client or a stall ends: then their generator is closed.

    A slow reader is waited for here only; its tokens gather in the request and become one larger chunk.
    """

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes], stalled_seconds: float, headers: dict[str, str] | None = None
    ) -> None:
        async def chunks() -> AsyncGenerator[bytes]:
            yield first
            async for chunk in rest:
                yield chunk

        headers = {"cache-control": "no-cache", **(headers or {})}
        super().__init__(chunks(), headers=headers, ping=0, send_timeout=stalled_seconds)
        del self.headers["connection"]  # uvicorn's to decide
        self._rest = rest

    @classmethod
    async def begin(
        cls,
        chunks: AsyncGenerator[bytes],
        http: HttpRequest,
        stalled_seconds: float,
        headers: dict[str, str] | None = None,
    ) -> EventStream:
        """Wait for the first chunk: what goes wrong before is an ordinary error with a status of its own."""
        return cls(await unless_disconnected(anext(chunks), http), chunks, stalled_seconds, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.warning("a client took no byte of its stream for %g seconds; dropped", self.send_timeout)
        finally:
            await self._rest.aclose()
