"""Pure ASGI around the routes: request ids, the request log, the API key, and limits on bodies."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Container
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from itertools import accumulate
from typing import NoReturn

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import NO_RETRY, ApiError, api_error, response_of
from serving.api.service import GENERATING, Limits, Service

log = logging.getLogger(__name__)
request_id_of_task: ContextVar[str | None] = ContextVar("request_id", default=None)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = {"/health", "/ready", "/metrics"}  # requested every few seconds by machines
# the page at / holds no data, and has a field for the key
_OPEN = {("GET", "/"), ("HEAD", "/"), ("GET", "/health"), ("HEAD", "/health"), ("GET", "/ready"), ("HEAD", "/ready")}
_MAX_DEPTH = 64  # of JSON: deeper, Python's parsers run out of stack
_NO_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[^][{}"]+', re.DOTALL)
_READ_ON, _READ_ON_SECONDS = 10, 2.0  # of a body that was refused: times the limit, and how long at most


class Guard:
    """A request id on every answer and log line; an exception that no handler caught becomes the API's error."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        status, began, path = 0, time.monotonic(), scope["path"]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        token = request_id_of_task.set(request_id)
        self.service.in_flight += path not in _QUIET
        # for HEAD uvicorn sends no body
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self.app(inner, receive, send_with_id)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("request failed")
                error = ApiError("generation", "Request failed", status=500, headers=NO_RETRY)
            if not status:
                await response_of(api_error(error), path)(scope, receive, send_with_id)
        finally:
            self.service.in_flight -= path not in _QUIET
            if self.service.metrics is not None and path in GENERATING:
                self.service.metrics.failed(status)
            if path not in _QUIET:
                fields = {"method": scope["method"], "path": path[:200], "status": status,
                          "seconds": round(time.monotonic() - began, 4), **inner.get("draftsmith.log", {})}  # fmt: skip
                log.info("request", extra={"fields": fields})
            request_id_of_task.reset(token)


class ApiKey:
    """401 for all but the open paths without `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["method"], scope["path"]) not in _OPEN:
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key):
                message, headers = "send a valid API key: authorization: Bearer KEY", {"www-authenticate": "Bearer"}
                error = ApiError("authentication", message, code="invalid_api_key", headers=headers)
                await response_of(error, scope["path"])(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimits:
    """Read the whole body, refuse one that is too large, too slow or no UTF-8 JSON, and hand it on in one piece."""

    def __init__(self, app: ASGIApp, limits: Limits, paths: Container[str]) -> None:
        """paths: those that take a body, by POST; elsewhere none is read."""
        self.app = app
        self.limits = limits
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self.paths:
            await self.app(scope, receive, send)
            return
        headers, incoming = dict(scope["headers"]), Request(scope, receive).stream()
        try:
            body = await self._read(incoming, headers)
        except ClientDisconnect:
            return
        except ApiError as error:
            answer = response_of(error, scope["path"])
            if error.status == 413:
                await self._answer_while_reading(answer, incoming, send)
            else:
                await answer(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    async def _read(self, incoming: AsyncIterator[bytes], headers: dict[bytes, bytes]) -> bytes:
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        # a page of another origin may send other types without asking the browser
        if not re.fullmatch(rb"application/(json|.*\+json)", kind):
            _refuse(415, "send the body as JSON, with the header content-type: application/json")
        if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
            _refuse(415, "send the body as it is: compressed bodies are not taken")
        limit, body = self.limits.max_body_bytes, bytearray()
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and (len(length) > 20 or int(length) > limit):
            _refuse(413, f"the body must be at most {limit} bytes")
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in incoming:
                    body += part
                    if len(body) > limit:
                        _refuse(413, f"the body must be at most {limit} bytes")
        except TimeoutError:
            _refuse(408, f"the body must arrive within {self.limits.body_seconds:g} seconds")
        try:
            body.decode()
        except UnicodeDecodeError:
            _refuse(400, "the body is not UTF-8")
        if b"\0" in body:  # as UTF-16 has, which Python's parser would read
            _refuse(400, "the body has NUL bytes")
        brackets = _NO_BRACKETS.sub(b"", body)
        if max(accumulate(1 if each in b"[{" else -1 for each in brackets), default=0) > _MAX_DEPTH:
            _refuse(400, f"the body is nested deeper than {_MAX_DEPTH} levels")
        return bytes(body)

    async def _answer_while_reading(self, answer: Response, incoming: AsyncIterator[bytes], send: Send) -> None:
        """Answer at once, and end a little later: a connection closed on a client that still sends may lose the answer,
        so some more of the body is read first, and dropped."""
        await send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
        left = _READ_ON * self.limits.max_body_bytes
        with suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(_READ_ON_SECONDS):
                async for part in incoming:
                    left -= len(part)
                    if left < 0:
                        break
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _refuse(status: int, message: str) -> NoReturn:
    headers = {"connection": "close"} if status in (408, 413) else {}  # the rest of the body is not wanted
    raise ApiError("validation", message, status=status, headers=headers)


class JsonFormatter(logging.Formatter):
    """Log lines as JSON objects: time, level, logger, message; the request's id; `fields` of the call's `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id_of_task.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in line.items() if value is not None})


def log_as_json() -> None:
    """Write log lines of level INFO and above to stderr, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request to a server upstream
