"""A server upstream that is slow, full, gone, back again, or another one than expected."""

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from http_testing import PROMPT, GatedEngine, ask, events, eventually, idle, live, metric

from draft.errors import UserError
from draft.target import TextTarget
from serving.api.app import create_app
from serving.backend import Unavailable
from serving.engine import Engine, SamplingParams
from serving.upstream import Upstream, connection, load_upstream
from serving.upstream.dialects import BadAnswer


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "_LEAST_RETRY", 0.02)
    monkeypatch.setattr(connection, "_MOST_RETRY", 0.1)
    monkeypatch.setattr(connection, "_TRIES_AGAIN", 0)


@contextmanager
def gateway_to(url: str, texts: TextTarget, **options: Any) -> Iterator[str]:
    """The gateway on a port of its own."""
    upstream = Upstream(url, texts, poll_seconds=0.3, **options)
    upstream.connect()
    with live(create_app(upstream)) as address:
        yield address


@pytest.fixture
def gated(tiny_target, tiny_head):
    """An engine of one slot and a queue of one, whose gate is open for the gateway's first contact."""
    engine = GatedEngine(tiny_target, tiny_head, speculation="chain", max_batch=1, max_waiting=1)
    engine.gate.set()
    return engine


def params_of(tokens: int) -> SamplingParams:
    return SamplingParams(tokens, ignore_eos=True)


LONG = {"inputs": PROMPT, "parameters": {"max_new_tokens": 400, "stop": ["\u2603"]}}
SHORT = {"inputs": PROMPT, "parameters": {"max_new_tokens": 12}}


@pytest.mark.parametrize("path", ["/generate_stream", "/generate"])
def test_a_client_that_leaves_ends_the_request_upstream(gated, texts, path):
    with live(create_app(gated)) as url, gateway_to(url, texts) as address:
        if path == "/generate_stream":
            with httpx.stream("POST", f"{address}{path}", json=LONG, timeout=60) as answer:
                parts = answer.iter_text()
                assert next(parts).startswith("data:")  # before the answer's end: token by token
                gated.gate.clear()
                assert gated.running == 1
        else:
            gated.gate.clear()
            host, port = address.removeprefix("http://").split(":")
            body = json.dumps(LONG).encode()
            head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            with socket.create_connection((host, int(port))) as client:
                client.sendall(head.encode() + b"\r\n\r\n" + body)
                eventually(lambda: gated.running == 1)
        eventually(lambda: idle(gated))  # the gate is shut: nothing but the end of its request frees the slot
        about = httpx.get(f"{address}/info", timeout=60).json()["engine"]
        assert (about["running"], about["waiting"]) == (0, 0)


def test_a_full_server_upstream_is_429(gated, texts):
    with live(create_app(gated)) as url, gateway_to(url, texts) as address:
        gated.gate.clear()

        async def conversation() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=address, timeout=60) as client:
                tasks = [asyncio.ensure_future(client.post("/generate", json=SHORT)) for _ in range(2)]
                while gated.running + gated.waiting < 2:
                    await asyncio.sleep(0.002)
                refused = await client.post("/generate", json=SHORT)
                gated.gate.set()
                return [refused, *await asyncio.gather(*tasks)]

        refused, *answers = asyncio.run(conversation())
        assert refused.status_code == 429 and refused.json()["error_type"] == "overloaded"
        assert [answer.status_code for answer in answers] == [200, 200]


def test_no_more_are_passed_on_than_the_gateway_may(gated, texts):
    with live(create_app(gated)) as url:
        upstream = Upstream(url, texts, poll_seconds=0.3, max_requests=2)
        upstream.connect()
        with TestClient(create_app(upstream)) as client:
            gated.gate.clear()
            running = upstream.submit_all([[5, 6]] * 2, [params_of(400)] * 2)
            refused = ask(client)
            assert refused.status_code == 429 and refused.headers["retry-after"]
            for request in running:
                request.cancel()
            eventually(lambda: upstream.running == upstream.waiting == 0)
            gated.gate.set()
            assert ask(client).status_code == 200
            many = client.post("/v1/completions", json={"prompt": "a", "n": 3})
            assert many.status_code == 400 and "<= 2" in many.text


def test_a_failure_upstream_is_the_last_event_and_the_request_is_not_repeated(gated, texts):
    requests = []
    inner = gated.submit_all
    gated.submit_all = lambda *given: requests.append(given) or inner(*given)
    with live(create_app(gated)) as url, gateway_to(url, texts) as address:
        requests.clear()
        with httpx.stream("POST", f"{address}/generate_stream", json=LONG, timeout=60) as answer:
            told = answer.iter_text()
            text = next(told)
            gated.failure = RuntimeError("/home/secret exploded")
            text += "".join(told)
        *tokens, error = events(text)
        assert tokens and all("token" in each for each in tokens)
        assert error == {"error": "Request failed during generation", "error_type": "generation"}
        whole = httpx.post(f"{address}/generate", json=LONG, timeout=60)
        assert whole.status_code == 424 and "secret" not in whole.text
        assert len(requests) == 2


def test_what_an_event_says_decides_whose_fault_it_is():
    """vLLM checks some parameters when its stream has begun; draft-serve ends streams as it ends."""
    refused = connection._failure({"code": 400, "type": "BadRequestError", "message": "min_p is\nnot supported"})
    assert isinstance(refused, UserError) and "min_p is not supported" in str(refused)
    assert isinstance(connection._failure({"type": "unavailable_error", "message": "a"}), Unavailable)
    for error in ({"code": 500, "message": "a"}, "a"):
        assert isinstance(connection._failure(error), BadAnswer)


