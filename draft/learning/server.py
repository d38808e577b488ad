"""The server whose traffic is learnt from: its load, and its draft heads, over HTTP."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from draft.errors import UserError

KEY_VARIABLE = "DRAFTSMITH_API_KEY"
_SECONDS = 30.0  # of one answer; a head is loaded and checks itself in it
_LOAD_SECONDS = 300.0
_SERIES = re.compile(r"^\w+:(\w+)(?:\{[^}]*\})? (\S+)", re.MULTILINE)


class ServerAway(Exception):
    """The server does not answer, or says that it cannot now."""


class WrongKey(UserError):
    """The server wants another key: nothing can go on."""


@dataclass(frozen=True)
class Load:
    """The server's counts since its start, and its queue now."""

    gaps: float = 0.0  # between the steps that brought tokens, of all requests
    seconds: float = 0.0  # of these together
    waiting: float = 0.0  # requests in the queue


class Server:
    """A client of one server: draft-serve, or, without heads, whatever has vLLM's metrics."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            UserError: for what is no address, or no key.
        """
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"${KEY_VARIABLE} holds letters that no key has; set it to the server's key.")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        try:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError
            parts.hostname.encode("idna")  # as the system looks it up
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=_SECONDS, trust_env=False)
        except (ValueError, httpx.InvalidURL) as error:  # such as a port that is no number
            raise UserError(f"--server {url!r} is no address; give one such as http://localhost:8000.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def load(self) -> Load:
        """Read the metrics. Raises ServerAway and WrongKey, as every call does."""
        sums: Counter[str] = Counter()
        series = _SERIES.findall(self._request("GET", "/metrics").text)
        try:
            for name, value in series:
                sums[name] += float(value)  # type: ignore[assignment]
        except ValueError:  # of a page for browsers
            sums.clear()
        if not sums:
            raise ServerAway(f"{self.url} answers GET /metrics with something else than a server's metrics")
        gaps = "inter_token_latency_seconds"
        return Load(sums[f"{gaps}_count"], sums[f"{gaps}_sum"], sums["num_requests_waiting"])

    # heads, of draft-serve only

    def heads(self) -> dict[str, Any] | None:
        """Return the heads, the name of the default, and the events of late; None for a server without such a list."""
        answer = self._request("GET", "/heads", missing=True)
        if answer.status_code == 404:
            return None
        try:
            found = answer.json()
        except ValueError:
            found = None
        if not isinstance(found, dict) or not {"default", "heads", "events"} <= found.keys():
            raise ServerAway(f"{self.url} answers GET /heads with something else than a list of heads")
        return found

    def serve(self, name: str, folder: str) -> str | None:
        """Load a head as the default of new requests; None, or the server's sentence where it refuses it."""
        body = {"name": name, "path": folder, "default": True}
        answer = self._request("POST", "/heads", json=body, timeout=_LOAD_SECONDS, refusals={409, 422})
        if answer.status_code == 409:  # loaded already, before this process was killed: names are of weights
            answer = self._request("POST", f"/heads/{name}/default", refusals={409, 422})
        return _sentence(answer) if answer.is_error else None

    def unload(self, name: str) -> None:
        self._request("DELETE", f"/heads/{name}", refusals={404, 409, 422})

    def _request(
        self,
        method: str,
        path: str,
        *,
        missing: bool = False,
        refusals: frozenset[int] | set[int] = frozenset(),
        **options: Any,
    ) -> httpx.Response:
        try:
            answer = self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise ServerAway(f"{self.url} does not answer ({type(error).__name__})") from error
        if answer.status_code in (401, 403):
            raise WrongKey(
                f"{self.url} refuses {method} {path} ({_sentence(answer)}); put its key into {KEY_VARIABLE}."
            )
        if answer.is_success or answer.status_code in refusals or (missing and answer.status_code == 404):
            return answer
        raise ServerAway(f"{self.url} answers {method} {path} with status {answer.status_code}: {_sentence(answer)}")


def _sentence(answer: httpx.Response) -> str:
    """The message in an error's body, in the shape of either API."""
    try:
        error = answer.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return answer.text[:200] or f"status {answer.status_code}"
