"""/openapi.json promises what the server does: schemathesis as outsiders run it, and rules that random bodies miss."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from conftest import make_tiny_target
from fastapi import FastAPI
from fastapi.testclient import TestClient
from http_testing import live

from serving.api.app import create_app
from serving.api.bounds import up_to
from serving.api.middleware import Limits
from serving.engine import Engine

MESSAGES = [{"role": "user", "content": "a"}]


def make_app() -> FastAPI:
    """A server whose answers have two tokens at most: generated bodies ask for as much as they may."""
    return create_app(Engine(make_tiny_target(max_length=2048), max_batch=16), limits=Limits(max_new_tokens=2))


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(make_app()) as client:
        yield client


def test_schemathesis_finds_nothing(tmp_path) -> None:
    """Its default checks and phases: statuses, bodies, headers, methods, what is taken and what is refused."""
    with live(make_app()) as url:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--no-color"]
        limits = ["--max-examples", "3", "--seed", "1"]
        run = subprocess.run([*command, *limits], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "No issues found" in run.stdout, run.stdout[-5000:]
    assert "13 selected" in run.stdout


PROMPT, CHAT, TEXT = "/v1/completions", "/v1/chat/completions", "/generate"
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    (PROMPT, {"prompt": "a", "n": 5, "max_tokens": 1}),
    (PROMPT, {"prompt": ["a"] * 21, "n": 1}),
    (PROMPT, {"prompt": [3] * 40, "n": 2}),  # one prompt
    (PROMPT, {"prompt": [[3], [4]], "n": 2.0, "max_tokens": 2.0, "min_tokens": 1}),
    (PROMPT, {"prompt": "a", "best_of": 1, "echo": True, "logprobs": None}),
    (PROMPT, {"prompt": "a", "logprobs": 3, "echo": False, "seed": 2**63 - 1}),
    (PROMPT, {"prompt": "a", "logit_bias": {"258": 1, "0": -1.0}, "stop_token_ids": [258]}),
    (PROMPT, {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}),
    (
        CHAT,
        {"messages": MESSAGES, "logprobs": False, "top_logprobs": 0, "max_tokens": None, "max_completion_tokens": 2},
    ),
    (TEXT, {"inputs": "a", "parameters": {"max_new_tokens": 2, "typical_p": 1.0, "best_of": 1, "watermark": False}}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    (PROMPT, {"prompt": ["a", "b"], "n": 33}),
    (PROMPT, {"prompt": [[3]] * 17, "n": 4}),
    (PROMPT, {"prompt": "a", "max_tokens": 3}),
    (PROMPT, {"prompt": "a", "min_tokens": 3}),
    (PROMPT, {"prompt": [259]}),
    (PROMPT, {"prompt": [3] * 2048}),
    (PROMPT, {"prompt": "a", "best_of": 1, "n": 2}),
    (PROMPT, {"prompt": "a", "echo": True, "logprobs": 0}),
    (PROMPT, {"prompt": "a", "logit_bias": {"259": 1}}),
    (PROMPT, {"prompt": "a", "logit_bias": {"01": 1}}),
    (PROMPT, {"prompt": "a", "stop_token_ids": [259]}),
    (PROMPT, {"prompt": "a", "seed": 2**63}),
    (PROMPT, {"prompt": "a", "stream_options": {"include_usage": True}}),
    (PROMPT, {"prompt": "a", "n": 1.5}),
    (PROMPT, {"prompt": "a", "stream": 1.0}),
    (CHAT, {"messages": MESSAGES, "top_logprobs": 2}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 1}),
    (TEXT, {"inputs": "a", "parameters": {"max_new_tokens": 3}}),
    (TEXT, {"inputs": "a", "parameters": {"typical_p": 0.5}}),
]


def promised(client: TestClient, path: str, body: dict[str, Any]) -> bool:
    """Whether the schema says that the body is taken."""
    schema = client.get("/openapi.json").json()
    wanted = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return jsonschema_rs.Draft202012Validator({**wanted, "components": schema["components"]}).is_valid(body)


@pytest.mark.parametrize(("path", "body"), ACCEPTED, ids=lambda value: str(value)[:60])
def test_what_is_promised_is_taken(client, path, body) -> None:
    assert promised(client, path, body) and client.post(path, json=body).status_code == 200


@pytest.mark.parametrize(("path", "body"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_refused_is_not_promised(client, path, body) -> None:
    assert not promised(client, path, body) and client.post(path, json=body).status_code in (400, 422)


def test_every_model_that_is_a_body_has_an_example_that_is_taken(client) -> None:
    schema = client.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        if "post" in methods:
            body = methods["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            [example] = schema["components"]["schemas"][body]["examples"]
            assert client.post(path, json=example).status_code == 200, path


def test_the_schema_has_the_limits_once_the_model_is_there(tiny_target) -> None:
    app = create_app(None)

    def limit(client: TestClient) -> dict[str, Any]:
        fields = client.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]["properties"]
        return fields["max_tokens"]["anyOf"][0]

    with TestClient(app) as client:
        assert "maximum" not in limit(client)
        app.state.service.attach(Engine(tiny_target))
        assert limit(client)["maximum"] == tiny_target.max_length - 1


@pytest.mark.parametrize("limit", [0, 7, 9, 10, 99, 100, 258, 1000, 1234])
def test_numbers_up_to_a_limit(limit) -> None:
    matching = jsonschema_rs.Draft202012Validator({"pattern": up_to(limit)})
    for number in [*range(1500), 10 * limit + 1]:
        assert matching.is_valid(str(number)) == (number <= limit), number
    assert not any(matching.is_valid(text) for text in ("", "00", "01", "-1", "1.0", " 1"))
