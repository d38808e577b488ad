"""Servers that take answers apart: what they return becomes the text that the template writes, or no row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_target
from fastapi import FastAPI, Request, Response
from http_testing import live
from written_data import rows_of

from draft.data.dataset import Dataset
from draft.data.generate import EndpointError
from draft.data.prepare import prepare
from draft.data.settings import EndpointSettings
from draft.errors import UserError
from draft.target import Target

ANSWER = (
    "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}"
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n" + ANSWER + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENING = TEMPLATE.replace(ANSWER, "{{ m.content }}").replace(
    "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
)
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CALLED = '<call>{"name": "add", "arguments": {"a": 1}}'
THOUGHTFUL = {"reasoning_content": "Hm.", "content": "Yes."}
TOOL = {"type": "function", "function": {"name": "add"}}


class Server:
    """Answers chats only, as it is told to: the SDK's servers with parsers of thoughts and calls need GPUs."""

    def __init__(self) -> None:
        self.message: Any = {}
        self.finish = "stop"
        self.bodies: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.add_api_route("/v1/models", lambda: {"data": [{"id": "m"}]})
        self.app.add_api_route("/v1/{path:path}", self.answer, methods=["POST"])

    async def answer(self, path: str, request: Request) -> Response:
        body = await request.json()
        if path != "chat/completions" or "top_k" in body or "return_token_ids" in body:
            return Response(json.dumps({"error": {"message": "unknown field"}}), 400)
        self.bodies.append(body)
        message = self.message(body) if callable(self.message) else self.message
        choice = {"message": {"role": "assistant", **message}, "finish_reason": self.finish}
        return Response(json.dumps({"choices": [choice]}), media_type="application/json")


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with live(made.app) as made.address:  # type: ignore[attr-defined]
        yield made


@pytest.fixture
def target() -> Target:
    made = make_tiny_target()
    made.tokenizer.chat_template = TEMPLATE
    return made


def written(server: Any, target: Target, path: Path, message: Any, *rows: Any, finish: str = "stop") -> Dataset | None:
    server.message, server.finish = message, finish
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows or [{"prompt": "One?"}, {"prompt": "Two?"}]))
    settings: Any = {"server": EndpointSettings(endpoint=server.address), "progress": False, "max_new_tokens": 200}
    return prepare(target, path / "data", prompts=[file], **settings)


def answers(target: Target, dataset: Dataset | None) -> list[str]:
    return [target.tokenizer.decode(row.ids[row.prompt_length :]) for row in rows_of(dataset)]


@pytest.mark.parametrize(
    ("template", "message", "finish", "text"),
    [
        (TEMPLATE, THOUGHTFUL, "stop", "<think>Hm.</think>Yes.<|im_end|>"),
        (TEMPLATE, {"reasoning": "Hm.", "content": "Yes"}, "length", "<think>Hm.</think>Yes"),
        (TEMPLATE, {"content": None, "tool_calls": [CALL]}, "tool_calls", f"{CALLED}<|im_end|>"),
        (OPENING, {"reasoning_content": "Hm.\n", "content": "\n\nYes."}, "stop", "Hm.\n</think>\n\nYes.<|im_end|>"),
    ],
    ids=["thoughts", "cut off in the answer", "call", "thoughts that the prompt opens"],
)  # fmt: skip
def test_answers_are_put_together(
    server: Any, target: Target, tmp_path: Path, template: str, message: Any, finish: str, text: str
) -> None:
    target.tokenizer.chat_template = template
    assert answers(target, written(server, target, tmp_path, message, finish=finish)) == [text] * 2


@pytest.mark.parametrize(
    ("message", "finish"),
    [({"reasoning_content": "Hm", "content": None}, "length"), ({"content": ""}, "stop"), ({"content": None}, "stop")],
    ids=["cut off in the thoughts", "empty", "null"],
)
def test_what_is_no_answer_is_no_row(server: Any, target: Target, tmp_path: Path, message: Any, finish: str) -> None:
    with pytest.raises(UserError, match="no conversation is left .*empty_answers: 2"):
        written(server, target, tmp_path, message, finish=finish)


def test_a_conversation_ends_before_an_empty_answer(server: Any, target: Target, tmp_path: Path) -> None:
    def once(body: Any) -> dict[str, str]:
        return {"content": "Yes." if len(body["messages"]) == 1 else ""}

    dataset = written(server, target, tmp_path, once, {"turns": ["One?", "Two?"]})
    assert answers(target, dataset) == ["Yes.<|im_end|>"] and dataset is not None
    assert dataset.manifest["counts"]["empty_answers"] == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"content": None, "tool_calls": [{"function": {}}]}, "has a tool call that names no function"),
        ({"content": "Yes.", "reasoning_content": "no"}, "refuses the turns user, assistant (not so)"),
    ],
    ids=["call", "template"],
)
def test_one_answer_that_is_not_to_be_used_leaves_the_others(
    server: Any, target: Target, tmp_path: Path, caplog: Any, wrong: Any, said: str
) -> None:
    target.tokenizer.chat_template = (
        "{% for m in messages if m.reasoning_content == 'no' %}{{ raise_exception('not so') }}{% endfor %}" + TEMPLATE
    )

    def message(body: Any) -> Any:
        return wrong if body["messages"][0]["content"] == "One?" else THOUGHTFUL

    dataset = written(server, target, tmp_path, message)
    assert answers(target, dataset) == ["<think>Hm.</think>Yes.<|im_end|>"] and dataset is not None
    assert dataset.manifest["counts"]["empty_answers"] == 1
    (warned,) = [line for line in caplog.messages if said in line]
    assert "rows.jsonl, line 1" in warned


def test_a_template_that_cannot_put_it_together(server: Any, target: Target, tmp_path: Path) -> None:
    target.tokenizer.chat_template = TEMPLATE.replace(ANSWER, "{{ m.content }}")
    with pytest.raises(EndpointError, match=r"rows\.jsonl, line 1: .* takes thoughts or calls out .*--chat-template"):
        written(server, target, tmp_path, THOUGHTFUL, {"prompt": "One?"})


def test_a_loop_of_tools(server: Any, target: Target, tmp_path: Path) -> None:
    """The target answers the user, and the result of the recorded call; its own answer is not in the way."""
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": None},
    ]
    dataset = written(server, target, tmp_path, THOUGHTFUL, {"messages": turns, "tools": [TOOL]})
    first, second = sorted(rows_of(dataset), key=lambda row: len(row.ids))
    assert first.id == second.id and answers(target, dataset) == ["<think>Hm.</think>Yes.<|im_end|>"] * 2
    prompt = target.tokenizer.decode(second.ids[: second.prompt_length])
    assert f"{CALLED}<|im_end|>\n<|im_start|>tool\n2<|im_end|>" in prompt
    sent = server.bodies[-1]
    assert sent["tools"] == [TOOL] and sent["messages"][1]["tool_calls"] == [CALL]
