"""Many requests at once against a live server: exactness, cancellation, slow readers."""

import asyncio
import json
import random
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import make_tiny_head, make_tiny_target
from http_testing import PROMPT, GatedEngine, events, eventually, idle, live, series, until
from starlette.applications import Starlette
from starlette.routing import Route

from serving.api.app import create_app
from serving.api.streaming import EventStream
from serving.engine import Engine, Request, SamplingParams, Speculation
from serving.engine.step import ActiveRequest

COUNT = 96  # requests in flight; the ways of leaving repeat after 8
LONG = 400  # tokens of the answers that nobody waits for


def mixed(index: int) -> dict[str, Any]:
    """Parameters of one of many requests."""
    pick = random.Random(index)
    settings: dict[str, Any] = {"max_new_tokens": pick.randint(1, 10)}
    if index % 3:
        settings |= {"temperature": pick.choice([0.3, 0.8, 1.0, 1.5]), "seed": index}
        settings |= {"top_p": pick.choice([0.5, 0.9, 1.0]), "top_k": pick.choice([None, 5, 40])}
    settings |= {"repetition_penalty": pick.choice([1.0, 1.0, 1.3]), "frequency_penalty": pick.choice([0.0, 0.0, 0.7])}
    return settings


class EndlessEngine(Engine):
    """The real engine, which takes an answer of `LONG` tokens to a tenth of them and no further: only giving it up
    ends it, on a fast machine as on a slow one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.progress: dict[int | None, int] = {}  # tokens so far, by the seed of what has come into the line
        inner = self._decoder.step

        def step(rows: list[ActiveRequest]) -> None:
            going = [row for row in rows if row.params.max_new_tokens < LONG or len(row.answer.tokens) < LONG // 10]
            if going:
                inner(going)
            else:
                time.sleep(0.001)  # nobody but a client that leaves, or comes, changes anything
            self.progress.update({row.params.seed: len(row.answer.tokens) for row in rows})

        self._decoder.step = step  # type: ignore[method-assign,assignment]

    def submit_all(self, prompts: Any, params: Any, speculation: Speculation | None = None) -> list[Request]:
        requests = super().submit_all(prompts, params, speculation)
        for own in params:
            self.progress.setdefault(own.seed, 0)
        return requests


def test_a_cancel_storm_changes_no_other_answer_and_leaves_nothing_behind():
    """Mixed requests beside those whose clients leave give what each gives alone."""
    target = make_tiny_target()
    target.__dict__["eos_token_ids"] = frozenset()  # the cached property's own place: every answer has its full length
    engine = EndlessEngine(target, make_tiny_head(target), speculation="chain", max_batch=16)

    async def stays(client, index):
        wishes = mixed(index) | {"speculative": {"num_tokens": index % 6}}
        body = {"inputs": f"{index} {PROMPT[: index % 40]}", "parameters": wishes, "stream": index % 4 == 0}
        answer = await client.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        return (events(answer.text)[-1] if body["stream"] else answer.json())["generated_text"]

    async def leaves(client, index):
        pick, wishes = random.Random(index), {"max_new_tokens": LONG, "temperature": 1.0, "seed": index}
        body = {"inputs": f"{index}", "parameters": wishes, "stream": index % 4 == 1}
        if body["stream"]:  # left after some events
            async with client.stream("POST", "/generate", json=body) as answer:
                left = pick.randint(1, 10)
                async for line in answer.aiter_lines():
                    left -= line.startswith("data:")
                    if not left:
                        return
        task = asyncio.ensure_future(client.post("/generate", json=body))
        if index % 8 == 3:  # left at once, before the server has read the request or just after
            for _ in range(pick.randint(0, 20)):
                await asyncio.sleep(0)
        else:  # left in the queue, or after some tokens
            least = pick.choice([0, pick.randint(1, 10)])
            await until(lambda: engine.progress.get(index, -1) >= least)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    async def storm():
        limits = httpx.Limits(max_connections=400)
        async with asyncio.timeout(120), httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            return await asyncio.gather(*((leaves if index % 2 else stays)(client, index) for index in range(COUNT)))

    with live(create_app(engine)) as url:
        texts = asyncio.run(storm())
        eventually(lambda: idle(engine))
        text = httpx.get(f"{url}/metrics").text
    plain = Engine(target, max_batch=1, speculation="off")
    for index in range(0, COUNT, 2):
        params = SamplingParams(**{name: value for name, value in mixed(index).items() if value is not None})
        ids = target.tokenizer(f"{index} {PROMPT[: index % 40]}").input_ids
        assert texts[index] == plain.generate([ids], params)[0].text, index
    reasons = ("length", "eos_token", "stop_sequence", "error", "cancelled")
    ended = [series(text, f'request_success_total{{finished_reason="{reason}"}}') for reason in reasons]
    assert ended[:4] == [COUNT // 2, 0, 0, 0]
    assert COUNT * 3 // 8 <= ended[4] <= COUNT // 2  # but for those left at once, all that left were in the engine
    assert series(text, "e2e_request_latency_seconds_count") == COUNT // 2
    name = "spec_decode_num_accepted_tokens"
    positions = [series(text, f'{name}_per_pos_total{{position="{index}"}}') for index in range(5)]
    assert sum(positions) == series(text, f"{name}_total") > 0


def test_a_slow_reader_does_not_stall_others(tiny_target):
    engine = GatedEngine(tiny_target, max_batch=4)
    with live(create_app(engine)) as url:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": 60, "top_n_tokens": 5}}).encode()
        head = "POST /generate_stream HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}"
        readers = []
        for _ in range(3):
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            reader.connect((host, int(port)))
            reader.sendall(head.encode() + b"\r\n\r\n" + body)
            readers.append(reader)
        # at the gate, where the first one holds the others in the line: none is done before all have come
        eventually(lambda: engine.running + engine.waiting == 3)
        engine.gate.set()
        answer = httpx.post(f"{url}/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 4}}, timeout=60)
        assert answer.status_code == 200
        eventually(lambda: idle(engine), 120)  # they are decoded to the end though nobody reads
        received = b""
        while b'"generated_text":"' not in received or not received.endswith(b"\r\n0\r\n\r\n"):
            part = readers[0].recv(65536)
            assert part
            received += part
        assert received.count(b"data:") == 60
        for reader in readers:
            reader.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such timeout")
def test_a_connection_whose_client_takes_nothing_does_not_stay():
    """The system's buffers would keep it, long after its request was cancelled."""
    closed = []

    async def endless():
        try:
            while True:
                yield b"x" * 100_000
        finally:
            closed.append(True)

    app = Starlette(routes=[Route("/", lambda request: EventStream(b"x", endless(), stalled_seconds=0.3))])
    with live(app, stalled_seconds=0.5) as url, socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        port = int(url.rsplit(":")[-1])
        reader.connect(("127.0.0.1", port))
        ends = f":{port:04X} 0100007F:{reader.getsockname()[1]:04X} 01"  # the server's, established

        def connected():
            return ends in Path("/proc/net/tcp").read_text()

        reader.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        eventually(connected)
        eventually(lambda: not connected() and closed == [True], 30)