def test_a_server_that_goes_away_is_503_and_is_found_again(tiny_target, texts):
    def app():
        return create_app(Engine(tiny_target, speculation="off"))

    first = ExitStack()
    url = first.enter_context(live(app()))
    upstream = Upstream(url, texts, poll_seconds=0.3)
    upstream.connect()
    with TestClient(create_app(upstream)) as client:
        before = ask(client).json()
        first.close()
        gone = ask(client)  # whether the gateway has noticed or not
        assert gone.status_code == 503 and int(gone.headers["retry-after"]) >= 1
        assert gone.json()["error_type"] == "unavailable"
        eventually(lambda: client.get("/ready").status_code == 503)
        assert client.get("/ready").json()["error"] == "unavailable" and client.get("/health").status_code == 200
        assert metric(client, "upstream_up") == 0
        with live(app(), port=int(url.rsplit(":", 1)[1])):
            eventually(lambda: client.get("/ready").status_code == 200)
            assert ask(client).json() == before


class Cutting:
    """An app that ends the connection of its next answer after some bytes, or before any."""

    def __init__(self, app: Any) -> None:
        self.app, self.after, self.answers = app, None, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/v1/completions" or self.after is None:
            await self.app(scope, receive, send)
            return
        self.answers += 1
        sent = 0

        async def cut(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent > self.after:
                raise ConnectionAbortedError  # uvicorn closes the connection
            await send(message)

        await self.app(scope, receive, cut)


@pytest.mark.parametrize("after", [0, 2])
def test_a_connection_that_breaks_is_not_tried_again(tiny_target, texts, after):
    """2: the headers and the first events have come."""
    app = Cutting(create_app(Engine(tiny_target, speculation="off")))
    with live(app) as url, gateway_to(url, texts) as address:
        app.after = after
        answer = httpx.post(f"{address}/generate", json=SHORT, timeout=60)
        assert app.answers == 1 and answer.status_code in (424, 503), answer.text
        app.after = None
        assert httpx.post(f"{address}/generate", json=SHORT, timeout=60).status_code == 200


def test_the_end_of_the_gateway_ends_its_requests(gated, texts):
    with live(create_app(gated)) as url:
        upstream = Upstream(url, texts, poll_seconds=0.3)
        upstream.connect()
        gated.gate.clear()
        [request] = upstream.submit_all([[5, 6]], [params_of(40)])
        eventually(lambda: gated.running == 1)
        upstream.close()
        with pytest.raises(Exception, match="ends"):
            request.result(60)
        eventually(lambda: idle(gated))
        assert not upstream.alive


def test_a_request_that_is_cancelled_at_once_ends(upstream):
    for _ in range(20):
        [request] = upstream.submit_all([[5, 6]], [params_of(40)])
        request.cancel()
        assert request.result(60).finish_reason in ("cancelled", "length")


# servers that the gateway does not go before


def answering(**answers: Any) -> Any:
    """An app that answers each path with one JSON value, or a status; vLLM's, but for what is given here."""
    own = {"models": {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 64}]}, "health": 200, "metrics": 404}
    own |= {"completions": {"choices": [{"text": "", "token_ids": [], "prompt_token_ids": []}]}, **answers}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        answer = own[scope["path"].rsplit("/")[-1]]
        status, body = (answer, b"") if isinstance(answer, int) else (200, json.dumps(answer).encode())
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


STRANGERS = {
    "one of vLLM, SGLang, draft-serve": {"models": {"data": [{"id": "m", "owned_by": "someone"}]}},
    "no token ids": {"completions": {"choices": [{"text": "a"}]}},
    "whose tokenizer is not that of --target tiny": {},
    "refuses the key": {"models": 401},
    "has status 404": {"models": 404},
    "no JSON object": {"models": [1]},
}


@pytest.mark.parametrize("sentence", STRANGERS)
def test_a_server_that_cannot_be_used_is_named_in_a_sentence(texts, sentence):
    refused = pytest.raises(UserError, match=re.escape(sentence))
    with live(answering(**STRANGERS[sentence]), lifespan="off") as url, refused:
        Upstream(url, texts).connect()


def test_it_is_waited_for_until_whoever_waits_gives_up(texts):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 2:
            raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        Upstream(f"http://127.0.0.1:{port}", texts).connect(check)
    for url in ("127.0.0.1:8000", "ftp://a", "http://"):
        with pytest.raises(UserError, match="not a URL"):
            Upstream(url, texts)


def test_no_weights_of_the_target_are_read(folders, address, tiny_target):
    """Its folder may be on a machine that could not hold them."""
    weights = folders / "my-target" / "model.safetensors"
    weights.rename(folders / "elsewhere")
    upstream = load_upstream(
        f"{address}/v1/", str(folders / "my-target"), ("my-head", str(folders / "my-head")), key="a-key", max_requests=3
    )
    assert upstream.target.eos_token_ids == tiny_target.eos_token_ids
    with TestClient(create_app(upstream)) as client:
        about = client.get("/info").json()
        shape = {"name": "my-head", "architecture": "LlamaForCausalLMEagle3", "draft_vocab_size": 200}
        assert about["head"] == {**shape, "self_check": None, "degraded": None}
        assert (about["architecture"], about["model_id"]) == ("LlamaForCausalLM", "my-target")
        assert about["limits"]["max_concurrent_requests"] == 3 and ask(client).status_code == 200
