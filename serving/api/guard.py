"""Pure ASGI, around everything: request ids, the log of requests, the API key, and no exception text to clients."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import NO_RETRY, ApiError, api_error, response_of
from serving.api.logs import request_id_of_task

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
