"""What /generate refuses, by name, with the value and the limit."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from http_testing import ask

REFUSED_PARAMETERS = [
    ("max_new_tokens", 0, "1"),
    ("max_new_tokens", -5, "-5"),
    ("max_new_tokens", 10**30, "512"),
    ("max_new_tokens", 10**4000, "512"),
    ("max_new_tokens", 2.5, "2.5"),
    ("max_new_tokens", "12", "'12'"),
    ("max_new_tokens", True, "True"),
    ("temperature", -0.1, "-0.1"),
    ("temperature", 999999, "100"),
    ("temperature", "hot", "'hot'"),
    ("temperature", 10**400, "temperature"),
    ("repetition_penalty", 10**400, "repetition_penalty"),
    ("frequency_penalty", -(10**400), "frequency_penalty"),
    ("temperature", [1], "number"),
    ("top_p", 0, "greater than 0"),
    ("top_p", 1.01, "1.01"),
    ("top_p", -1, "-1"),
    ("top_k", 0, "1"),
    ("top_k", -1, "-1"),
    ("seed", -1, "-1"),
    ("seed", 2**64, str(2**63)),
    ("stop", "word", "list"),
    ("stop", [""], "1 character"),
    ("stop", ["x" * 257], "256"),
    ("stop", ["x"] * 17, "16"),
    ("stop", ["a\0"], "NUL"),
    ("stop", [3], "string"),
    ("do_sample", "yes", "boolean"),
    ("details", 1, "boolean"),
    ("return_full_text", {}, "boolean"),
    ("speculative", True, "dictionary"),
    ("speculative.enabled", "on", "boolean"),
    ("speculative.num_tokens", -1, "-1"),
    ("speculative.rule", "guess", "rejection"),
    ("speculative.depth", 3, "not permitted"),
    ("speculative.origin", 1, "boolean"),
    ("repetition_penalty", 0, "greater than 0"),
    ("repetition_penalty", -1.5, "-1.5"),
    ("frequency_penalty", 2.5, "2.5"),
    ("top_n_tokens", 1_000_000_000, "5"),
    ("truncate", 0, "1"),
    ("truncate", 512, "512"),
    ("truncate", 10**9, "512"),
    ("best_of", 2, "not implemented"),
    ("best_of", True, "not implemented"),
    ("typical_p", 0.9, "not implemented"),
    ("watermark", True, "not implemented"),
    ("decoder_input_details", True, "not implemented"),
    ("grammar", {"type": "json", "value": {}}, "not implemented"),
    ("adapter_id", "mine", "not implemented"),
    ("max_tokens", 5, "not permitted"),
    ("min_p", 0.1, "not permitted"),
]


@pytest.mark.parametrize(("field", "value", "told"), REFUSED_PARAMETERS, ids=lambda value: str(value)[:30])
def test_a_bad_parameter_is_refused_by_name(client, field, value, told) -> None:
    outer, _, inner = field.partition(".")
    answer = ask(client, **{outer: {inner: value} if inner else value})
    assert answer.status_code == 422, answer.text
    body = answer.json()
    assert body.keys() == {"error", "error_type"} and body["error_type"] == "validation"
    assert field in body["error"] and told in body["error"]
    assert len(body["error"]) <= 500 and "zebras" not in body["error"]


REFUSED_BODIES = [
    (b"", 422),
    (b"{", 422),
    (b"not json", 422),
    (b'{"inputs": "\x80"}', 400),
    (b"[]", 422),
    (b'"text"', 422),
    (b"null", 422),
    (b"{}", 422),
    (b'{"inputs": ""}', 422),
    (b'{"inputs": null}', 422),
    (b'{"inputs": 5}', 422),
    (b'{"inputs": ["a", "b"]}', 422),
    (b'{"inputs": "a\\u0000b"}', 422),
    (b'{"inputs": "\\ud800"}', 422),
    (b'{"inputs": "\\ude00\\ud83d"}', 422),
    (b'{"inputs": "a", "parameters": []}', 422),
    (b'{"inputs": "a", "parameters": {"stop": ["\\udfff"]}}', 422),
    (b'{"inputs": "a", "parameters": {"\\ud800": 1}}', 422),
    (b'{"inputs": "a", "parameters": {"temperature": NaN}}', 422),
    (b'{"inputs": "a", "parameters": {"temperature": Infinity}}', 422),
    (b'{"inputs": "a", "parameters": {"top_p": -Infinity}}', 422),
    (b'{"inputs": "a", "parameters": {"temperature": 1e400}}', 422),
    (b'{"inputs": "a", "parameters": {"max_new_tokens": 1e3}}', 422),
    (b'{"inputs": "a", "parameters": {"max_new_tokens": ' + b"9" * 5000 + b"}}", 400),
    (b'{"inputs": "a", "stream": 1}', 422),
    (b'{"inputs": "a", "parameters": {"seed": 1, "seed": NaN}}', 422),
    ('{"inputs": "a"}'.encode("utf-16"), 400),
    (b'{"inputs": "a"}\0', 400),
    (b'{"inputs": "\\\\", "parameters": ' + b'{"a":' * 64 + b"1" + b"}" * 65, 400),
    (b'["' + b'\\"[' * 300_000, 422),  # an endless string full of brackets: not deep, and not slow
    (b'"\\', 422),
    (b'{"prompt": "a secretive prompt about zebras"}', 422),
    (b'{"inputs": "a", "model": "m"}', 422),
    (b"[" * 100_000, 400),
    (b'{"inputs": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, 400),
    (b'{"inputs": "a", "parameters": {"grammar": ' + b"[" * 900 + b"]" * 900 + b"}}", 400),
    (b'{"inputs": "a", "parameters": {"grammar": ' + b"[" * 60 + b"]" * 60 + b"}}", 422),
    (b"[" + b"[]," * 100_000 + b"[]]", 400),
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


def test_many_problems_are_told_three_at_most(client) -> None:
    answer = ask(client, **{f"unknown_{'x' * 300}_{index}": 1 for index in range(1000)})
    assert answer.status_code == 422 and len(answer.content) < 700


ENDLESS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": [0] * 900_000}),
    ("/generate", {"inputs": "a", "parameters": {"stop": [0] * 900_000}}),
    ("/generate", {"inputs": "a"} | {f"{index}": 0 for index in range(150_000)}),
    ("/generate", {"inputs": "a", "parameters": {f"{index}": 0 for index in range(150_000)}}),
    ("/v1/completions", {"prompt": [-1] * 600_000}),
    ("/v1/completions", {"prompt": [[-1] * 600_000]}),
    ("/v1/completions", {"prompt": [[-1]] * 90_000}),
    ("/v1/completions", {"prompt": [None] * 300_000}),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [-1] * 600_000}),
    ("/v1/completions", {"prompt": "a", "logit_bias": {f"{index}": "x" for index in range(120_000)}}),
    ("/v1/chat/completions", {"messages": [0] * 900_000}),
    ("/v1/chat/completions", {"messages": [0] * 4096}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [0] * 1024}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [0] * 900_000}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 90_000}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a", **{f"{i}": 0 for i in range(150_000)}}]}),
]


@pytest.mark.parametrize(("path", "body"), ENDLESS, ids=lambda value: str(value)[:40])
def test_a_body_wrong_throughout_is_not_reported_throughout(client, path, body, monkeypatch) -> None:
    """An error for each of its parts would take the server seconds, and nobody else would be answered."""
    told: list[int] = []
    inner = RequestValidationError.__init__

    def counting(self: RequestValidationError, errors: Any, **options: Any) -> None:
        told.append(len(errors))
        inner(self, errors, **options)

    monkeypatch.setattr(RequestValidationError, "__init__", counting)
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 422) and len(answer.content) < 1000
    assert len(told) == 1 and told[0] <= 20


def test_tiny_and_large_temperatures_still_answer(client) -> None:
    greedy = ask(client).json()
    for temperature in (5e-324, 1e-30, 1e-3):
        assert ask(client, temperature=temperature, seed=1).json() == greedy
    assert ask(client, temperature=100.0).status_code == 200


def test_only_json_is_taken_and_the_way_out_is_named(client) -> None:
    for headers in ({"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        answer = client.post("/generate", content=b'{"inputs": "a"}', headers=headers)
        assert answer.status_code == 415 and "application/json" in answer.json()["error"]
