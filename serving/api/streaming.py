"""One HTTP request's sequences, which are submitted, followed and cancelled together, and server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

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
        http: HttpRequest,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        speculation: Speculation,
        received: float,
        *,
        captured: bool = True,
    ) -> None:
        """Submit all or none; received: seconds of time.monotonic(). captured: False where the client forbids it.

        Raises:
            UserError, Overloaded, EngineStopped: as Engine.submit_all. ApiError: the server ends.
        """
        self.http = http
        self.service: Service = http.app.state.service
        self.requests = self.service.check_open().submit_all(prompts, params, speculation)
        if self.service.metrics is not None:
            for request in self.requests:
                self.service.metrics.watch(request, received)
        if captured and self.service.capture is not None:
            self.service.capture.watch(self.requests)
        self._reason: ApiError | None = None  # for which all were cancelled
        self.service.endings.add(self._end)
        self._timer: asyncio.TimerHandle | None = None
        seconds = self.service.limits.request_seconds
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
        self.service.endings.discard(self._end)
        if self._timer is not None:
            self._timer.cancel()
        for request in self.requests:
            request.cancel()

    async def completions(self) -> list[Completion]:
        """Wait for all, or for the client to leave; nothing runs on for a client that left."""
        # shielded, for a request ends by its own `cancel` only
        ends = [asyncio.shield(asyncio.wrap_future(request.future)) for request in self.requests]
        try:
            await unless_disconnected(asyncio.gather(*ends, return_exceptions=True), self.http)
            completions = [self._checked(end.result()) for end in ends]
        except Exception as error:
            raise api_error(error, logged=True) from error
        finally:  # also when the server, shutting down, cancels this very task
            self.close()
        self.http.scope["draftsmith.log"] |= {"generated_tokens": sum(len(each.token_ids) for each in completions)}
        return completions

    async def bursts(self) -> AsyncGenerator[Burst]:
        """Yield tokens as they come, those of one step together."""
        queue: asyncio.Queue[Burst | Exception] = asyncio.Queue()

        async def follow(index: int, request: Request) -> None:
            try:
                async with aclosing(request.bursts()) as bursts:
                    async for tokens, completion in bursts:
                        queue.put_nowait((index, tokens, completion))
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.ensure_future(follow(index, request)) for index, request in enumerate(self.requests)]
        left = len(tasks)
        try:
            while left:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise api_error(item, logged=True) from item
                if item[2] is not None:
                    self._checked(item[2])
                    left -= 1
                yield item
        finally:
            self.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _checked(self, completion: Completion) -> Completion:
        if completion.finish_reason == "cancelled":
            raise self._reason or unavailable("the request was cancelled")
        return completion


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


class Answer(Protocol):
    """One API's events: of the tokens of one step, and of the end, which may be an error."""

    def burst(self, index: int, tokens: list[Token], completion: Completion | None) -> bytes: ...

    def end(self, error: ApiError | None) -> bytes: ...


async def stream(answer: Answer, generation: Generation, headers: dict[str, str] | None = None) -> EventStream:
    """Wait for the first chunk: what goes wrong before is an ordinary error with a status of its own."""
    chunks = _chunks(answer, generation)
    first = await unless_disconnected(anext(chunks), generation.http)
    return EventStream(first, chunks, generation.service.limits.stalled_seconds, headers)


async def _chunks(answer: Answer, generation: Generation) -> AsyncGenerator[bytes]:
    """Yield events, those of one step together; after the first a failure is an event, too."""
    begun, generated = False, 0
    try:
        async with aclosing(generation.bursts()) as bursts:
            async for index, tokens, completion in bursts:
                generated += len(tokens)
                if chunk := answer.burst(index, tokens, completion):
                    begun = True
                    yield chunk
        yield answer.end(None)
    except Exception as error:
        if not begun:
            raise api_error(error) from error
        yield answer.end(api_error(error))
    finally:
        generation.http.scope["draftsmith.log"] |= {"generated_tokens": generated}


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.warning("a client took no byte of its stream for %g seconds; dropped", self.send_timeout)
        finally:
            await self._rest.aclose()
