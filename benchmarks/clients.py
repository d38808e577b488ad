"""Clients of a server under load: requests in a closed loop or as Poisson arrivals, and the trace of each."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import httpx

TIMEOUT = 600.0  # seconds for one answer


@dataclass(frozen=True)
class Request:
    """One POST request."""

    path: str
    body: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Number of tokens that the answer must have."""
        return int(self.body.get("max_tokens") or self.body["max_completion_tokens"])


@dataclass
class Trace:
    """One request as its client saw it: seconds of perf_counter(), and tokens by its usage."""

    sent: float
    first: float = 0.0  # the first text; 0: it was not streamed, or none came
    ended: float = 0.0
    tokens: int = 0
    accepted: int = 0  # by the steps
    steps: int = 0  # verifications of at least one drafted token
    error: str | None = None

    @property
    def first_token_seconds(self) -> float | None:
        return self.first - self.sent if self.first else None

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds per token after the first one."""
        return (self.ended - self.first) / (self.tokens - 1) if self.first and self.tokens > 1 else None

    @property
    def seconds(self) -> float:
        return self.ended - self.sent


@dataclass(frozen=True)
class Load:
    """Traces of some requests, and the seconds from the first one's sending to the last one's end."""

    traces: list[Trace]
    seconds: float

    @property
    def good(self) -> list[Trace]:
        return [trace for trace in self.traces if trace.error is None]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return sum(trace.tokens for trace in self.good) / self.seconds

    @property
    def requests_per_second(self) -> float:
        return len(self.good) / self.seconds


def closed_loop(url: str, requests: Sequence[Request], concurrency: int) -> Load:
    """Run so many clients, each of which sends its next request when the last one is answered."""

    async def run(client: httpx.AsyncClient) -> list[Trace]:
        left, traces = iter(requests), list[Trace]()

        async def work() -> None:
            for request in left:
                traces.append(await send(client, request))

        await asyncio.gather(*(work() for _ in range(concurrency)))
        return traces

    return _load(url, run)


def poisson(url: str, requests: Sequence[Request], per_second: float, seed: int) -> Load:
    """Send requests with exponential gaps between them, however many are being answered."""
    gaps = random.Random(seed)

    async def run(client: httpx.AsyncClient) -> list[Trace]:
        due, tasks = perf_counter(), []
        for request in requests:
            await asyncio.sleep(max(0.0, due - perf_counter()))
            tasks.append(asyncio.ensure_future(send(client, request)))
            due += gaps.expovariate(per_second)
        return list(await asyncio.gather(*tasks))

    return _load(url, run)


def _load(url: str, conversation: Callable[[httpx.AsyncClient], Coroutine[Any, Any, list[Trace]]]) -> Load:
    async def run() -> Load:
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=unlimited, trust_env=False) as client:
            began = perf_counter()
            traces = await conversation(client)
            return Load(traces, perf_counter() - began)

    return asyncio.run(run())


async def send(client: httpx.AsyncClient, request: Request) -> Trace:
    """Send one request; whatever is wrong with its answer is in the trace."""
    trace = Trace(perf_counter())
    try:
        async with client.stream("POST", request.path, json=request.body) as response:
            if response.status_code != 200:
                trace.error = f"status {response.status_code}"
            elif request.body.get("stream"):
                await _note_stream(trace, response)
            else:
                _note_usage(trace, json.loads(await response.aread()))
    except (httpx.HTTPError, ValueError, LookupError) as error:
        trace.error = f"{type(error).__name__}: {error}"
    trace.ended = trace.ended or perf_counter()
    if trace.error is None and trace.tokens != request.tokens:
        trace.error = f"{trace.tokens} tokens instead of {request.tokens}"
    return trace


async def _note_stream(trace: Trace, response: httpx.Response) -> None:
    done = False
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data:"):
            chunk = json.loads(line.removeprefix("data:"))
            if "error" in chunk:
                trace.error = chunk["error"]["message"]
            elif chunk.get("usage"):
                _note_usage(trace, chunk)
            else:
                choice = chunk["choices"][0]
                if not trace.first and (choice.get("text") or choice.get("delta", {}).get("content")):
                    trace.first = perf_counter()
                if choice["finish_reason"]:
                    trace.ended = perf_counter()
    if not done:
        trace.error = trace.error or "the stream ended without [DONE]"


def _note_usage(trace: Trace, answer: dict[str, Any]) -> None:
    trace.tokens = answer["usage"]["completion_tokens"]
    if figures := answer.get("metrics"):  # of other servers there are none
        figures = figures["speculative_decoding"]
        trace.accepted, trace.steps = figures["num_accepted_draft_tokens"], figures["num_spec_steps"]
