"""One HTTP request's sequences: they are submitted, followed and given up together, whatever the surface."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request as HttpRequest

from serving.api.errors import ApiError, api_error, unavailable
from serving.api.service import Service
from serving.api.sse import disconnected
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
