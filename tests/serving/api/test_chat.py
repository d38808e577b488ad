"""Conversations on OpenAI's surface: which messages are taken, and what is refused of them."""

from __future__ import annotations

from typing import Any

import pytest
from http_testing import MESSAGES, complete

ANSWERED = {"role": "assistant", "content": "A zebra.", "refusal": None, "annotations": [], "audio": None,
            "function_call": None, "tool_calls": None}  # fmt: skip
VARIANTS = [
    ANSWERED,
    ANSWERED
    | {
        "tool_calls": [],
        "reasoning": None,
        "reasoning_content": "",
        "tool_call_id": None,
        "name": None,
        "parsed": None,
    },
    {"role": "assistant", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "zebra."}]},
]


@pytest.mark.parametrize("message", VARIANTS, ids=lambda message: str(len(message)))
def test_an_answer_s_message_is_taken_with_all_that_is_null_or_empty_in_it(client, message) -> None:
    def follow_up(message: dict[str, Any]) -> list[Any]:
        messages = [*MESSAGES, message, {"role": "user", "content": "More!"}]
        return complete(client, "chat/completions", messages=messages)["choices"]

    assert follow_up(message) == follow_up({"role": "assistant", "content": "A zebra."})
    nothing = {"role": "assistant", "content": ""}
    assert follow_up({"role": "assistant", "content": None}) == follow_up(nothing) == follow_up({"role": "assistant"})


REFUSED_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content"),
    ({"messages": [*MESSAGES, ANSWERED | {"tool_calls": [{"id": "a"}]}, *MESSAGES]}, "messages.1.tool_calls"),
    ({"messages": [{"role": "user", "content": "z" * 600}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED_CHATS, ids=lambda value: str(value)[:40])
def test_a_bad_chat_is_400_with_its_param(client, body, param) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": MESSAGES, **body})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].startswith(param), answer.text
    assert f"`{param.rsplit('.')[-1]}" in error["message"] or f"`{param}" in error["message"]


@pytest.mark.parametrize(
    "refusing",
    [
        "{{ raise_exception('roles of /home/someone must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",  # a TypeError
        "{{ {}.pop('someone') }}",  # a KeyError
    ],
)
def test_a_template_that_refuses_is_400_without_its_words(client, tiny_target, monkeypatch, refusing) -> None:
    monkeypatch.setattr(tiny_target.tokenizer, "chat_template", refusing)
    answer = client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
    assert "someone" not in answer.text
