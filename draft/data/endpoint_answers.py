"""What an OpenAI-compatible server answers, read with suspicion."""

from __future__ import annotations

from typing import Any

import httpx

from draft.errors import UserError


class EndpointError(UserError):
    """The server does not answer as it should: what it has answered so far stays."""


def parsed(answer: httpx.Response, told: str) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError as error:
        raise EndpointError(f"{told} answers without JSON; is it an OpenAI-compatible one?") from error
    if not isinstance(body, dict):
        raise EndpointError(f"{told} answers with a {type(body).__name__}; is it an OpenAI-compatible server?")
    return body


def choice_in(body: dict[str, Any], told: str) -> dict[str, Any]:
    choices = body.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        raise EndpointError(f"{told} answers without choices; is it an OpenAI-compatible server?")
    return choices[0]


def reason(answer: httpx.Response) -> str:
    """What a server says is wrong, in a line."""
    try:
        body = answer.json()
        error = body.get("error", body.get("message", body.get("detail", body)))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = answer.text
    return " ".join(text.split())[:200] or answer.reason_phrase
