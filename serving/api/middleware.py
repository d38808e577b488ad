"""Pure ASGI, around everything: request ids, the log of requests, the API key, and no exception text to clients."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Container
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NoReturn, Protocol

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import NO_RETRY, ApiError, api_error, response_of

log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = {"/health", "/ready", "/metrics"}  # asked every few seconds by machines
# the page at / holds no data, and has a field for the key
_OPEN = {("GET", "/"), ("HEAD", "/"), ("GET", "/health"), ("HEAD", "/health"), ("GET", "/ready"), ("HEAD", "/ready")}


class Counts(Protocol):
    """Who is told of requests."""

    in_flight: int  # requests that operators would wait for before they stop the server

    def on_answer(self, path: str, status: int) -> None:
        """The status of an answer; 0: there was none."""


class Guard:
    """A request id on every answer and log line; what no handler caught becomes the surface's own error."""

    def __init__(self, app: ASGIApp, service: Counts) -> None:
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
        # the server sends no body where HEAD was asked
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self.app(asked, receive, send_with_id)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("request failed")
                error = ApiError("generation", "Request failed", status=500, headers=NO_RETRY)
            if not status:
                await response_of(api_error(error), path)(scope, receive, send_with_id)
        finally:
            self.service.in_flight -= path not in _QUIET
            self.service.on_answer(path, status)
            if path not in _QUIET:
                about = {"method": scope["method"], "path": path[:200], "status": status,
                         "seconds": round(time.monotonic() - began, 4), **asked.get("draftsmith.log", {})}  # fmt: skip
                log.info("request", extra={"fields": about})
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
                error = ApiError(
                    "authentication",
                    "a valid API key is needed, in the header authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await response_of(error, scope["path"])(scope, receive, send)
                return
        await self.app(scope, receive, send)


# What is refused before a body is parsed: too large, too slow, too deep, or not JSON at all.


_READ_ON, _READ_ON_SECONDS = 10, 2.0  # of a body that was refused: times the limit, and how long at most
_MAX_CONTAINERS = 100_000  # objects and arrays of one body; no honest request has so many
# possessive, and an end of the text ends a string too: one pass over any bytes, however the quotes are set
_STRING = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    max_new_tokens: int | None = None  # None: as many as the context holds
    max_body_bytes: int = 2_000_000
    body_seconds: float = 30.0  # from the headers to the last byte of the body
    json_depth: int = 64
    request_seconds: float | None = 600.0  # from the receipt of a request to the end of its answer
    stalled_seconds: float = 60.0  # that a client may take none of its stream's bytes


class BodyLimits:
    """Pure ASGI: reads the whole body, checks it, and hands it on in one piece."""

    def __init__(self, app: ASGIApp, limits: Limits, paths: Container[str]) -> None:
        """paths: those that take a body, by POST; elsewhere none is read."""
        self.app = app
        self.limits = limits
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self.paths:
            await self.app(scope, receive, send)
            return
        headers, incoming = dict(scope["headers"]), _Incoming(receive)
        try:
            _check_headers(headers)
            body = await self._read(incoming, headers)
            if incoming.gone:
                return
            check_json(body, self.limits.json_depth)
        except ApiError as error:
            answer = response_of(error, scope["path"])
            if error.status == 413:
                await self._tell_while_it_comes(answer, incoming, send)
            else:
                await answer(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    async def _read(self, incoming: _Incoming, headers: dict[bytes, bytes]) -> bytes:
        limit, parts, received = self.limits.max_body_bytes, list[bytes](), 0
        said = headers.get(b"content-length", b"0")
        if said.isdigit() and (len(said) > 20 or int(said) > limit):
            _refuse(413, f"the body must be at most {limit} bytes")
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for part in incoming:
                    parts.append(part)
                    received += len(part)
                    if received > limit:
                        _refuse(413, f"the body must be at most {limit} bytes")
        except TimeoutError:
            _refuse(408, f"the body must arrive within {self.limits.body_seconds:g} seconds")
        return b"".join(parts)

    async def _tell_while_it_comes(self, answer: Response, incoming: _Incoming, send: Send) -> None:
        """Answer at once, and end a little later: a connection closed on a client that still sends may lose the answer,
        so some more of the body is taken first, and forgotten."""
        await send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
        left = _READ_ON * self.limits.max_body_bytes
        with suppress(TimeoutError):
            async with asyncio.timeout(_READ_ON_SECONDS):
                async for part in incoming:
                    left -= len(part)
                    if left < 0:
                        break
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Incoming:
    """A request's body as it comes, part by part, until it is whole or the client has gone."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._more = True
        self.gone = False

    def __aiter__(self) -> _Incoming:
        return self

    async def __anext__(self) -> bytes:
        if not self._more:
            raise StopAsyncIteration
        message = await self._receive()
        self.gone = message["type"] == "http.disconnect"
        self._more = not self.gone and message.get("more_body", False)
        part: bytes = message.get("body", b"")
        return part


def _refuse(status: int, message: str) -> NoReturn:
    headers = {"connection": "close"} if status in (408, 413) else {}  # the rest of the body is not wanted
    raise ApiError("validation", message, status=status, headers=headers)


def _check_headers(headers: dict[bytes, bytes]) -> None:
    """A body that names another type is refused: a page of another origin may send such without asking the browser."""
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        _refuse(415, "send the body as JSON, with the header content-type: application/json")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        _refuse(415, "send the body as it is: compressed bodies are not taken")


def check_json(body: bytes, depth: int) -> None:
    """Refuse what parsers trip over: other encodings than UTF-8, NUL bytes, deep nesting. In time linear in the length.

    Raises:
        ApiError: 400.
    """
    try:
        body.decode()
    except UnicodeDecodeError:
        _refuse(400, "the body is not UTF-8")
    if b"\0" in body:  # as UTF-16 has, which Python's parser would read
        _refuse(400, "the body has NUL bytes")
    containers = body.count(b"[") + body.count(b"{")
    if containers <= depth:
        return
    skeleton = _STRING.sub(b"", body)
    containers = skeleton.count(b"[") + skeleton.count(b"{")
    if containers > _MAX_CONTAINERS:
        _refuse(400, f"the body has more than {_MAX_CONTAINERS} objects and arrays")
    level = 0
    for bracket in _BRACKET.findall(skeleton):
        level += 1 if bracket in b"[{" else -1
        if level > depth:
            _refuse(400, f"the body is nested deeper than {depth} levels")


# Log lines as JSON objects, one a line; those written while a request is handled carry its id.


request_id_of_task: ContextVar[str | None] = ContextVar("request_id", default=None)


class JsonFormatter(logging.Formatter):
    """time, level, logger, message; the request's id; what the call gave as extra={"fields": {...}}."""

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


def log_as_json(level: int = logging.INFO) -> None:
    """From now on, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
