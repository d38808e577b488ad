"""draft-serve: a target and its draft head behind HTTP."""

from __future__ import annotations

import logging
import os
import ssl
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from draft.errors import UserError, file_trouble
from serving.server import Listener, serve_until_stopped

if TYPE_CHECKING:
    from serving.engine import Engine

# \b keeps the lines as they are
_EXAMPLES = """\b
Examples:
  draft-serve --head smollm2-eagle3
      the bundled target and head, on http://127.0.0.1:8000
  draft-serve --target ./my-llama --head ./my-head --host 0.0.0.0 --port 9000
  curl localhost:8000/generate -H 'content-type: application/json' \\
      -d '{"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40}}'
"""

_KEY_VARIABLE = "DRAFTSMITH_API_KEY"

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Rule(StrEnum):
    """How drafted tokens are judged."""

    shared_noise = "shared-noise"
    rejection = "rejection"


class Drafting(StrEnum):
    """When tokens are drafted, and in which shape."""

    auto = "auto"
    chain = "chain"
    tree = "tree"
    off = "off"


class Mode(StrEnum):
    """How the models' steps are run."""

    auto = "auto"
    compiled = "compiled"
    eager = "eager"


class ClientCertificate(StrEnum):
    """Whether clients show one."""

    none = "none"
    optional = "optional"
    required = "required"


@cli.command(epilog=_EXAMPLES)
def serve(
    target: Annotated[str, typer.Option(help="A hub id, a folder, a .gguf file, or smollm2 (bundled).")] = "smollm2",
    target_adapter: Annotated[
        str | None, typer.Option(help="A PEFT LoRA adapter of the target, merged in memory: a folder.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="A folder, or smollm2-eagle3 (bundled). Without: plain decoding.")
    ] = None,
    speculation: Annotated[
        Drafting, typer.Option(help="auto: what is measured to be fastest, at every step.")
    ] = Drafting.auto,
    speculation_length: Annotated[int, typer.Option(min=1, help="Tokens drafted in a row, at most.")] = 5,
    tree_size: Annotated[int, typer.Option(min=1, help="Nodes of a tree of drafted tokens, at most.")] = 16,
    rule: Annotated[Rule, typer.Option(help="Both are lossless; see the README.")] = Rule.shared_noise,
    mode: Annotated[Mode, typer.Option(help="Compiled steps, or eager ones, which start at once.")] = Mode.auto,
    attention: Annotated[str, typer.Option(help="auto, eager, sdpa, flex or flash_attention_2.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32 or float64.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads for the arithmetic.")] = None,
    warm_up: Annotated[bool, typer.Option(help="Compile, and time steps, before the first request.")] = True,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests decoded at once.")] = 16,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer. Default: the target's context.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests in line before new ones get 429.")] = 256,
    max_waiting_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens, asked for and to be read, in line before new ones get 429.")
    ] = None,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Tokens of prompts that are read in one step.")] = 128,
    max_new_tokens_limit: Annotated[
        int | None,
        typer.Option(min=1, help="The most a request may ask for. Default: what the context holds."),
    ] = None,
    request_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds from a request's receipt to its end; 0: no limit.")
    ] = 600.0,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 2_000_000,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="After SIGTERM, for what runs to finish; containers are killed after 10.")
    ] = 8.0,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar=_KEY_VARIABLE, help="Asked of clients; the variable is not seen in ps."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Whose pages may use the server from a browser; repeatable.")
    ] = None,
    strict_model_name: Annotated[
        bool, typer.Option("--strict-model-name", help="404 for other model names on /v1.")
    ] = False,
    metrics_prefix: Annotated[
        str, typer.Option(help="vllm lets existing dashboards and vllm bench serve read /metrics.")
    ] = "draftsmith",
    ssl_certfile: Annotated[Path | None, typer.Option(help="Serve HTTPS with this certificate.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its key, where it is another file.")] = None,
    ssl_keyfile_password: Annotated[
        str | None, typer.Option(envvar="DRAFTSMITH_SSL_KEYFILE_PASSWORD", help="Of the key.")
    ] = None,
    ssl_ca_certs: Annotated[
        Path | None, typer.Option(help="Whose certificates of clients are taken: a file of authorities.")
    ] = None,
    ssl_cert_reqs: Annotated[
        ClientCertificate | None,
        typer.Option(help="Whether clients need a certificate. Default: required with --ssl-ca-certs, none without."),
    ] = None,
) -> None:
    """Serve a target, and the draft head that makes it faster, over HTTP."""
    _check_key(api_key)
    _check_prefix(metrics_prefix)
    tls = _tls(ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs, ssl_cert_reqs)
    with Listener(host, port) as listener:  # before the model is loaded, which takes longer than finding the port taken
        from serving.api.app import create_app  # here, so that --help does not wait for torch
        from serving.api.middleware import Limits

        app = create_app(
            None,
            head_name=head,
            limits=Limits(
                max_new_tokens=max_new_tokens_limit,
                max_body_bytes=max_body_bytes,
                request_seconds=request_timeout or None,
            ),
            api_key=api_key,
            cors_origins=cors_origin or (),
            strict_model_name=strict_model_name,
            metrics_prefix=metrics_prefix,
        )

        def load() -> Engine:
            return load_engine(
                target,
                head,
                dtype,
                target_adapter=target_adapter,
                warm_up=warm_up,
                speculation=str(speculation),
                speculation_length=speculation_length,
                tree_size=tree_size,
                rule=str(rule),
                mode=str(mode),
                attention=attention,
                threads=threads,
                max_batch=max_batch,
                max_length=max_length,
                max_waiting=max_waiting,
                max_waiting_tokens=max_waiting_tokens,
                prefill_chunk=prefill_chunk,
            )

        model = f"{target} + {target_adapter}" if target_adapter else target
        what = f"{model} with {head}, K = {speculation_length}, {rule}" if head else f"{model} without a draft head"
        address = listener.url("https" if tls else "http")
        serve_until_stopped(app, load, listener, f"serving {what} on {address}", drain_seconds, tls)


