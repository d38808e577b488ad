"""Refusals of /generate, by name, with the value and the limit."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from http_testing import ask

REFUSED_PARAMETERS = [
    ("max_new_tokens", 10**4000, "512"),
    ("max_new_tokens", "12", "'12'"),
    ("max_new_tokens", True, "True"),
    ("temperature", 999999, "100"),
    ("top_p", 0, "greater than 0"),
    ("stop", ["a\0"], "NUL"),
    ("truncate", 512, "512"),
    ("speculative.depth", 3, "not permitted"),
    ("min_p", 0.1, "not permitted"),
    ("watermark", True, "not implemented"),
    ("best_of", True, "not implemented"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED_PARAMETERS, ids=lambda value: str(value)[:30])
def test_a_bad_parameter_is_refused_by_name(client, field, value, message) -> None:
    outer, _, inner = field.partition(".")
    answer = ask(client, **{outer: {inner: value} if inner else value})
    assert answer.status_code == 422, answer.text
    body = answer.json()
    assert body.keys() == {"error", "error_type"} and body["error_type"] == "validation"
    assert field in body["error"] and message in body["error"]
    assert len(body["error"]) <= 500 and "zebras" not in body["error"]


REFUSED_BODIES = [
    (b"not json", 422),
    (b"null", 422),
    (b'{"inputs": "\x80"}', 400),
    ('{"inputs": "a"}'.encode("utf-16"), 400),
    (b'{"inputs": "a"}\0', 400),
    (b'{"inputs": "\\ud800"}', 422),
    (b'{"inputs": "a", "parameters": {"temperature": NaN}}', 422),
    (b'{"inputs": "a", "parameters": {"max_new_tokens": ' + b"9" * 5000 + b"}}", 400),
    (b'["' + b'\\"[' * 300_000, 422),  # an endless string full of brackets
    (b"[" * 1_000_000, 400),  # deeper than Python's parser goes
    (b'{"inputs": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, 400),
    (b'{"inputs": "a", "parameters": {"grammar": ' + b"[" * 900 + b"]" * 900 + b"}}", 422),
    (b"[" + b"[]," * 500_000 + b"[]]", 422),
]


@pytest.mark.parametrize(("body", "status"), REFUSED_BODIES, ids=lambda value: repr(value)[:50])
def test_a_bad_body_is_refused_and_the_server_lives(client, body, status) -> None:
    answer = client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["error_type"] == "validation"
    assert len(answer.json()["error"]) <= 500 and "zebras" not in answer.text
    assert ask(client, max_new_tokens=1).status_code == 200


def test_a_secret_in_the_wrong_place_is_not_repeated(client) -> None:
    for body in ({"inputs": {"zebras": "zebras"}}, {"inputs": "a", "parameters": {"prompt": "zebras"}}, ["zebras"]):
        answer = client.post("/generate", json=body)
        assert answer.status_code == 422
        assert "'zebras'" not in answer.text


def test_many_problems_are_reported_three_at_most(client) -> None:
    answer = ask(client, **{f"unknown_{'x' * 300}_{index}": 1 for index in range(1000)})
    assert answer.status_code == 422 and len(answer.content) < 700


ENDLESS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "a", "parameters": {"stop": [0] * 600_000}}),
    ("/generate", {"inputs": "a", "parameters": {f"{index}": 0 for index in range(150_000)}}),
    ("/v1/completions", {"prompt": [-1] * 600_000}),
    ("/v1/completions", {"prompt": [[-1]] * 90_000}),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [-1] * 600_000}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {f"{index}": "x" for index in range(120_000)}}),
    ("/v1/chat/completions", {"messages": [0] * 4096}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 90_000}]}),
]


@pytest.mark.parametrize(("path", "body"), ENDLESS, ids=lambda value: str(value)[:40])
def test_a_body_wrong_throughout_is_not_reported_throughout(client, path, body, monkeypatch) -> None:
    """An error for each of its parts would take the server seconds, and nobody else would be answered."""
    counts: list[int] = []
    inner = RequestValidationError.__init__

    def counting(self: RequestValidationError, errors: Any, **options: Any) -> None:
        counts.append(len(errors))
        inner(self, errors, **options)

    monkeypatch.setattr(RequestValidationError, "__init__", counting)
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 422) and len(answer.content) < 1000
    assert len(counts) == 1 and counts[0] <= 20


def test_tiny_and_large_temperatures_still_answer(client) -> None:
    greedy = ask(client).json()
    for temperature in (5e-324, 1e-30, 1e-3):
        assert ask(client, temperature=temperature, seed=1).json() == greedy
    assert ask(client, temperature=100.0).status_code == 200
