"""The connection to a server upstream: what it is, its health and figures, and the streams of its answers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx

from draft.errors import UserError
from draft.target import TextTarget
from serving.backend import Unavailable
from serving.engine.request import Overloaded
from serving.engine.self_check import WATCHED, AcceptanceWatch
from serving.upstream.dialects import DIALECTS, BadAnswer, Dialect, server_events
from serving.upstream.figures import Figures, drafts_between, read_figures

log = logging.getLogger(__name__)

_PROBE = "Zwölf 12 x\n  return [a_b]"  # tokenizers differ at such places
# seconds
_KEEP_ALIVE = 2.0  # servers close idle connections after 5, and one that does so just then loses the request
_CONNECTING = 5.0
_ANSWERING = 20.0  # health and figures, from a server that is busy
_PROBING = 120.0  # the first tokens
_LEAST_RETRY, _MOST_RETRY = 0.5, 10.0  # between tries to reach it
_REPORTING = 60.0  # between log lines about a server that does not answer
_TRIES_AGAIN = 2  # of a connection that was refused, within two seconds: nothing has been sent then


class Connection:
    """One server: `attend` watches over it, and `events` sends it a request. Both run in one event loop.

    Any thread may read the attributes.
    """

    def __init__(self, url: str, target: TextTarget, key: str | None, poll_seconds: float) -> None:
        """Arguments as of `Upstream`. Raises UserError for a URL that is none."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--upstream {url!r} is not a URL; give one such as http://127.0.0.1:8001.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.target, self.poll_seconds = target, poll_seconds
        self.ready = False
        self.reason = "the server upstream has not answered yet"  # for which requests are turned away
        self.retry = _LEAST_RETRY  # seconds until the next try
        self.contact: Future[None] = Future()  # the first one
        self.server: Dialect | None = None  # None before it
        self.model = ""  # its name there
        self.max_length = target.stated_length
        self.figures = Figures()
        self.watch = AcceptanceWatch()
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._reported = 0.0

    async def attend(self) -> None:
        """Make contact, read the server's figures, and find it again when it is gone; until it is cancelled."""
        self._nudge = asyncio.Event()
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE)
        transport = httpx.AsyncHTTPTransport(retries=_TRIES_AGAIN, limits=limits)
        # an answer has no limit here: the API's own ends its request
        timeout = httpx.Timeout(None, connect=_CONNECTING)
        options: Any = {"base_url": self.url, "headers": self._headers, "timeout": timeout}
        async with httpx.AsyncClient(transport=transport, **options) as self._client:
            while True:
                seconds = self.poll_seconds
                try:
                    if self.ready:
                        await self._poll()
                    else:
                        await self._make_contact()
                except Exception as error:
                    seconds = self._lost(error)
                self._nudge.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._nudge.wait(), seconds)

    def _lost(self, error: Exception) -> float:
        """Turn requests away; returns the seconds until the next try."""
        if isinstance(error, UserError) and not self.contact.done():
            self.contact.set_exception(error)  # time does not heal it
        self.ready, self.reason = False, "the server upstream does not answer"
        if time.monotonic() - self._reported > _REPORTING:
            self._reported = time.monotonic()
            level = logging.WARNING if self.contact.done() else logging.INFO  # it may still be loading
            log.log(level, "waiting for %s: %s", self.url, str(error) or type(error).__name__)
        seconds, self.retry = self.retry, min(2 * self.retry, _MOST_RETRY)
        return seconds

    async def _make_contact(self) -> None:
        """Find out which server it is, and check that it serves the target and returns token ids."""
        about = ((await self._json("GET", "/v1/models")).get("data") or [{}])[0]
        server = DIALECTS.get(about.get("owned_by"))
        if server is None:
            known = ", ".join(each.name for each in DIALECTS.values())
            raise UserError(
                f"--upstream {self.url}: its models are owned by {about.get('owned_by')!r}; it must be one of {known}."
            )
        body = {"model": about["id"], "prompt": _PROBE, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
        [choice] = (await self._json("POST", "/v1/completions", json=body, timeout=_PROBING))["choices"]
        if choice.get("prompt_token_ids") is None or choice.get("token_ids") is None:
            raise UserError(f"--upstream {self.url}: it returns no token ids; use a newer {server.name}.")
        if choice["prompt_token_ids"] != self.target.tokenizer(_PROBE).input_ids:
            raise UserError(
                f"--upstream {self.url} serves {about['id']!r}, whose tokenizer is not that of --target "
                f"{self.target.name}; give its own target."
            )
        self.server, self.model = server, about["id"]
        self.max_length = int(about.get("max_model_len") or self.target.stated_length)
        await self._poll()
        log.info("%s serves %r at %s", server.name, self.model, self.url)
        self.ready, self.retry, self._reported = True, _LEAST_RETRY, 0.0
        if not self.contact.done():
            self.contact.set_result(None)

    async def _poll(self) -> None:
        """Read health and figures; raises where the server takes no requests."""
        assert self.server is not None
        self._checked(await self._client.get(self.server.health, timeout=_ANSWERING))
        answer = await self._client.get("/metrics", timeout=_ANSWERING)
        if answer.status_code != 200:  # SGLang has them with --enable-metrics only
            return
        figures = read_figures(answer.text)
        for depth, accepted in drafts_between(self.figures.counts, figures.counts, 2 * WATCHED):
            self.watch.observe(depth, accepted)
        self.figures = figures

    async def _json(self, method: str, path: str, timeout: float = _ANSWERING, **options: Any) -> dict[str, Any]:
        answer = self._checked(await self._client.request(method, path, timeout=timeout, **options))
        try:
            return dict(answer.json())
        except (ValueError, TypeError) as error:
            raise UserError(
                f"--upstream {self.url}{path} is no JSON object; give the address of an OpenAI-compatible server."
            ) from error

    def _checked(self, answer: httpx.Response) -> httpx.Response:
        """Return an answer about the server itself, if it is one.

        Raises:
            UserError: the server is not of this kind, or wants another key. Unavailable: it is not ready.
        """
        status, path = answer.status_code, answer.url.path
        if status in (401, 403):
            raise UserError(f"--upstream {self.url} refuses the key; set DRAFTSMITH_UPSTREAM_KEY to the server's.")
        if status in (400, 404, 405, 422):
            raise UserError(
                f"--upstream {self.url}: {path} has status {status}; give the address of an OpenAI-compatible server "
                "of text completions."
            )
        if status != 200:
            raise Unavailable(f"{path} has status {status}")
        return answer

    # requests

    async def events(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Send a request, and yield the events of its answer. Closing this closes the connection to the server.

        A connection that is refused is tried again; nothing is, once a byte has been sent.

        Raises:
            UserError: the server refuses the request. Overloaded, Unavailable: it takes none now, or was lost.
            BadAnswer: it failed, or its answer is none.
        """
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refusal(response)
                async for event in server_events(response.aiter_bytes()):
                    if event.get("error"):
                        raise _failure(event["error"])
                    yield event
        except httpx.TransportError as error:
            log.warning("the server upstream was lost: %s", str(error) or type(error).__name__)
            self._nudge.set()  # see whether it is still there
            raise Unavailable("the server upstream was lost", self.retry) from error


def _refusal(response: httpx.Response) -> Exception:
    """Return the error for a status that is not 200."""
    status = response.status_code
    try:
        error = response.json()["error"]
        message = error if isinstance(error, str) else error["message"]
    except (ValueError, KeyError, TypeError):
        message = f"status {status}"
    if status in (400, 413, 422):
        return _refused(message)
    if status == 429:
        return Overloaded("the server upstream has a full queue")
    if status == 503:
        after = response.headers.get("retry-after", "")
        return Unavailable("the server upstream takes no requests now", float(after) if after.isdigit() else 1.0)
    return BadAnswer(f"status {status}: {message}")


def _failure(error: Any) -> Exception:
    """Return the error for an event that is one."""
    told: dict[str, Any] = error if isinstance(error, dict) else {"message": error}
    if told.get("type") == "unavailable_error":  # draft-serve's, as it ends
        return Unavailable("the server upstream takes no requests now")
    if told.get("code") == 400 or told.get("type") == "BadRequestError":  # vLLM checks some parameters this late
        return _refused(told.get("message"))
    return BadAnswer(f"an error in the middle of the answer: {told.get('message')}")


def _refused(message: Any) -> UserError:
    return UserError(f"the server upstream refuses this: {' '.join(str(message).split())[:300]}")
