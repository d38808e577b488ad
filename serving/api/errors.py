"""Error answers in the shape of either API: TGI's, or OpenAI's under /v1.

A message names the field, the value and the limit; it holds no paths, prompts or exception text, and little of the
request.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from draft.errors import UserError
from serving.backend import Unavailable
from serving.engine import EngineStopped, Overloaded

log = logging.getLogger(__name__)

MAX_MESSAGE = 500  # characters
_MAX_ECHO = 40
RETRY = {"retry-after": "1"}
NO_RETRY = {"x-should-retry": "false"}  # for the openai client: the request would fail again

# kind -> (TGI's status, OpenAI's status, OpenAI's `type`); TGI's `error_type` is the kind itself
_KINDS: dict[str, tuple[int, int, str]] = {
    "validation": (422, 400, "invalid_request_error"),
    "authentication": (401, 401, "authentication_error"),
    "permission": (403, 403, "permission_error"),
    "not_found": (404, 404, "not_found_error"),
    "conflict": (409, 409, "conflict_error"),
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

    status: None is the one of the kind. field: as the client names it. code: OpenAI's.
    """

    kind: str
    message: str
    field: str | None = None
    status: int | None = None
    code: str | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


def api_error(error: BaseException, *, logged: bool = False) -> ApiError:
    """Return the answer for an exception, without its text unless that was written for the client.

    logged: the engine has written its cause to the log.
    """
    match error:
        case ApiError():
            return error
        case UserError():  # the engine's checks of a request
            return ApiError("validation", str(error))
        case Overloaded():
            return ApiError("overloaded", "Model is overloaded", headers=RETRY)
        case EngineStopped():
            return unavailable("the engine has stopped")
        case Unavailable():
            return ApiError("unavailable", str(error), headers={"retry-after": str(math.ceil(error.retry_seconds))})
    if not logged:
        log.error("a request failed", exc_info=error)
    return ApiError("generation", "Request failed during generation", headers=NO_RETRY)


def unavailable(reason: str) -> ApiError:
    """Return a 503: another server, or this one later, may take the request."""
    return ApiError("unavailable", reason, headers=RETRY)


def body_of(error: ApiError, openai: bool) -> dict[str, Any]:
    """Return the API's error object, which is also the last event of a stream that fails."""
    message = error.message[:MAX_MESSAGE]
    if not openai:
        return {"error": message, "error_type": error.kind}
    kind = _KINDS[error.kind][2]
    return {"error": {"message": message, "type": kind, "param": error.field, "code": error.code}}


def response_of(error: ApiError, path: str) -> JSONResponse:
    openai = path.startswith("/v1/")
    on_tgi, on_openai, _ = _KINDS[error.kind]
    return JSONResponse(body_of(error, openai), error.status or (on_openai if openai else on_tgi), error.headers)


async def on_error(request: Request, error: Exception) -> JSONResponse:
    """Handle an exception: the API's own, the engine's, or a refusal by FastAPI or Starlette."""
    match error:
        case RequestValidationError():
            problems = error.errors()
            names = (_field(problems[0]), getattr(problems[0].get("ctx", {}).get("error"), "field", None))
            message = "; ".join(_sentence(problem) for problem in problems[:3])
            answer = ApiError("validation", message, field=".".join(filter(None, names)) or None)
        case HTTPException():  # no such path, wrong method, a body that cannot be parsed
            kind = "not_found" if error.status_code == 404 else "validation"
            answer = ApiError(kind, error.detail, status=error.status_code, headers=dict(error.headers or {}))
            here = [route for route in request.app.state.routes if route.matches(request.scope)[0] is Match.PARTIAL]
            if here:  # Starlette names the methods of the first one only
                allowed = set[str]().union(*(route.methods for route in here))
                answer.headers["Allow"] = ", ".join(sorted(allowed | {"HEAD"} if "GET" in allowed else allowed))
        case _:
            answer = api_error(error)
    return response_of(answer, request.url.path)


def _field(problem: dict[str, Any]) -> str | None:
    """Return the field's path, without the type that pydantic adds where a field may have one of several."""
    if problem["type"] == "json_invalid":  # the place is one in the text
        return None
    parts = [str(part) for part in problem["loc"][1:]]
    return ".".join(part for part in parts if "[" not in part and part not in ("str", "int", "float"))[:100] or None


def _sentence(problem: dict[str, Any]) -> str:
    """Return one problem: the field, what holds for it, and the value where it is a number or a short word."""
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']}"
    field = _field(problem)
    if field is None and problem["type"] in ("missing", "model_attributes_type", "model_type", "dict_type"):
        return "the body must be a JSON object"
    about = f"`{field}`: " if field else ""
    # texts are private, and an error does not repeat them, except a word in place of a number
    value, number_expected = problem["input"], problem["type"] in ("int_type", "float_type", "bool_type")
    shown = isinstance(value, (int, float)) or (isinstance(value, str) and number_expected)
    return f"{about}{problem['msg'].removeprefix('Value error, ')}{f' (given: {echo(value)})' if shown else ''}"


def echo(value: Any) -> str:
    """Return a value for an error: short, in ASCII."""
    if isinstance(value, int) and abs(value) > 10**_MAX_ECHO:
        return f"a number of {len(str(value))} digits"
    return ascii(value)[:_MAX_ECHO]
