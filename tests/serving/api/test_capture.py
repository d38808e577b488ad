"""Capture of requests by the server: what becomes a row, what never does, and what is said about it."""

import asyncio

import pytest
from conftest import make_tiny_head, make_tiny_target
from fastapi.testclient import TestClient
from http_testing import MESSAGES, PROMPT, ask, complete, idle, in_process, metric, until

from draft.data.capture import open_capture
from draft.errors import UserError
from serving.api.app import create_app
from serving.capture import CaptureWriter
from serving.engine import Engine


@pytest.fixture
def captured(tiny_target, tmp_path):
    """A client of a server that captures, and a function that gives the rows, oldest first, once it has ended."""
    writer = CaptureWriter(tmp_path / "captured", limit=10**7)
    head = make_tiny_head(tiny_target)
    head.fingerprint = "f1"
    app = create_app(Engine(tiny_target, {"mine": head}, speculation="chain"), capture=writer)

    def rows():
        writer.close()
        return list(open_capture(tmp_path / "captured").rows())[::-1]

    with TestClient(app) as client:
        yield client, rows


def test_every_surface_gives_rows_of_ids_and_figures(captured, tiny_target):
    client, rows = captured
    prompt = tiny_target.tokenizer(PROMPT).input_ids
    figures = ask(client, details=True, max_new_tokens=12).json()["details"]
    client.post("/generate_stream", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 12}})
    complete(client, temperature=1, seed=3, n=2)
    complete(client, "chat/completions", stream=True, temperature=1, top_p=0.9)
    complete(client, presence_penalty=1)
    whole, streamed, first, second, truncated, penalised = rows()
    assert whole.prompt_ids == prompt and whole.answer_ids == [token["id"] for token in figures["tokens"]]
    counts = figures["speculative"]
    assert (whole.drafted, whole.accepted, whole.emitted, whole.verifications) == tuple(
        counts[name] for name in ("drafted", "accepted", "emitted", "verifications")
    )
    assert (whole.head, whole.head_fingerprint, whole.finish_reason) == ("mine", "f1", figures["finish_reason"])
    assert streamed.answer_ids == whole.answer_ids and first.answer_ids != second.answer_ids
    kinds = [each.kind for each in (whole, streamed, first, second, truncated, penalised)]
    assert kinds == ["greedy", "greedy", "temperature 1", "temperature 1", "other", "other"]
    assert truncated.truncated and penalised.altered and truncated.prompt_ids == prompt


def test_clients_can_keep_their_requests_out(captured):
    client, rows = captured
    ask(client, capture=False)
    for path in ("completions", "chat/completions"):
        for stream in (True, False):
            complete(client, path, capture=False, stream=stream, n=2)
    assert ask(client, capture=True).status_code == ask(client, capture=None).status_code == 200
    for wrong in ("false", 0, []):  # nothing that looks like a refusal is taken for a consent
        assert ask(client, capture=wrong).status_code == 422
        body = {"messages": MESSAGES, "max_tokens": 4, "capture": wrong}
        assert client.post("/v1/chat/completions", json=body).status_code == 400
    assert ask(client, "zebra " * 2000).status_code == 422  # larger than the context
    assert len(rows()) == 2


def test_requests_that_are_cancelled_or_fail_are_no_rows(make_gated, tmp_path):
    engine = make_gated(max_waiting=2)
    writer = CaptureWriter(tmp_path / "captured", limit=10**7)

    async def talk(client):
        leaving = asyncio.ensure_future(ask_async(client))
        await until(lambda: engine.running == 1)
        leaving.cancel()
        engine.gate.set()
        await until(lambda: idle(engine))
        engine.failure = ValueError("broken on purpose")
        assert (await ask_async(client)).status_code == 424
        engine.failure = None
        assert (await ask_async(client)).status_code == 200

    def ask_async(client):
        return client.post("/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 8}})

    app = create_app(engine, capture=writer)
    in_process(app, talk)
    app.state.service.stop()
    assert writer.rows == {"written": 1, "queue_full": 0, "not_written": 0}


def test_it_is_said_that_requests_are_captured(captured, tmp_path, caplog):
    client, rows = captured
    ask(client)
    answer = client.get("/info")
    figures = answer.json()["capture"]
    assert (figures["share"], figures["limit_bytes"], figures["failing"]) == (1, 10**7, False)
    assert str(tmp_path) not in answer.text
    assert len(rows()) == 1
    assert metric(client, 'capture_rows_total{outcome="written"}') == 1
    assert metric(client, 'capture_rows_total{outcome="queue_full"}') == 0
    assert metric(client, "capture_bytes") == client.get("/info").json()["capture"]["bytes"] > 0


def test_without_capture_nothing_is_kept_and_the_field_is_taken(client):
    assert ask(client, capture=False).status_code == 200
    assert client.get("/info").json()["capture"] is None and "capture" not in client.get("/metrics").text


def test_a_share_of_the_requests(tiny_target, tmp_path):
    writer = CaptureWriter(tmp_path / "captured", limit=10**7, share=0.5)
    drawn = sum(writer.chosen() for _ in range(2000))
    assert 800 < drawn < 1200


def test_answers_of_another_target_do_not_come_into_the_folder(tiny_target, tmp_path):
    folder = tmp_path / "captured"
    with TestClient(create_app(Engine(tiny_target), capture=CaptureWriter(folder, limit=10**7))) as client:
        ask(client)
    other = Engine(make_tiny_target(seed=1))
    with pytest.raises(UserError, match=f"holds answers of target 'tiny' with fingerprint {tiny_target.fingerprint}"):
        create_app(other, capture=CaptureWriter(folder, limit=10**7))
