"""One HTTP request's sequences: they are submitted, followed and given up together, whatever the surface."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.api.errors import ApiError, api_error, unavailable
from serving.api.service import Service
from serving.engine import Completion, Request, SamplingParams, Speculation, Token

Burst = tuple[int, list[Token], Completion | None]  # index of the sequence, its new tokens, its end


class Generation:
    """The sequences of one HTTP request, from their submission to `close`.

    A deadline or the server's end gives them up, and then `completions` and `bursts` raise the ApiError that says why.
    """

    def __init__(self, service: Service, requests: list[Request]) -> None:
        self.requests = requests
        self._service = service
        self._why: ApiError | None = None
        self._ending = service.ending()
        self._ending.add_done_callback(lambda future: None if future.cancelled() else self._end(future.result()))
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def begin(
        cls,
        service: Service,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        speculation: Speculation,
        received: float,
    ) -> Generation:
        """Submit all or none; received: seconds of time.monotonic().

        Raises:
            UserError, Overloaded, EngineStopped: as Engine.submit_all. ApiError: the server ends.
        """
        requests, metrics = service.check_open().submit_all(prompts, params, speculation), service.metrics
        if metrics is not None:
            for request in requests:
                metrics.watch(request, received)
        generation = cls(service, requests)
        generation._set_deadline(received)
        return generation

    def close(self) -> None:
        """Give up what still runs."""
        self._ending.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for request in self.requests:
            request.cancel()

    async def completions(self, http: HttpRequest) -> list[Completion]:
        """Wait for all, or for the client to leave; nothing runs on for a client that left."""
        answer = asyncio.ensure_future(self._all_done())
        gone = asyncio.ensure_future(disconnected(http.receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ApiError("cancelled", "the client closed the connection")
            await answer
            try:
                return [self._checked(request.result(0)) for request in self.requests]
            except Exception as error:
                raise api_error(error) from error
        finally:  # also when the server, shutting down, cancels this very task
            self.close()
            for task in (answer, gone):
                task.cancel()

    async def bursts(self) -> AsyncGenerator[Burst]:
        """What comes, as it comes."""
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
            raise self._why or unavailable("the request was given up")
        return completion

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

    def _set_deadline(self, received: float) -> None:
        seconds = self._service.limits.request_seconds
        if seconds is None:
            return
        message = f"the request took longer than the server allows, {seconds:g} seconds"
        # sent again it would take as long again
        error = ApiError("incomplete_generation", message, code="timeout", headers={"x-should-retry": "false"})
        left = seconds - (time.monotonic() - received)
        self._timer = asyncio.get_running_loop().call_later(max(0.0, left), self._end, error)

    def _end(self, why: ApiError) -> None:
        self._why = self._why or why
        for request in self.requests:
            request.cancel()


async def _merged(requests: list[Request]) -> AsyncGenerator[Burst]:
    if len(requests) == 1:
        async with aclosing(requests[0].bursts()) as bursts:
            async for tokens, completion in bursts:
                yield 0, tokens, completion
        return
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


# Server-sent events.


log = logging.getLogger(__name__)

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


# json.dumps would make one for each event. ASCII: some clients end lines at U+0085, U+2028 and U+2029, too
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def event(data: Any, prefix: bytes = b"data: ") -> bytes:
    """One event, on a single line as some clients need it."""
    return prefix + _encode(data).encode() + b"\n\n"


class EventStream(Response):
    """Sends what `chunks` gives as it comes.

    The answer begins with the first chunk: what goes wrong before is an ordinary error with a status of its own. When
    the client goes, or takes no bytes for `stalled_seconds`, the generator is closed. A slow reader is waited for here
    only; what is decided meanwhile gathers in the request and becomes one larger chunk.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[bytes], stalled_seconds: float, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(headers=HEADERS | (headers or {}))
        del self.headers["content-length"]
        self.chunks = chunks
        self.stalled_seconds = stalled_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                if not task.done():
                    task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
        if not sending.cancelled():
            try:
                sending.result()
            except TimeoutError:
                log.warning("a client took no byte of its stream for %g seconds; dropped", self.stalled_seconds)

    async def _send_all(self, send: Send) -> None:
        started = False
        async with aclosing(self.chunks):
            async for chunk in self.chunks:
                async with asyncio.timeout(self.stalled_seconds):
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        async with asyncio.timeout(self.stalled_seconds):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
