"""Answers that are not 200, in the shape of the surface that was asked: TGI's, or OpenAI's under /v1.

What goes back names the field, the value and the limit; it holds no paths, prompts or exception text, and little of
what was sent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from draft.errors import UserError
from serving.engine import EngineStopped, Overloaded

MAX_MESSAGE = 500  # characters
_MAX_ECHO = 40
_WANTED_A_NUMBER = {"int_type", "float_type", "bool_type"}
_WANTED_A_BODY = {"missing", "model_attributes_type", "model_type", "dict_type"}
RETRY = {"retry-after": "1"}
NO_RETRY = {"x-should-retry": "false"}  # the openai client's word for: it would end the same way again

# kind -> (status of TGI's surface, OpenAI's, OpenAI's `type`); TGI's `error_type` is the kind itself
_KINDS: dict[str, tuple[int, int, str]] = {
    "validation": (422, 400, "invalid_request_error"),
    "authentication": (401, 401, "authentication_error"),
    "not_found": (404, 404, "not_found_error"),
    "overloaded": (429, 429, "rate_limit_error"),
    "generation": (424, 500, "server_error"),
    "incomplete_generation": (504, 504, "timeout_error"),
    "cancelled": (499, 499, "cancelled_error"),
    "unavailable": (503, 503, "unavailable_error"),
    "healthcheck": (503, 503, "unavailable_error"),
}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is not 200.

    status: where it is not the one of the kind. field: what is wrong, as the client calls it. code: OpenAI's.
    """

    kind: str
    message: str
    field: str | None = None
    status: int | None = None
    code: str | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    def status_on(self, openai: bool) -> int:
        on_tgi, on_openai, _ = _KINDS[self.kind]
        return self.status or (on_openai if openai else on_tgi)


def api_error(error: BaseException) -> ApiError:
    """What a client is told of an exception."""
    match error:
        case ApiError():
            return error
        case UserError():  # the engine's own checks of a request, in words meant for its author
            return ApiError("validation", str(error))
        case Overloaded():
            return ApiError("overloaded", "Model is overloaded", headers=RETRY)
        case EngineStopped():
            return unavailable("the engine has stopped")
    return ApiError("generation", "Request failed during generation", headers=NO_RETRY)


def unavailable(why: str) -> ApiError:
    """503: another server, or this one later, may take the request."""
    return ApiError("unavailable", why, headers=RETRY)


def is_openai(path: str) -> bool:
    return path.startswith("/v1/")


def body_of(error: ApiError, openai: bool) -> dict[str, Any]:
    """The surface's error object, which is also what a stream ends with when something goes wrong in it."""
    message = error.message[:MAX_MESSAGE]
    if not openai:
        return {"error": message, "error_type": error.kind}
    kind = _KINDS[error.kind][2]
    return {"error": {"message": message, "type": kind, "param": error.field, "code": error.code}}


def response_of(error: ApiError, path: str) -> JSONResponse:
    openai = is_openai(path)
    return JSONResponse(body_of(error, openai), error.status_on(openai), error.headers or None)


# handlers


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    return response_of(api_error(error), request.url.path)


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own refusals: no such path, wrong method, an unreadable body."""
    assert isinstance(error, HTTPException)
    kind = "not_found" if error.status_code == 404 else "validation"
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    told = ApiError(kind, error.detail, status=error.status_code, headers=headers)
    if error.status_code == 405:  # of the routes with this path Starlette names the first one's methods only
        here = (route for route in request.app.state.routes if route.path_regex.match(request.url.path))
        allowed = set[str]().union(*(route.methods for route in here))
        if allowed:
            headers["allow"] = ", ".join(sorted(allowed | {"HEAD"} if "GET" in allowed else allowed))
    return response_of(told, request.url.path)


async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    first = problems[0]
    names = (_field(first), getattr(first.get("ctx", {}).get("error"), "field", None))
    field = ".".join(filter(None, names)) or None
    told = ApiError("validation", "; ".join(_sentence(problem) for problem in problems[:3]), field=field)
    return response_of(told, request.url.path)


def _field(problem: dict[str, Any]) -> str | None:
    """The field's path; where one problem is reported for each type that a field may have, types are left out."""
    if problem["type"] == "json_invalid":  # the place is one in the text
        return None
    parts = [str(part) for part in problem["loc"][1:] if not (isinstance(part, str) and _is_type(part))]
    return ".".join(parts)[:100] or None


def _is_type(part: str) -> bool:
    return "[" in part or part in {"str", "int", "float", "bool"}


def _sentence(problem: dict[str, Any]) -> str:
    """One problem: the field, what holds for it, and the value where it is a number or a short word."""
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']}"
    field_name = _field(problem)
    if field_name is None and problem["type"] in _WANTED_A_BODY:
        return "the body must be a JSON object"
    about = f"`{field_name}`: " if field_name else ""
    # texts are the user's own, and an error does not repeat them, except a word in a number's place
    value = problem["input"]
    shown = isinstance(value, (int, float)) or (isinstance(value, str) and problem["type"] in _WANTED_A_NUMBER)
    return f"{about}{problem['msg'].removeprefix('Value error, ')}{f' (given: {echo(value)})' if shown else ''}"


def echo(value: Any) -> str:
    """A value in an error: short, in ASCII."""
    return (ascii(value) if isinstance(value, str) or not _is_long(value) else f"a number of {len(str(value))} digits")[
        :_MAX_ECHO
    ]


def _is_long(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > 10**_MAX_ECHO