def load_engine(
    target: str,
    head: str | None,
    dtype: str,
    *,
    target_adapter: str | None = None,
    warm_up: bool,
    threads: int | None,
    **options: Any,
) -> Engine:
    """An engine that is ready to be started; options: of Engine.

    Raises:
        UserError: when the target or the head cannot be loaded, do not fit each other, or an option is out of range.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from draft.heads.checkpoint import attach_head, load_head
    from draft.target import load_target
    from serving.engine import Engine
    from serving.engine.setup import decoding_dtype

    if threads is not None:
        torch.set_num_threads(threads)
    if not sys.stderr.isatty():
        disable_progress_bar()
    loaded = load_target(target, decoding_dtype(dtype, options["mode"]), adapter=target_adapter)
    draft_head = None
    if head is not None:
        draft_head, about = load_head(head, dtype=loaded.dtype, device=loaded.device)
        attach_head(draft_head, about, loaded)
    engine = Engine(loaded, draft_head, threads=threads, **options)
    if warm_up:
        engine.warm_up()
    return engine


def _check_key(key: str | None) -> None:
    if key is None and os.environ.get(_KEY_VARIABLE) == "":  # a secret that was not filled in is not to open the server
        raise UserError(f"{_KEY_VARIABLE} is empty; put the key into it, or unset it for no key.")
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise UserError("--api-key must be printable ASCII characters without spaces around; leave it out for no key.")


def _check_prefix(prefix: str) -> None:
    if not (prefix.isascii() and prefix.isidentifier()):
        raise UserError(f"--metrics-prefix {prefix!r} must be letters, digits and underscores, such as vllm.")


def _tls(
    certificate: Path | None,
    key: Path | None,
    password: str | None,
    authorities: Path | None,
    clients: ClientCertificate | None,
) -> dict[str, Any]:
    """uvicorn's options for HTTPS; none for HTTP."""
    if certificate is None:
        if any(each is not None for each in (key, password, authorities, clients)):
            raise UserError("--ssl-keyfile, --ssl-ca-certs and --ssl-cert-reqs need --ssl-certfile.")
        return {}
    files = {"--ssl-certfile": certificate, "--ssl-keyfile": key, "--ssl-ca-certs": authorities}
    for flag, path in files.items():
        if path is not None and not path.is_file():
            raise UserError(f"{flag} {path}: no such file.")
    wanted = clients or (ClientCertificate.required if authorities else ClientCertificate.none)
    if authorities is None and wanted is not ClientCertificate.none:
        raise UserError(f"--ssl-cert-reqs {wanted} needs --ssl-ca-certs, the authorities of the clients' certificates.")
    return {
        "ssl_certfile": str(certificate),
        "ssl_keyfile": str(key) if key is not None else None,
        "ssl_keyfile_password": password,
        "ssl_ca_certs": str(authorities) if authorities is not None else None,
        "ssl_cert_reqs": ssl.VerifyMode[f"CERT_{wanted.upper()}"],
    }


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit status 2."""
    from serving.api.middleware import log_as_json

    log_as_json(logging.INFO)
    try:
        cli()
    except Exception as error:
        mistake = str(error) if isinstance(error, UserError) else file_trouble(error)
        if mistake is None:
            raise
        print(f"draft-serve: {mistake}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
