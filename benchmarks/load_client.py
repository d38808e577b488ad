"""Sends requests to a server as its users would: so many at a time, or whenever they come; and times the answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import httpx

_TIMEOUT = 600.0  # seconds


@dataclass(frozen=True)
class Ask:
    """One POST."""

    path: str
    body: dict[str, Any]

    @property
    def tokens(self) -> int:
        """That the answer must have."""
        return int(self.body.get("max_tokens") or self.body["max_completion_tokens"])


@dataclass
class Trace:
    """One request as its client saw it: seconds of perf_counter(), and tokens as the usage tells them."""

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
        """After the first token."""
        return (self.ended - self.first) / (self.tokens - 1) if self.first and self.tokens > 1 else None

    @property
    def seconds(self) -> float:
        return self.ended - self.sent


@dataclass(frozen=True)
class Load:
    """What came of some requests, from the first one's sending to the last one's end."""

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


def closed_loop(url: str, asks: Sequence[Ask], concurrency: int) -> Load:
    """So many clients, each of which sends its next request when the last one is answered."""

    async def run(client: httpx.AsyncClient) -> list[Trace]:
        left, traces = iter(asks), list[Trace]()

        async def work() -> None:
            for ask in left:
                traces.append(await send(client, ask))

        await asyncio.gather(*(work() for _ in range(concurrency)))
        return traces

    return _run(url, run)


def poisson(url: str, asks: Sequence[Ask], per_second: float, seed: int) -> Load:
    """Requests whenever they come, however many are being answered: the gaps between them are exponential."""
    gaps = random.Random(seed)

    async def run(client: httpx.AsyncClient) -> list[Trace]:
        due, tasks = perf_counter(), []
        for ask in asks:
            await asyncio.sleep(max(0.0, due - perf_counter()))
            tasks.append(asyncio.ensure_future(send(client, ask)))
            due += gaps.expovariate(per_second)
        return list(await asyncio.gather(*tasks))

    return _run(url, run)


def _run(url: str, conversation: Any) -> Load:
    async def inner() -> Load:
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, limits=unlimited, trust_env=False) as client:
            began = perf_counter()
            traces = await conversation(client)
            return Load(traces, perf_counter() - began)

    return asyncio.run(inner())


async def send(client: httpx.AsyncClient, ask: Ask) -> Trace:
    """One request; whatever is wrong with its answer is in the trace."""
    trace = Trace(perf_counter())
    try:
        await (_streamed if ask.body.get("stream") else _whole)(client, ask, trace)
    except (httpx.HTTPError, ValueError, KeyError, LookupError) as error:
        trace.error = f"{type(error).__name__}: {error}"
    trace.ended = trace.ended or perf_counter()
    if trace.error is None and trace.tokens != ask.tokens:
        trace.error = f"{trace.tokens} tokens instead of {ask.tokens}"
    return trace


async def _whole(client: httpx.AsyncClient, ask: Ask, trace: Trace) -> None:
    response = await client.post(ask.path, json=ask.body)
    trace.ended = perf_counter()
    if response.status_code == 200:
        _note_usage(trace, response.json())
    else:
        trace.error = f"status {response.status_code}"


async def _streamed(client: httpx.AsyncClient, ask: Ask, trace: Trace) -> None:
    async with client.stream("POST", ask.path, json=ask.body) as response:
        if response.status_code != 200:
            trace.error = f"status {response.status_code}"
            return
        done = False
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data:"):
                _note_chunk(trace, json.loads(line.removeprefix("data:")))
    if not done:
        trace.error = trace.error or "the stream ended without [DONE]"


def _note_chunk(trace: Trace, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        trace.error = chunk["error"]["message"]
        return
    if chunk.get("usage"):
        _note_usage(trace, chunk)
        return
    choice = chunk["choices"][0]
    if not trace.first and (choice.get("text") or choice.get("delta", {}).get("content")):
        trace.first = perf_counter()
    if choice["finish_reason"]:
        trace.ended = perf_counter()


def _note_usage(trace: Trace, answer: dict[str, Any]) -> None:
    trace.tokens = answer["usage"]["completion_tokens"]
    figures = answer["metrics"]["speculative_decoding"]
    trace.accepted, trace.steps = figures["num_accepted_draft_tokens"], figures["num_spec_steps"]
