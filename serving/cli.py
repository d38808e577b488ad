"""draft-serve: a target and its draft head behind HTTP."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
import uvicorn

from draft.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serving.engine import Engine

# what is running when a stop is asked for has this long to finish; containers are killed after 10 s
_DRAIN_SECONDS = 8

# \b keeps the lines as they are
_EXAMPLES = """\b
Examples:
  draft-serve --head smollm2-eagle3
      the bundled target and head, on http://127.0.0.1:8000
  draft-serve --target ./my-llama --head ./my-head --host 0.0.0.0 --port 9000
  curl localhost:8000/generate -H 'content-type: application/json' \\
      -d '{"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40}}'
"""

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Rule(StrEnum):
    """How drafted tokens are judged."""

    shared_noise = "shared-noise"
    rejection = "rejection"


@cli.command(epilog=_EXAMPLES)
def serve(
    target: Annotated[str, typer.Option(help="A hub id, a folder, a .gguf file, or smollm2 (bundled).")] = "smollm2",
    head: Annotated[
        str | None, typer.Option(help="A folder, or smollm2-eagle3 (bundled). Without: plain decoding.")
    ] = None,
    speculation_length: Annotated[int, typer.Option(min=1, help="Tokens drafted per verification, at most.")] = 5,
    rule: Annotated[Rule, typer.Option(help="Both are lossless; see the README.")] = Rule.shared_noise,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8000,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32 or float64.")] = "auto",
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests in line before new ones get 429.")] = 64,
    max_new_tokens_limit: Annotated[
        int | None,
        typer.Option(min=1, help="The most a request may ask for. Default: what the context holds."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads for the arithmetic. Default: torch's.")
    ] = None,
) -> None:
    """Serve a target, and the draft head that makes it faster, over HTTP."""
    from serving.api.app import create_app  # here, so that --help does not wait for torch
    from serving.api.operations import Limits

    with _bind(host, port) as listener:  # before the model is loaded, which takes longer than finding the port taken
        engine = _load(target, head, speculation_length, str(rule), dtype, threads)
        app = create_app(
            engine, head_name=head, limits=Limits(max_waiting=max_waiting, max_new_tokens=max_new_tokens_limit)
        )
        what = f"{target} with {head}, K = {speculation_length}, {rule}" if head else f"{target} without a draft head"
        address = f"http://{_in_url(host)}:{listener.getsockname()[1]}"
        _run(_config(app), listener, f"serving {what} on {address}")


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,  # the app logs requests itself, with their ids
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=_DRAIN_SECONDS,
    )


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a client that comes while the model loads is refused, not kept."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    return UserError(
        f"cannot listen on {host} port {port} ({error.strerror}); choose another --host or --port (0: a free one)."
    )


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _load(target: str, head: str | None, speculation_length: int, rule: str, dtype: str, threads: int | None) -> Engine:
    import torch
    from prometheus_client import disable_created_metrics
    from transformers.utils.logging import disable_progress_bar

    from draft.checkpoint import check_fits, load_head
    from draft.target import load_target
    from serving.engine import Engine

    if threads is not None:
        torch.set_num_threads(threads)
    disable_created_metrics()  # a time of birth beside each counter, which nobody reads
    if not sys.stderr.isatty():
        disable_progress_bar()
    loaded = load_target(target, dtype)
    draft_head = None
    if head is not None:
        draft_head, about = load_head(head, dtype=loaded.dtype, device=loaded.device)
        check_fits(draft_head, about, loaded)
    return Engine(loaded, draft_head, speculation_length=speculation_length, rule=rule)


class _Server(uvicorn.Server):
    """uvicorn, with one line on stdout once it accepts requests."""

    ready_line = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self.ready_line, flush=True)


def _run(config: uvicorn.Config, listener: socket.socket, ready_line: str) -> None:
    """Serve until SIGTERM or SIGINT, which end the process with status 0 once running requests are answered."""
    try:
        listener.listen(config.backlog)
    except OSError as error:  # bound at the same time by another server that was still loading
        host, port, *_ = listener.getsockname()
        raise _cannot_listen(host, port, error) from error
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, lambda *_: None
        )  # uvicorn, having stopped, raises the signal again for what was here before
    server = _Server(config)
    server.ready_line = ready_line
    server.run(sockets=[listener])


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        cli()
    except UserError as error:
        print(f"draft-serve: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
