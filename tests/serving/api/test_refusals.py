"""Refusals of every surface: by name, with the value and the limit, and with little of the request."""

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from http_testing import MESSAGES, PROMPT, ask

ANSWERED = {"role": "assistant", "content": "A zebra.", "refusal": None, "annotations": [], "audio": None,
            "function_call": None, "tool_calls": None}  # fmt: skip
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
# path -> rows of a field, its value, and a part of the message
REFUSED: dict[str, list[tuple[str, Any, str]]] = {
    "/generate": [
        ("max_new_tokens", 10**4000, "512"),
        ("max_new_tokens", "12", "'12'"),
        ("max_new_tokens", True, "True"),
        ("temperature", 999999, "100"),
        ("top_p", 0, "greater than 0"),
        ("stop", ["a\0"], "NUL"),
        ("truncate", 512, "512"),
        ("speculative", {"depth": 3}, "not permitted"),
        ("min_p", 0.1, "not permitted"),
        ("best_of", True, "not implemented"),
    ],
    "/v1/completions": [
        ("n", 5_000_000, "64"),
        ("temperature", 10**400, "temperature"),
        ("logit_bias", {"259": 1}, "258"),
        ("logit_bias", {"01": 1}, "token ids"),
        ("min_tokens", 13, "12"),
        ("max_tokens", 10**9, "512"),
        ("best_of", 2, "not implemented"),
        ("prompt", [[]], "prompt"),
        ("prompt", [1] * 513, "513"),
        ("skip_special_tokens", False, "not implemented"),
        ("stream_options", {"include_usage": True}, "stream"),
        ("speculative", {"origin": True}, "origin"),
    ],
    "/v1/chat/completions": [
        ("messages", [], "at least 1"),
        ("messages.0.role", [{"role": "wizard", "content": "a"}], "user"),
        ("messages.0.content", [IMAGE], "valid"),
        ("messages.0.content", [{"role": "user", "content": ""}], "at least 1"),
        ("messages.1.tool_calls", [*MESSAGES, ANSWERED | {"tool_calls": [{"id": "a"}]}, *MESSAGES], "not implemented"),
        ("messages", [{"role": "user", "content": "z" * 600}], "512"),
        ("top_logprobs", 2, "needs `logprobs`"),
        ("max_completion_tokens", 4, "two names"),
        ("max_tokens", 10**6, "512"),
        ("tools", [{"type": "function", "function": {"name": "f"}}], "not implemented"),
    ],
}
# of these the limits are the tiny target's
OWN = [("logit_bias", {"259": 1}), ("messages", [{"role": "user", "content": "z" * 600}])]
ROWS = [
    pytest.param(path, *row, marks=() if row[:2] in OWN else pytest.mark.contract)
    for path, rows in REFUSED.items()
    for row in rows
]


@pytest.mark.parametrize(("path", "field", "value", "reason"), ROWS, ids=lambda value: str(value)[:30])
def test_a_wrong_value_is_refused_by_name(client, path, field, value, reason):
    fields, name = {field.split(".")[0]: value}, field.rsplit(".")[-1]
    if path == "/generate":
        answer = ask(client, **fields)
        error = answer.json()
        assert (answer.status_code, error["error_type"]) == (422, "validation") and len(error) == 2
        message = error["error"]
    else:
        body = {"messages": MESSAGES, "max_tokens": 3} if "chat" in path else {"prompt": PROMPT, "max_tokens": 12}
        answer = client.post(path, json=body | fields)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), answer.text
        assert error.keys() == {"message", "type", "param", "code"}
        message = error["message"]
        assert error["param"].startswith(field) or (field, error["param"]) == ("max_completion_tokens", "max_tokens")
    assert name in message and reason in message and len(message) <= 500 and "zebras" not in answer.text


