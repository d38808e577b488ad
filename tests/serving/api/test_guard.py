"""Keys, origins, request ids, logs, and what is refused before a body is parsed."""

import asyncio
import json
import socket

import pytest
from conftest import byte_tokenizer
from fastapi.testclient import TestClient
from http_testing import PROMPT, ask, in_process, live
from tokenizers import normalizers

from draft.target import Target
from serving.api.app import create_app
from serving.api.service import Limits
from serving.engine import Engine

KEY = "a-key-of-some-length"
GUARDED = [("GET", "/info"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/openapi.json"), ("GET", "/docs"),
           ("POST", "/generate"), ("POST", "/generate_stream"), ("POST", "/"), ("POST", "/tokenize"),
           ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/made-up"), ("GET", "/heads"),
           ("POST", "/heads"), ("DELETE", "/heads/a"), ("POST", "/heads/a/default")]  # fmt: skip


@pytest.fixture(scope="module")
def locked(tiny_target):
    app = create_app(Engine(tiny_target), api_key=KEY, cors_origins=["https://pages.example"])
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize(("method", "path"), GUARDED, ids=str)
def test_without_the_key_there_is_401_in_the_surface_s_shape(locked, method, path):
    for given in (None, "", f"Bearer {KEY}x", "Bearer ", f"Basic {KEY}", KEY, "Bearer \u00e9"):
        headers = {} if given is None else {"authorization": given.encode()}
        answer = locked.request(method, path, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert (error["code"] == "invalid_api_key") if path.startswith("/v1") else isinstance(error, str)
        assert answer.headers["x-request-id"]
    assert locked.request(method, path, headers={"authorization": f"bearer {KEY}"}).status_code != 401
    assert all(locked.get(open_to_all).status_code != 401 for open_to_all in ("/health", "/ready", "/"))


def test_cors_only_where_it_is_asked_for(locked, client):
    asked = {"origin": "https://pages.example", "access-control-request-method": "POST",
             "access-control-request-headers": "authorization,content-type,x-stainless-lang"}  # fmt: skip
    allowed = locked.options("/generate", headers=asked)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == asked["origin"]
    assert locked.options("/heads/a", headers=asked | {"access-control-request-method": "DELETE"}).status_code == 200
    told = locked.post("/generate", json={"inputs": "a"}, headers={"origin": asked["origin"]})
    assert told.status_code == 401 and told.headers["access-control-allow-origin"] == asked["origin"]
    assert locked.options("/generate", headers=asked | {"origin": "https://evil.example"}).status_code == 400
    assert "access-control-allow-origin" not in client.get("/health", headers=asked).headers


def test_only_json_is_taken_and_the_way_out_is_named(client):
    body, json_type = b'{"inputs": "a", "parameters": {"max_new_tokens": 1}}', "Application/JSON; charset=utf-8"
    for headers, path in (
        ({"content-type": "application/x-www-form-urlencoded"}, "/generate"),
        ({"content-type": "text/plain"}, "/generate"),
        ({"content-type": json_type, "content-encoding": "gzip"}, "/generate"),
        ({}, "/v1/completions"),
    ):
        answer = client.post(path, content=body, headers=headers)
        assert answer.status_code == 415 and ("application/json" in answer.text or "content-encoding" in headers)
    assert client.post("/generate", content=body, headers={"content-type": json_type}).status_code == 200


def test_a_body_past_the_limit_is_413_whether_or_not_it_says_its_length(tiny_target):
    body, json_type = json.dumps({"inputs": "z" * 2000}).encode(), {"content-type": "application/json"}
    with TestClient(create_app(Engine(tiny_target), limits=Limits(max_body_bytes=1000))) as client:
        parts = iter([body[:600], body[600:]])
        for path, content in (("/generate", body), ("/generate", parts), ("/v1/completions", body)):
            answer = client.post(path, content=content, headers=json_type)
            assert answer.status_code == 413 and "1000" in answer.text
        assert ask(client, "short", max_new_tokens=2).status_code == 200


def test_a_length_past_the_limit_is_413_before_anything_is_read(tiny_target, monkeypatch):
    # longer than the sockets here wait: an answer that came after it would come too late, on any machine
    monkeypatch.setattr("serving.api.middleware._READ_ON_SECONDS", 60)
    app = create_app(Engine(tiny_target), limits=Limits(max_body_bytes=1000))
    head = "POST {} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n"
    with live(app) as url:
        address = ("127.0.0.1", int(url.rsplit(":")[-1]))
        for path, length in (("/generate", 1001), ("/v1/completions", 10**15), ("/generate", 10**19)):
            with socket.create_connection(address, timeout=30) as client:
                client.sendall(head.format(path, length).encode())
                assert client.recv(12) == b"HTTP/1.1 413"
        with socket.create_connection(address, timeout=30) as client:  # one that sends on is let finish, to a degree
            client.sendall(head.format("/generate", 9000).encode() + b"z" * 4500)
            told = client.recv(12)
            client.sendall(b"z" * 4500)
            client.shutdown(socket.SHUT_WR)
            told += b"".join(iter(lambda: client.recv(4096), b""))
        assert told.startswith(b"HTTP/1.1 413") and b"1000 bytes" in told


def test_a_body_that_does_not_come_is_408(tiny_target):
    app = create_app(Engine(tiny_target), limits=Limits(body_seconds=0.1))

    async def slowly():
        yield b'{"inputs":'
        await asyncio.sleep(30)

    async def conversation(client):
        paths, headers = ("/generate", "/v1/completions", "/v1/chat/completions"), {"content-type": "application/json"}
        return [await client.post(path, content=slowly(), headers=headers) for path in paths]

    for answer in in_process(app, conversation):
        assert answer.status_code == 408 and "0.1 seconds" in answer.text


def test_a_prompt_of_no_tokens_is_refused(tiny_target):
    """As of blanks, where a tokenizer strips them."""
    target = Target("blanks", tiny_target.model, byte_tokenizer())
    target.tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    target.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with TestClient(create_app(Engine(target))) as client:
        for path, body, field in (
            ("/generate", {"inputs": " "}, "inputs"),
            ("/generate_stream", {"inputs": " ", "parameters": {"chat": True}}, "inputs"),
            ("/tokenize", {"inputs": "\n"}, "inputs"),
            ("/v1/completions", {"prompt": " "}, "prompt"),
            ("/v1/completions", {"prompt": ["a", " "]}, "prompt"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": " "}]}, "messages"),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == (400 if "v1" in path else 422), answer.text
            assert f"`{field}`" in answer.text and "at least 1 token" in answer.text
        assert ask(client, " a", max_new_tokens=1).status_code == 200


def test_a_prompt_too_long_for_any_context_is_not_tokenised(tiny_target, monkeypatch):
    app = create_app(Engine(tiny_target))
    monkeypatch.setattr(app.state.service._encoder, "submit", None)  # never called
    with TestClient(app, raise_server_exceptions=False) as client:
        for path, body in (("/generate", {"inputs": "z" * 100_000}), ("/v1/completions", {"prompt": "z" * 100_000})):
            answer = client.post(path, json=body)
            assert answer.status_code in (400, 422) and "100000 characters" in answer.text and "512" in answer.text


def test_truncate_keeps_the_end_of_the_inputs_and_reads_no_more_than_the_context(client, monkeypatch):
    expected = ask(client, PROMPT, max_new_tokens=3).json()
    long = "z" * 100_000 + PROMPT
    tokens = len(client.post("/tokenize", json={"inputs": PROMPT}).json())
    assert ask(client, long, max_new_tokens=3, truncate=tokens).json() == expected
    read: list[int] = []
    encoder = client.app.state.service._encoder
    inner = encoder.submit

    def counting(work):
        read.append(len(work.args[0]))
        return inner(work)

    monkeypatch.setattr(encoder, "submit", counting)
    assert ask(client, "z" * 1_900_000, max_new_tokens=1, truncate=1).status_code == 200
    assert len(read) == 1 and 512 <= read[0] < 20_000


def test_log_lines_are_json_with_the_request_s_id_and_without_its_prompt(client, log_lines):
    answer = ask(client, max_new_tokens=2)
    refused = ask(client, max_new_tokens=0)
    client.get("/health")
    lines = [line for line in log_lines() if "request_id" in line]  # the engine may find its random head broken, too
    assert [line["request_id"] for line in lines] == [answer.headers["x-request-id"], refused.headers["x-request-id"]]
    assert (lines[0]["method"], lines[0]["path"], lines[0]["status"]) == ("POST", "/generate", 200)
    assert lines[0]["generated_tokens"] == 2 and lines[0]["prompt_tokens"] > 10 and lines[1]["status"] == 422
    assert "zebras" not in str(lines)


def test_what_nobody_expected_tells_nothing_and_is_not_asked_for_again(tiny_target, monkeypatch, caplog):
    app = create_app(Engine(tiny_target))
    monkeypatch.setattr(app.state.service, "check_open", lambda: 1 / 0)
    with TestClient(app, raise_server_exceptions=False) as client:
        for path, body in (("/generate", {"inputs": "a"}), ("/v1/completions", {"prompt": "a"})):
            answer = client.post(path, json=body)
            assert answer.status_code == 500 and answer.headers["x-should-retry"] == "false"
            assert "division" not in answer.text and "division" in caplog.text


def test_metrics_under_another_prefix_are_vllm_s(tiny_target, tiny_head):
    engine = Engine(tiny_target, tiny_head, speculation="chain")
    with TestClient(create_app(engine, metrics_prefix="vllm")) as client:
        ask(client, max_new_tokens=20)
        text = client.get("/metrics").text
    names = [
        "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
        "num_requests_running", "kv_cache_usage_perc", "generation_tokens_total", "time_to_first_token_seconds_count",
    ]  # fmt: skip
    for name in names:
        assert f'\nvllm:{name}{{engine="0",model_name="tiny"}} ' in text
    assert 'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="4"} ' in text
    # as `vllm bench serve` reads them
    read = [line for line in text.splitlines() if line.startswith("vllm:spec_decode_num_drafts")]
    assert len(read) == 1 and float(read[0].split()[-1]) > 0
    assert "draftsmith:" not in text and "_created" not in text
