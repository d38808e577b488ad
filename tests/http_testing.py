"""Helpers for tests of the HTTP service: an app in process, and a live server on a real port."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from serving.engine import Engine
from serving.server import Listener

PROMPT = "<|im_start|>user\nA secretive prompt about zebras.<|im_end|>\n<|im_start|>assistant\n"
MESSAGES = [{"role": "user", "content": "A secretive prompt about zebras."}]  # which the template makes PROMPT of


def ask(client: Any, inputs: str = PROMPT, **parameters: Any) -> httpx.Response:
    """One POST /generate of 8 tokens, or as many as the parameters say."""
    parameters = {"max_new_tokens": 8, **parameters}
    return client.post("/generate", json={"inputs": inputs, "parameters": parameters})


def complete(client: Any, path: str = "completions", **body: Any) -> dict[str, Any]:
    """One POST on OpenAI's surface, greedy and of 12 tokens unless the body says otherwise; a stream's events."""
    asked = {"messages": MESSAGES} if "chat" in path else {"prompt": PROMPT}
    answer = client.post(f"/v1/{path}", json={"max_tokens": 12, "temperature": 0, **asked, **body})
    assert answer.status_code == 200, answer.text
    return answer.json() if not body.get("stream") else {"events": events(answer.text)}


def metric(client: Any, name: str, prefix: str = "draftsmith") -> float:
    """A time series' value; name: with its labels."""
    return series(client.get("/metrics").text, name, prefix)


def series(text: str, name: str, prefix: str = "draftsmith") -> float:
    return float(next(line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(f"{prefix}:{name} ")))


def events(text: str) -> list[Any]:
    """The data of each server-sent event; "[DONE]" as it is."""
    blocks = [block for block in text.split("\n\n") if block]
    assert all(block.startswith("data:") and "\n" not in block for block in blocks)
    data = [block.removeprefix("data:").removeprefix(" ") for block in blocks]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def eventually(holds: Callable[[], bool], seconds: float = 120, every: float = 0.005) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(every)


async def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    """As `eventually`, while an event loop goes on."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.002)


def idle(engine: Engine) -> bool:
    """Return True when no slot is in use."""
    return engine.running == engine.waiting == 0 and engine.cache_usage == 0


def in_process(app: FastAPI, conversation: Callable[[httpx.AsyncClient], Any], seconds: float = 240) -> Any:
    """Run a conversation of concurrent requests with an app on one event loop."""

    async def run() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=seconds) as client:
            return await asyncio.wait_for(conversation(client), seconds)

    return asyncio.run(run())


@contextmanager
def live(app: Any, stalled_seconds: float = 60.0, port: int = 0, **options: Any) -> Iterator[str]:
    """The app behind uvicorn on a port of 127.0.0.1, a free one by default; yields its address."""
    with Listener("127.0.0.1", port, stalled_seconds) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2, **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener.socket]), daemon=True)
        thread.start()
        eventually(lambda: server.started)
        try:
            yield listener.url("http")
        finally:
            server.should_exit = True
            thread.join(30)


class GatedEngine(Engine):
    """The real engine, which makes steps only while its gate is open."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = threading.Event()
        self.failure: BaseException | None = None
        inner = self._decoder.step

        def step(rows: Any) -> None:
            while not self.gate.wait(0.002):
                if self._queue.closed or any(row.request.cancelled for row in rows):
                    return
            if self.failure is not None:
                raise self.failure
            inner(rows)

        self._decoder.step = step  # type: ignore[method-assign]


def failing(engine: GatedEngine, after: int, failure: BaseException) -> None:
    """Let `after` steps of the engine succeed."""
    inner, count = engine._decoder.step, iter(range(after + 1))

    def step(rows: Any) -> None:
        if next(count) == after:
            raise failure
        inner(rows)

    engine.gate.set()
    engine._decoder.step = step  # type: ignore[method-assign]