DEEP = b'{"inputs": "a", "parameters": {"grammar": ' + b"[" * 63 + b"]" * 63 + b"}}"
REFUSED_BODIES = [
    ("/generate", b"not json", 422, "valid JSON"),
    ("/v1/completions", b"[]", 400, "JSON object"),
    ("/v1/completions", b"", 400, "JSON object"),
    ("/generate", b'{"inputs": "\x80"}', 400, "UTF-8"),
    ("/generate", '{"inputs": "a"}'.encode("utf-16"), 400, "UTF-8"),
    ("/generate", b'{"inputs": "a"}\0', 400, "NUL"),
    ("/generate", b'{"inputs": "\\ud800"}', 422, "surrogates"),
    ("/generate", b'{"inputs": "a", "parameters": {"temperature": NaN}}', 422, "finite"),
    ("/generate", b'{"inputs": "a", "parameters": {"max_new_tokens": ' + b"9" * 5000 + b"}}", 400, ""),
    ("/generate", b'["' + b'\\"[' * 300_000, 422, "valid JSON"),  # an endless string full of brackets
    ("/generate", b"[" * 1_000_000, 400, "64 levels"),
    ("/generate", DEEP, 400, "64 levels"),
    ("/generate", b"[" + b"[]," * 500_000 + b"[]]", 422, "JSON object"),
]


@pytest.mark.contract
@pytest.mark.parametrize(("path", "body", "status", "reason"), REFUSED_BODIES, ids=lambda value: repr(value)[:50])
def test_a_bad_body_is_refused_and_the_server_lives(client, path, body, status, reason):
    answer = client.post(path, content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    message = error["message"] if "v1" in path else error
    assert answer.status_code == status and reason in message and len(message) <= 500, answer.text
    assert ask(client, max_new_tokens=1).status_code == 200


@pytest.mark.contract
def test_a_secret_in_the_wrong_place_is_not_repeated(client):
    for body in ({"inputs": {"zebras": "zebras"}}, {"inputs": "a", "parameters": {"prompt": "zebras"}}, ["zebras"]):
        answer = client.post("/generate", json=body)
        assert answer.status_code == 422 and "'zebras'" not in answer.text


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
def test_a_body_wrong_throughout_is_not_reported_throughout(client, path, body, monkeypatch):
    """An error for each of its parts would take the server seconds, and nobody else would be answered."""
    counts: list[int] = []
    inner = RequestValidationError.__init__

    def counting(self, errors, **options):
        counts.append(len(errors))
        inner(self, errors, **options)

    monkeypatch.setattr(RequestValidationError, "__init__", counting)
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 422) and len(answer.content) < 1000
    assert len(counts) == 1 and counts[0] <= 20


@pytest.mark.parametrize(
    "refusing",
    ["{{ raise_exception('roles of /home/someone must alternate') }}", "{{ messages[0]['content'] + 1 }}"],
)
def test_a_template_that_refuses_is_400_without_its_words(client, tiny_target, monkeypatch, refusing):
    monkeypatch.setattr(tiny_target.tokenizer, "chat_template", refusing)
    answer = client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
    assert "someone" not in answer.text


def test_a_template_that_leaves_out_what_users_say_is_400(client, tiny_target, monkeypatch):
    monkeypatch.setattr(tiny_target.tokenizer, "chat_template", "{{ messages | length }}")
    answer = client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert answer.status_code == 400 and "leaves out what a user says" in answer.json()["error"]["message"]
    monkeypatch.setattr(tiny_target.tokenizer, "chat_template", "{% if %}")
    answer = client.post("/generate", json={"inputs": PROMPT, "parameters": {"chat": True}})
    assert answer.status_code == 422 and "no Jinja template" in answer.json()["error"]


def test_developers_messages_are_system_prompts_where_the_template_does_not_know_them(client, tiny_target, monkeypatch):
    def read(role):
        body = {"messages": [{"role": role, "content": "Be terse."}, *MESSAGES], "max_tokens": 1}
        answer = client.post("/v1/chat/completions", json={**body, "return_token_ids": True})
        return tiny_target.tokenizer.decode(answer.json()["prompt_token_ids"])

    assert "<|im_start|>system\nBe terse." in read("developer") == read("system")
    knowing = tiny_target.tokenizer.chat_template + "{# developer #}"
    monkeypatch.setattr(tiny_target.tokenizer, "chat_template", knowing)
    assert "<|im_start|>developer\nBe terse." in read("developer")
