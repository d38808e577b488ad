"""The process around the application: its socket, loading while it already answers, and its end by signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from draft.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serving.engine import Engine

_CLOSE_SECONDS = 2  # for connections, once all requests are answered or ended


class Listener:
    """A bound socket, which listens once the server begins."""

    def __init__(self, host: str, port: int) -> None:
        """Raises UserError when the address is not this machine's or the port is taken."""
        self.host = host
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.socket = socket.socket(family, kind, protocol)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(address)
            self.port = self.socket.getsockname()[1]
        except OSError as error:
            raise _cannot_listen(host, port, error) from error

    def listen(self, backlog: int, stalled_seconds: float) -> None:
        """Begin to listen; a client that takes none of its answer's bytes for `stalled_seconds` loses its connection.

        Closing it here would not do that before all bytes are sent.
        """
        try:
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux; connections have it from the socket that listens
                milliseconds = max(1, round(1000 * stalled_seconds))
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            self.socket.listen(backlog)
        except OSError as error:  # bound at the same time by another server that began to listen first
            raise _cannot_listen(self.host, self.port, error) from error

    def url(self, scheme: str) -> str:
        return f"{scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def serve_until_stopped(
    app: FastAPI,
    load: Callable[[], Engine],
    listener: Listener,
    ready_line: str,
    drain_seconds: float,
    tls: dict[str, Any],
) -> None:
    """Serve until SIGTERM or SIGINT, which end the process with status 0 once running requests are answered.

    load: returns the engine; until then the server is alive but not ready. ready_line: printed to stdout then.

    Raises:
        whatever `load` raises, once the server has ended.
    """
    config = _config(app, tls)
    listener.listen(config.backlog, app.state.service.limits.stalled_seconds)
    server = _Server(config, load, ready_line, drain_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn does so, too, but later
        signal.signal(number, server.handle_exit)
    server.run(sockets=[listener.socket])
    if server.failure is not None:
        raise server.failure
    if server.loading:  # a thread in the middle of torch's code would not survive the interpreter's end
        os._exit(0)


def _config(app: FastAPI, tls: dict[str, Any]) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,  # the app logs requests itself, with their ids
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        **tls,
    )
    try:
        config.load()
    except (ssl.SSLError, OSError) as error:
        flags = {"--ssl-certfile": tls["ssl_certfile"], "--ssl-ca-certs": tls["ssl_ca_certs"]}
        given = " or ".join(f"{flag} {path}" for flag, path in flags.items() if path)
        raise UserError(f"{given}: not a certificate, or not with its key ({error}).") from error
    return config


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    return UserError(
        f"cannot listen on {host} port {port} ({error.strerror}); choose another --host or --port (0: a free one)."
    )


class _Server(uvicorn.Server):
    """uvicorn that loads the engine while it answers, and drains before it stops."""

    def __init__(
        self, config: uvicorn.Config, load: Callable[[], Engine], ready_line: str, drain_seconds: float
    ) -> None:
        super().__init__(config)
        self.failure: BaseException | None = None
        self.loading = True
        self._load, self._ready_line, self._drain_seconds = load, ready_line, drain_seconds
        self._service = config.app.state.service  # type: ignore[union-attr]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started and not self._signalled:
            threading.Thread(target=self._attach, name="loader", daemon=True).start()

    def _attach(self) -> None:
        try:
            self._service.attach(self._load())
        except BaseException as error:
            self.failure = error
            self.should_exit = True
        else:
            if not self._signalled:
                print(self._ready_line, flush=True)
        self.loading = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, a second one ends the process at once."""
        if self._signalled:
            os._exit(128 + sig)
        self._signalled = True
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_to_stop)

    def _begin_to_stop(self) -> None:
        self._stopping = asyncio.ensure_future(self._stop())

    async def _stop(self) -> None:
        await self._service.drain(self._drain_seconds)
        self.should_exit = True
