"""The HTTP application: routes, and what holds for all of them (request ids, limits, the shape of errors)."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api import generate, operations
from serving.api.operations import Limits, Service, package_version
from serving.api.schemas import ApiError
from serving.engine import Engine

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = {"/health", "/metrics"}  # asked every few seconds by machines
_WANTED_A_NUMBER = {"int_type", "float_type", "bool_type"}
_READ_ON = 10  # times the limit of a body
_MAX_MESSAGE = 500  # characters of an error that go back


def create_app(engine: Engine, *, head_name: str | None = None, limits: Limits | None = None) -> FastAPI:
    """The application around an engine, which from now on belongs to the app's worker thread.

    head_name: what /info calls the draft head; the target is called by its own name.
    """
    service = Service(engine, head_name, limits or Limits())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.stop()

    app = FastAPI(title="Draftsmith", version=package_version(), lifespan=lifespan)
    app.state.service = service
    app.include_router(generate.router)
    app.include_router(operations.router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(Guard, service=service)
    return app


class Guard:
    """Pure ASGI, around everything: a request id on every answer, bounded bodies, no exception text to clients."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        status, began = 0, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, self._bounded(receive), send_with_id)
        except Exception:
            log.exception("request %s failed", request_id)
            if not status:
                answer = _error(500, "generation", "Request failed during generation")
                await answer(scope, receive, send_with_id)
        if scope["path"] == "/generate":
            self.service.metrics.failed(status)
        if scope["path"] not in _QUIET:
            seconds = time.monotonic() - began
            log.info("%s %s %d %.3fs %s", scope["method"], ascii(scope["path"][:200]), status, seconds, request_id)

    def _bounded(self, receive: Receive) -> Receive:
        """Count the body as it arrives, whatever its content-length says, and refuse it past the limit."""
        received, limit = 0, self.service.limits.max_body_bytes

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                # a connection closed on a client that still sends may lose the answer, so some more is read first
                while message.get("more_body") and received < _READ_ON * limit:
                    message = await receive()
                    received += len(message.get("body", b""))
                raise HTTPException(413, f"the body must be at most {limit} bytes")
            return message

        return bounded


def _error(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """TGI's error body; what a client sent may be echoed in it, and is bounded here."""
    return JSONResponse({"error": message[:_MAX_MESSAGE], "error_type": kind}, status, headers)


async def _api_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _error(error.status, error.kind, error.message, error.headers)


async def _http_error(_request: Request, error: Exception) -> JSONResponse:
    """Starlette's own refusals: no such path, wrong method, unreadable or oversized body."""
    assert isinstance(error, HTTPException)
    return _error(error.status_code, "validation", error.detail, dict(error.headers or {}))


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if "json" not in request.headers.get("content-type", ""):
        return _error(415, "validation", "send the body as JSON, with the header content-type: application/json")
    return _error(422, "validation", "; ".join(_sentence(problem) for problem in error.errors()[:3]))


def _sentence(problem: dict[str, Any]) -> str:
    """One problem: the field, what holds for it, and the value where it is a number or a short word."""
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem['ctx']['error']}"
    field = ".".join(str(part) for part in problem["loc"][1:])
    about = f"`{field[:100]}`: " if field else ""
    # texts are the user's own, and an error does not repeat them, except a word in a number's place
    value = problem["input"]
    shown = isinstance(value, (int, float)) or (isinstance(value, str) and problem["type"] in _WANTED_A_NUMBER)
    given = f" (given: {ascii(value)[:40]})" if shown else ""
    return f"{about}{problem['msg'].removeprefix('Value error, ')}{given}"
