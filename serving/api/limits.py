"""What is refused before a body is parsed: too large, too slow, too deep, or not JSON at all."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Container
from dataclasses import dataclass
from typing import NoReturn

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import ApiError, response_of

_READ_ON = 10  # times the limit of a body
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
        headers = dict(scope["headers"])
        try:
            _check_headers(headers)
            body = await self._read(receive, headers)
            if body is None:  # the client has gone
                return
            check_json(body, self.limits.json_depth)
        except ApiError as error:
            await response_of(error, scope["path"])(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes | None:
        limit, parts, received = self.limits.max_body_bytes, list[bytes](), 0
        said = headers.get(b"content-length", b"0")
        expected = int(said) if said.isdigit() and len(said) < 20 else 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part, more = message.get("body", b""), message.get("more_body", False)
                    received += len(part)
                    if received <= limit:
                        parts.append(part)
                    # a connection closed on a client that still sends may lose the answer, so some more is read first
                    if max(received, expected) > limit and (not more or received >= _READ_ON * limit):
                        _refuse(413, f"the body must be at most {limit} bytes")
        except TimeoutError:
            _refuse(408, f"the body must arrive within {self.limits.body_seconds:g} seconds")
        return b"".join(parts)


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
