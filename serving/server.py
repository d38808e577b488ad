"""The process around the application: its socket, loading while it already answers, and its end by signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn

from draft.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serving.backend import Backend

STALLED_SECONDS = 60.0  # that a client may take none of its answer's bytes
_BACKLOG = 2048  # connections that wait to be accepted
_CLOSE_SECONDS = 2  # for connections, once all requests are answered or ended


class Listener:
    """A socket that listens."""

    def __init__(self, host: str, port: int, stalled_seconds: float = STALLED_SECONDS) -> None:
        """stalled_seconds: a client that takes none of its answer's bytes for so long loses its connection; closing it
        would not do that before all bytes are sent.

        Raises:
            UserError: the address is not this machine's, or the port is taken.
        """
        self.host = host
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.socket = socket.socket(family, kind, protocol)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux; connections have it from the socket that listens
                milliseconds = max(1, round(1000 * stalled_seconds))
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
            self.socket.bind(address)
            self.socket.listen(_BACKLOG)
            self.port = self.socket.getsockname()[1]
        except OSError as error:
            message = f"cannot listen on {host} port {port} ({error.strerror})"
            raise UserError(f"{message}; choose another --host or --port (0: a free one).") from error

    @property
    def is_loopback(self) -> bool:
        """True where only this machine reaches it."""
        return ip_address(self.socket.getsockname()[0].partition("%")[0]).is_loopback

    def url(self, scheme: str) -> str:
        return f"{scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class Child(Protocol):
    """A process that the server cannot do without."""

    def attend(self) -> None:
        """Wait for its end, and raise unless `stop` brought it about."""

    def stop(self) -> None:
        """End it."""


def serve_until_stopped(
    app: FastAPI,
    load: Callable[[], Backend],
    listener: Listener,
    ready_line: str,
    drain_seconds: float,
    tls: dict[str, Any],
    child: Child | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, which end the process with status 0 once running requests are answered.

    load: returns the engine; until then the server is alive but not ready. ready_line: printed to stdout then.
    child: what ends with the server, and the server with it.

    Raises:
        whatever `load` or `child` raises, once the server has ended.
        UserError: for files that are not what HTTPS needs.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,  # the app logs requests itself, with their ids
        server_header=False,
        ws="none",
        lifespan="on",
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        **tls,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        given = " or ".join(
            f"--{name.replace('_', '-')} {path}" for name, path in tls.items() if isinstance(path, Path)
        )
        raise UserError(f"{given}: not a certificate, or not with its key ({error}).") from error
    server = _Server(config, load, ready_line, drain_seconds)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn does so, too, but later
        signal.signal(number, server.handle_exit)
    if child is not None:
        threading.Thread(target=server.end_with, args=(child.attend,), name="child", daemon=True).start()
    server.run(sockets=[listener.socket])
    failure = server.failure
    if child is not None:
        child.stop()
    if failure is not None:
        raise failure
    if server.loading:  # a thread in the middle of torch's code would not survive the interpreter's end
        os._exit(0)


class _Server(uvicorn.Server):
    """uvicorn that loads the engine while it answers, and drains before it stops."""

    def __init__(
        self, config: uvicorn.Config, load: Callable[[], Backend], ready_line: str, drain_seconds: float
    ) -> None:
        super().__init__(config)
        self.failure: BaseException | None = None
        self.loading = True
        self._load, self._ready_line, self._drain_seconds = load, ready_line, drain_seconds
        self._service = config.app.state.service  # type: ignore[union-attr]
        self._loop: asyncio.AbstractEventLoop | None = None
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
            self.failure = self.failure or error
            self.should_exit = True
        else:
            if not self._signalled:
                print(self._ready_line, flush=True)
        self.loading = False

    def end_with(self, attend: Callable[[], None]) -> None:
        """End, with its error, once a call raises one."""
        try:
            attend()
        except BaseException as error:
            self.failure = self.failure or error
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, a second one ends the process at once."""

        async def stop() -> None:
            await self._service.drain(self._drain_seconds)
            self.should_exit = True

        if self._signalled:
            os._exit(128 + sig)
        self._signalled = True
        if self._loop is None:
            self.should_exit = True
        else:
            self._stopping = asyncio.run_coroutine_threadsafe(stop(), self._loop)
