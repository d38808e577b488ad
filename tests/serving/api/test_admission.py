"""The queue of requests, clients that leave, failures, and the engine's end."""

import asyncio
from typing import Any

import httpx
from fastapi.testclient import TestClient
from http_testing import MESSAGES, PROMPT, in_process, series, until

from serving.api.app import create_app
from serving.engine import Engine

OPENAI: dict[str, dict[str, Any]] = {"completions": {"prompt": "a"}, "chat/completions": {"messages": MESSAGES}}


def post(client: httpx.AsyncClient, inputs: str = PROMPT, **parameters: Any) -> asyncio.Task[httpx.Response]:
    body = {"inputs": inputs, "parameters": {"max_new_tokens": 6, **parameters}}
    return asyncio.ensure_future(client.post("/generate", json=body))


async def statuses(*requests: asyncio.Task[httpx.Response]) -> list[int]:
    return [(await request).status_code for request in requests]


def test_health_and_metrics_answer_during_generation_and_a_full_line_is_429(gated):
    async def conversation(client):
        accepted = [post(client, f"{index} {PROMPT}") for index in range(3)]
        await until(lambda: gated.running == 1 and gated.waiting == 2)
        refused = await post(client)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
        for path, body in OPENAI.items():
            answer = await client.post(f"/v1/{path}", json=body)
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["type"] == "rate_limit_error"
        assert (await client.get("/health")).status_code == 200 == (await client.get("/ready")).status_code
        text = (await client.get("/metrics")).text
        assert series(text, "num_requests_running") == 1 and series(text, "num_requests_waiting") == 2
        assert series(text, 'request_failure_total{reason="overloaded"}') == 3
        assert not any(task.done() for task in accepted)
        gated.gate.set()
        assert await statuses(*accepted) == [200] * 3
        assert (await post(client)).status_code == 200  # there is room again

    in_process(create_app(gated), conversation)


def test_the_line_is_bounded_by_tokens_too(make_gated):
    gated = make_gated(max_waiting=100, max_waiting_tokens=200)

    async def conversation(client):
        running = post(client, "a")
        await until(lambda: gated.running == 1)
        waiting = post(client, "a", max_new_tokens=150)
        await until(lambda: gated.waiting == 1)
        assert (await post(client, "a", max_new_tokens=100)).status_code == 429
        small = post(client, "a", max_new_tokens=10)
        await until(lambda: gated.waiting == 2)
        gated.gate.set()
        assert await statuses(running, waiting, small) == [200] * 3

    in_process(create_app(gated), conversation)


def test_several_choices_are_taken_all_or_none(gated, make_gated):
    """More than ever fit are the client's mistake, more than fit now are not."""

    async def conversation(client):
        def several(choices, path="completions"):
            return client.post(f"/v1/{path}", json={**OPENAI[path], "n": choices, "max_tokens": 2})

        for path in OPENAI:
            answer = await several(4, path)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "n" and "<= 3" in answer.text
        answer = await client.post("/v1/completions", json={"prompt": ["a"] * 2, "n": 2})
        assert answer.status_code == 400
        running = post(client)
        await until(lambda: gated.running == 1)
        assert (await several(3)).status_code == 429 and gated.waiting == 0
        taken = asyncio.ensure_future(several(2))
        await until(lambda: gated.waiting == 2)
        gated.gate.set()
        assert await statuses(running, taken) == [200] * 2 and (await several(3)).status_code == 200

    in_process(create_app(gated), conversation)
    unqueued = make_gated(max_batch=3, max_waiting=0)
    unqueued.gate.set()
    with TestClient(create_app(unqueued)) as client:
        answers = [client.post("/v1/completions", json={"prompt": "a", "n": n, "max_tokens": 2}) for n in (3, 4)]
    assert [answer.status_code for answer in answers] == [200, 400]


def test_an_engine_error_costs_its_requests_and_tells_only_the_log(gated, monkeypatch, log_lines):
    gated.gate.set()
    asked = {"headers": {"x-request-id": "trace-42"}, "json": {"inputs": PROMPT, "parameters": {"max_new_tokens": 6}}}
    with TestClient(create_app(gated)) as client:
        gated.failure = RuntimeError("/home/secret/weights exploded")
        failed = client.post("/generate", **asked)
        assert failed.status_code == 424
        assert failed.json() == {"error": "Request failed during generation", "error_type": "generation"}
        assert [line["request_id"] for line in log_lines() if "this request" in line["message"]] == ["trace-42"]
        gated.failure = None
        assert client.get("/health").status_code == 200 == client.post("/generate", **asked).status_code
        text = client.get("/metrics").text
        assert series(text, 'request_failure_total{reason="generation"}') == 1
        assert series(text, 'request_success_total{finished_reason="error"}') == 1
        monkeypatch.setattr(gated, "_activate", lambda request: 1 / 0)
        assert client.post("/generate", **asked).status_code == 424
    [line] = [line for line in log_lines() if "ZeroDivisionError" in line.get("exception", "")]
    assert (line["request_id"], line["level"]) == ("trace-42", "error") and line["logger"].startswith("serving.engine")
    assert "zebras" not in str(log_lines()) and "exploded" in str(log_lines())


def test_when_the_engine_s_thread_dies_nobody_hangs(make_gated):
    gated = make_gated(max_waiting=5)
    gated.failure = SystemExit("the thread is gone")

    async def conversation(client):
        requests = [post(client) for _ in range(5)]
        await until(lambda: gated.running == 1 and gated.waiting == 4)
        assert (await client.get("/health")).status_code == 200
        gated.gate.set()
        for answer in [await task for task in requests] + [await post(client)]:
            assert answer.status_code == 503 and answer.headers["retry-after"]
        for answer in (await client.get("/ready"), await client.get("/health")):
            assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.json() == {"error": "unhealthy", "error_type": "healthcheck"}
        text = (await client.get("/metrics")).text
        assert series(text, "num_requests_running") == series(text, "num_requests_waiting") == 0

    in_process(create_app(gated), conversation)


def test_draining_ends_what_has_not_finished_in_time(gated):
    app = create_app(gated)

    async def conversation(client):
        requests = [asyncio.ensure_future(client.post("/generate_stream", json={"inputs": PROMPT})), post(client)]
        await until(lambda: gated.running == 1 and gated.waiting == 1)
        await app.state.service.drain(0.05)  # the gate stays shut
        for answer in [await request for request in requests]:
            assert answer.status_code == 503 and "shutting down" in answer.json()["error"]

    in_process(app, conversation)


def test_while_the_model_is_loaded_the_server_is_alive_but_not_ready(tiny_target):
    app = create_app(None)
    asked = {"inputs": "a"}
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200 == client.get("/metrics").status_code
        answers = [client.get(path) for path in ("/ready", "/info", "/v1/models")]
        answers += [client.post(path, json=asked) for path in ("/generate", "/tokenize")]
        answers += [client.post("/v1/completions", json={"prompt": "a"})]
        assert all(answer.status_code == 503 and answer.headers["retry-after"] for answer in answers)
        app.state.service.attach(Engine(tiny_target))
        assert client.get("/ready").status_code == 200
        assert client.post("/generate", json=asked).status_code == 200
