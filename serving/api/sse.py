"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

log = logging.getLogger(__name__)

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


# json.dumps would make one for each event. ASCII: some clients end lines at U+0085, U+2028 and U+2029, too
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


def event(data: Any, prefix: bytes = b"data: ") -> bytes:
    """One event, on a single line as some clients need it."""
    return prefix + _encode(data).encode() + b"\n\n"


class EventStream(Response):
    """Sends what `chunks` gives as it comes.

    The answer begins with the first chunk: what goes wrong before is an ordinary error with a status of its own. When
    the client goes, or takes no bytes for `stalled_seconds`, the generator is closed. A slow reader is waited for here
    only; what is decided meanwhile gathers in the request and becomes one larger chunk.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[bytes], stalled_seconds: float, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(headers=HEADERS | (headers or {}))
        del self.headers["content-length"]
        self.chunks = chunks
        self.stalled_seconds = stalled_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                if not task.done():
                    task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
        if not sending.cancelled():
            try:
                sending.result()
            except TimeoutError:
                log.warning("a client took no byte of its stream for %g seconds; dropped", self.stalled_seconds)

    async def _send_all(self, send: Send) -> None:
        started = False
        async with aclosing(self.chunks):
            async for chunk in self.chunks:
                async with asyncio.timeout(self.stalled_seconds):
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        async with asyncio.timeout(self.stalled_seconds):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
