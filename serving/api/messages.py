"""A conversation as OpenAI's surface takes it: text, and nothing of tools, sound or pictures."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from serving.api.schemas import (
    Refused,
    Strict,
    Text,
    described,
    not_implemented,
    refuse_not_implemented,
)

MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message

# clients send an answer's message back as they got it, with what it does not have as null or empty
NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "parsed": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_call_id": ("",),
    "tool_calls": ([],),
}

# in JSON schema; the validator says it in words
_WITH_TEXT: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "contains": {"required": ["text"], "properties": {"text": {"minLength": 1}}}},
    ]
}
_TEXT_BY_ROLE = {
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {"required": ["content"], "properties": {"role": {"const": "user"}, "content": _WITH_TEXT}},
        {
            "required": ["content"],
            "properties": {
                "role": {"enum": ["system", "developer", "tool"]},
                "content": {"type": ["string", "array"]},
            },
        },
    ]
}


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn; of the kinds of content only text."""

    model_config = described(_TEXT_BY_ROLE)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)] | None = Field(
        default=None, description="null, for no text, is the assistant's only; a user says something"
    )
    name: Text | None = None

    annotations: Any = not_implemented(NOT_IMPLEMENTED, "annotations")
    audio: Any = not_implemented(NOT_IMPLEMENTED, "audio")
    function_call: Any = not_implemented(NOT_IMPLEMENTED, "function_call")
    parsed: Any = not_implemented(NOT_IMPLEMENTED, "parsed")
    reasoning: Any = not_implemented(NOT_IMPLEMENTED, "reasoning")
    reasoning_content: Any = not_implemented(NOT_IMPLEMENTED, "reasoning_content")
    refusal: Any = not_implemented(NOT_IMPLEMENTED, "refusal")
    tool_call_id: Any = not_implemented(NOT_IMPLEMENTED, "tool_call_id")
    tool_calls: Any = not_implemented(NOT_IMPLEMENTED, "tool_calls")

    @model_validator(mode="after")
    def _refuse(self) -> Message:
        refuse_not_implemented(self, NOT_IMPLEMENTED)
        if self.content is None and self.role != "assistant":
            raise Refused("content", "is needed in a message that is not the assistant's")
        if self.role == "user" and not self.text:
            raise Refused("content", "is empty; what a user says must have at least 1 character")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
