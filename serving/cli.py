"""draft-serve: a target and its draft head behind HTTP."""

from __future__ import annotations

import logging
import os
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from draft.errors import UserError, file_trouble
from draft.launcher import end_with_starter
from serving.names import check_head_name
from serving.server import Listener, serve_until_stopped

if TYPE_CHECKING:
    from draft.target import TextTarget
    from serving.backend import Backend
    from serving.engine import Engine
    from serving.upstream.child import VllmServer

# \b keeps the lines as they are
_EXAMPLES = """\b
Examples:
  draft-serve --head smollm2-eagle3
      the bundled target and head, on http://127.0.0.1:8000
  draft-serve --target ./my-llama --head ./my-head --host 0.0.0.0 --port 9000
  draft-serve --head base=smollm2-eagle3 --head sql=./my-head --route auto
      two heads; each request gets the one that is accepted best for its system prompt
  curl localhost:8000/generate -H 'content-type: application/json' \\
      -d '{"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40}}'
  draft-serve --engine vllm --target meta-llama/Llama-3.1-8B-Instruct --head ./my-head -- --tensor-parallel-size 4
      vLLM, started with the exported head, behind this API; the options after -- are vLLM's
  draft-serve --upstream http://10.0.0.5:8000 --target meta-llama/Llama-3.1-8B-Instruct --head ./my-head
      a vLLM or SGLang that runs already, behind this API
"""

_KEY_VARIABLE = "DRAFTSMITH_API_KEY"
# parameters of `serve` that only the built-in engine has
_BUILT_IN = (
    "target_adapter", "speculation", "tree_size", "lookup", "rule", "mode", "arithmetic", "weights", "head_weights",
    "dtype", "route", "threads", "warm_up", "self_check", "max_length", "kv_cache_memory", "max_waiting_tokens",
    "prefill_chunk",
)  # fmt: skip

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

ClientCertificate = Literal["none", "optional", "required"]

# Options of the command: what answers,
EngineName = Annotated[
    Literal["built-in", "vllm"],
    Option("--engine", help="What decodes: the built-in engine, or a vLLM started here."),
]
UpstreamUrl = Annotated[
    str | None,
    Option(metavar="URL", help="A vLLM, SGLang or draft-serve that decodes instead, with this target."),
]
UpstreamKey = Annotated[
    str | None, Option(envvar="DRAFTSMITH_UPSTREAM_KEY", help="Key that the server at --upstream wants.")
]
VllmOptions = Annotated[list[str] | None, Argument(metavar="[-- VLLM OPTIONS]", help="Options of --engine vllm.")]
# the models and how they draft,
Target = Annotated[str, Option(help="Target: a hub id, a folder, a .gguf file, or smollm2 (bundled).")]
TargetAdapter = Annotated[str | None, Option(help="Folder of a PEFT LoRA adapter, merged into the target.")]
ChatTemplate = Annotated[Path | None, Option(help="File of a Jinja chat template. Default: the target's own.")]
HeadFolders = Annotated[
    list[str] | None,
    Option(
        metavar="[NAME=]FOLDER",
        help="Draft head: a folder, or smollm2-eagle3 (bundled). Repeatable; the first is the default, and the name is "
        "the folder's where none is given. Default: none, drafts by lookup only.",
    ),
]
Route = Annotated[
    Literal["default", "auto"],
    Option(
        help="Head of requests that name none: the default one, or the one that is accepted best for prompts of their "
        "kind (of one system prompt)."
    ),
]
Drafting = Annotated[
    Literal["auto", "chain", "tree", "off"],
    Option(help="Drafts of the head; auto takes the fastest by measurement, at every step, lookup included."),
]
DraftLength = Annotated[int, Option(min=1, help="Maximum number of tokens that the head drafts in a row.")]
TreeSize = Annotated[int, Option(min=1, help="Maximum number of nodes in a tree of drafted tokens.")]
Lookup = Annotated[bool, Option(help="Let auto copy drafts from the prompt and the answer so far.")]
Rule = Annotated[
    Literal["shared-noise", "rejection"], Option(help="Lossless rule that accepts drafted tokens when sampling.")
]
# how the engine computes, and how much at once,
Mode = Annotated[
    Literal["auto", "compiled", "eager"],
    Option(help="Execution of the models: with compiled CPU kernels, or eager."),
]
Arithmetic = Annotated[
    Literal["auto", "float32", "bf16", "amx"],
    Option(help="Products of bfloat16 weights in the compiled kernels; auto takes the fastest that the CPU has."),
]
_Formats = Literal["auto", "float", "int8", "int4"]
Weights = Annotated[
    _Formats,
    Option(help="Matrices of the target in compiled mode; with int8 and int4 the answers are the rounded target's."),
]
HeadWeights = Annotated[
    _Formats, Option(help="Matrices of the head in compiled mode; auto is int8, which changes no answer.")
]
Dtype = Annotated[str, Option(help="Format of the weights: auto, bfloat16, float16, float32 or float64.")]
Threads = Annotated[int | None, Option(min=1, max=1024, help="Number of CPU threads that compute.")]
WarmUp = Annotated[bool, Option(help="Time steps before the first request.")]
SelfCheck = Annotated[bool, Option(help="Check at the start that the target accepts the head's drafts.")]
MaxBatch = Annotated[int, Option(min=1, help="Maximum number of requests decoded at once.")]
MaxLength = Annotated[
    int | None, Option(min=2, help="Maximum number of tokens of prompt and answer. Default: the target's context.")
]
CacheMemory = Annotated[
    str | None,
    Option(metavar="SIZE", help="Memory of the KV cache, such as 4GB. Default: most of what the models leave free."),
]
MaxWaiting = Annotated[int, Option(min=0, help="Maximum number of queued requests; others get status 429.")]
MaxWaitingTokens = Annotated[
    int | None, Option(min=1, help="Maximum number of queued tokens, of prompts and requested answers.")
]
PrefillChunk = Annotated[int, Option(min=1, help="Maximum number of prompt tokens read in one step.")]
# limits of a request,
MaxNewTokens = Annotated[
    int | None, Option(min=1, help="Maximum number of tokens to generate. Default: what the context holds.")
]
RequestTimeout = Annotated[
    float, Option(min=0, help="Seconds from a request's receipt to the end of its answer; 0: no limit.")
]
MaxBodyBytes = Annotated[int, Option(min=1, help="Maximum request body size in bytes.")]
DrainSeconds = Annotated[
    float, Option(min=0, help="Seconds for running requests to finish after SIGTERM; Docker kills after 10.")
]
# what is kept of requests,
Capture = Annotated[
    Path | None,
    Option(help="Folder to write the token ids of finished requests to, for draft-train. Default: nothing is kept."),
]
CaptureLimit = Annotated[str, Option(metavar="SIZE", help="Size of that folder; beyond it the oldest are dropped.")]
CaptureShare = Annotated[float, Option(help="Share of the requests that is captured, drawn at random.")]
# and the address, the clients and their encryption.
Host = Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all interfaces.")]
Port = Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 takes a free one and prints it.")]
ApiKey = Annotated[
    str | None,
    Option(envvar=_KEY_VARIABLE, help="Key that clients must send; the variable keeps it out of the process list."),
]
CorsOrigins = Annotated[
    list[str] | None, Option(help="Origin of pages that may use the server from a browser; repeatable.")
]
StrictModelName = Annotated[bool, Option("--strict-model-name", help="Answer 404 to other model names.")]
MetricsPrefix = Annotated[
    str, Option(help="Prefix of the metrics' names; vllm is for existing dashboards and vllm bench serve.")
]
SslCertificate = Annotated[Path | None, Option(help="Certificate file; the server then speaks HTTPS.")]
SslKey = Annotated[Path | None, Option(help="File of the certificate's private key, if it is another.")]
SslPassword = Annotated[
    str | None, Option(envvar="DRAFTSMITH_SSL_KEYFILE_PASSWORD", help="Password of the private key file.")
]
SslAuthorities = Annotated[Path | None, Option(help="File of the authorities that sign client certificates.")]
SslClients = Annotated[
    ClientCertificate | None,
    Option(help="Demand for client certificates. Default: required with --ssl-ca-certs, none without."),
]


@cli.command(epilog=_EXAMPLES)
def serve(
    context: typer.Context,
    vllm_options: VllmOptions = None,
    engine: EngineName = "built-in",
    upstream: UpstreamUrl = None,
    upstream_key: UpstreamKey = None,
    target: Target = "smollm2",
    target_adapter: TargetAdapter = None,
    chat_template: ChatTemplate = None,
    head: HeadFolders = None,
    route: Route = "default",
    speculation: Drafting = "auto",
    speculation_length: DraftLength = 5,
    tree_size: TreeSize = 16,
    lookup: Lookup = True,
    rule: Rule = "shared-noise",
    mode: Mode = "auto",
    arithmetic: Arithmetic = "auto",
    weights: Weights = "auto",
    head_weights: HeadWeights = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    warm_up: WarmUp = True,
    self_check: SelfCheck = True,
    max_batch: MaxBatch = 16,
    max_length: MaxLength = None,
    kv_cache_memory: CacheMemory = None,
    max_waiting: MaxWaiting = 256,
    max_waiting_tokens: MaxWaitingTokens = None,
    prefill_chunk: PrefillChunk = 128,
    max_new_tokens_limit: MaxNewTokens = None,
    request_timeout: RequestTimeout = 600.0,
    max_body_bytes: MaxBodyBytes = 2_000_000,
    drain_seconds: DrainSeconds = 8.0,
    capture: Capture = None,
    capture_limit: CaptureLimit = "1GB",
    capture_share: CaptureShare = 1.0,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    cors_origin: CorsOrigins = None,
    strict_model_name: StrictModelName = False,
    metrics_prefix: MetricsPrefix = "draftsmith",
    ssl_certfile: SslCertificate = None,
    ssl_keyfile: SslKey = None,
    ssl_keyfile_password: SslPassword = None,
    ssl_ca_certs: SslAuthorities = None,
    ssl_cert_reqs: SslClients = None,
) -> None:
    """Serve a target, and the draft head that makes it faster, over HTTP."""
    _check_words(api_key, metrics_prefix)
    heads = named_heads(head or [])
    _check_engine(context, engine, upstream, heads, vllm_options or [])
    tls = _tls(ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs, ssl_cert_reqs)
    limit = _size(capture_limit, "--capture-limit")
    with Listener(host, port) as listener:  # before the model is loaded, which takes longer than finding the port taken
        from serving.api.app import Limits, create_app  # here, so that --help does not wait for torch
        from serving.api.middleware import log_as_json

        log_as_json()
        limits = Limits(max_new_tokens_limit, max_body_bytes, request_seconds=request_timeout or None)
        access: Any = dict(api_key=api_key, strict_model_name=strict_model_name, cors_origins=cors_origin or ())
        writer = None
        if capture is not None:
            from serving.capture import CaptureWriter

            writer = CaptureWriter(capture, limit=limit, share=capture_share)
        app = create_app(
            None, limits=limits, metrics_prefix=metrics_prefix, loopback=listener.is_loopback, capture=writer, **access
        )  # fmt: skip
        child = None
        drafter = f"with {', '.join(head)}, K = {speculation_length}, {rule}" if head else "without a draft head"
        load: Callable[[], Backend] = partial(
            load_engine, target, heads, dtype, target_adapter=target_adapter, chat_template=chat_template, route=route,
            warm_up=warm_up, self_check=self_check, mode=mode, threads=threads, arithmetic=arithmetic, weights=weights,
            head_weights=head_weights, speculation=speculation, speculation_length=speculation_length,
            tree_size=tree_size, lookup=lookup, rule=rule, max_batch=max_batch, max_length=max_length,
            kv_cache_memory=kv_cache_memory, prefill_chunk=prefill_chunk, max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens,
        )  # fmt: skip
        if engine == "vllm" or upstream is not None:
            drafter = f"{f'with {head[0]} ' if head else ''}by {'vLLM' if upstream is None else 'the server upstream'}"
            load, child = _elsewhere(
                upstream, target, heads, speculation_length, vllm_options or [], key=upstream_key,
                chat_template=chat_template, max_requests=max_batch + max_waiting,
            )  # fmt: skip
        models, url = " + ".join(filter(None, (target, target_adapter))), listener.url("https" if tls else "http")
        ready = f"serving {models} {drafter} on {url}" + (f"; capturing {writer}" if writer else "")
        serve_until_stopped(app, load, listener, ready, drain_seconds, tls, child)


def _elsewhere(
    upstream: str | None,
    target: str,
    heads: Mapping[str, str],
    length: int,
    vllm_options: list[str],
    **options: Any,
) -> tuple[Callable[[], Backend], VllmServer | None]:
    """Return what waits for the server that decodes, and that server where it is started here.

    heads: one at most; options: of `load_upstream`.
    """
    from serving.upstream import load_upstream
    from serving.upstream.child import VllmServer

    head = next(iter(heads.items()), None)
    if upstream is not None:
        return partial(load_upstream, upstream, target, head, **options), None
    child = VllmServer(target, None if head is None else head[1], length, vllm_options)
    return partial(load_upstream, child.url, target, head, check=child.check, **options), child


def load_engine(
    target: str,
    head: str | Mapping[str, str] | None,
    dtype: str,
    *,
    target_adapter: str | None = None,
    chat_template: Path | None = None,
    warm_up: bool,
    self_check: bool = False,
    threads: int | None,
    kv_cache_memory: str | None = None,
    **options: Any,
) -> Engine:
    """Return an engine that is ready to be started.

    head: a folder, or several by the heads' names; kv_cache_memory: with a unit; options: of Engine.

    Raises:
        UserError: when the target or the head cannot be loaded, do not fit each other, or an option is out of range.
    """
    import torch

    from draft.heads.checkpoint import load_unchanged_head
    from draft.target import load_target, read_chat_template
    from serving.engine import Engine
    from serving.engine.setup import decoding_dtype

    memory = None if kv_cache_memory is None else _size(kv_cache_memory, "--kv-cache-memory")
    if threads is not None:
        torch.set_num_threads(threads)
    template = None if chat_template is None else read_chat_template(chat_template)
    wanted = decoding_dtype(dtype, options["mode"], target, options.get("weights", "auto"))
    loaded = load_target(target, wanted, adapter=target_adapter)
    if template is not None:
        loaded.use_chat_template(template)
    _report_template(loaded)
    folders = named_heads([head]) if isinstance(head, str) else head or {}
    heads = {name: load_unchanged_head(folder, loaded) for name, folder in folders.items()}
    engine = Engine(loaded, heads, threads=threads, pack_in_place=True, kv_cache_memory=memory, **options)
    logging.getLogger(__name__).info("KV cache: %s", engine.models.cache_size)
    if warm_up:
        engine.warm_up()
    engine.checks_heads = self_check
    if self_check:
        engine.self_check()
    return engine


def named_heads(words: Sequence[str]) -> dict[str, str]:
    """Return the folders of heads by their names, of words as `--head` takes them.

    Raises:
        UserError: for a name that none can have, or two heads of one name.
    """
    folders: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).exists():
            name, folder = Path(word).expanduser().resolve().name, word
        check_head_name(name)
        if name in folders:
            raise UserError(f"--head {word!r}: there is a head {name!r} already; name it: --head NAME=FOLDER.")
        folders[name] = folder
    return folders


def _report_template(target: TextTarget) -> None:
    """Log what the target's chat template does not render of conversations."""
    from draft.target import template_faults

    try:
        faults = template_faults(target.tokenizer, target.template_for())
    except UserError as error:
        logging.getLogger(__name__).warning("chats are refused: %s", error)
    else:
        for fault in faults:
            logging.getLogger(__name__).warning("the target's chat template %s", fault)


def _size(text: str, option: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        raise UserError(f"{option} {text!r} is not a size; give a number with a unit, such as 4GB.") from error


def _check_engine(
    context: typer.Context, engine: str, upstream: str | None, heads: Mapping[str, str], vllm_options: list[str]
) -> None:
    """Refuse options that would have no effect on what decodes."""
    if upstream is not None and engine != "built-in":
        raise UserError(f"--engine {engine} starts a server, and --upstream {upstream} is one; give one of the two.")
    if vllm_options and engine != "vllm":
        raise UserError(f"{vllm_options[0]!r} is no option of draft-serve; those of vLLM need --engine vllm.")
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    if upstream is None and "upstream_key" in given:
        raise UserError("--upstream-key needs --upstream.")
    if upstream is None and engine == "built-in":
        return
    elsewhere = f"--engine {engine}" if upstream is None else "--upstream"
    if len(heads) > 1:
        raise UserError(f"--head is given {len(heads)} times, and {elsewhere} drafts with one head; give one.")
    for name in _BUILT_IN if upstream is None else (*_BUILT_IN, "speculation_length"):
        if name in given:
            option = f"--{name.replace('_', '-')}"
            instead = "give vLLM's own after --" if upstream is None else "give that server its own"
            raise UserError(f"{option} is of the built-in engine, and has no effect with {elsewhere}; {instead}.")


def _check_words(key: str | None, prefix: str) -> None:
    if not (prefix.isascii() and prefix.isidentifier()):
        raise UserError(f"--metrics-prefix {prefix!r} must be letters, digits and underscores, such as vllm.")
    if key is None and os.environ.get(_KEY_VARIABLE) == "":  # a secret that was not filled in is not to open the server
        raise UserError(f"{_KEY_VARIABLE} is empty; put the key into it, or unset it for no key.")
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise UserError("--api-key must be printable ASCII characters without spaces around; leave it out for no key.")


def _tls(
    certificate: Path | None,
    key: Path | None,
    password: str | None,
    authorities: Path | None,
    clients: ClientCertificate | None,
) -> dict[str, Any]:
    """Return uvicorn's options for HTTPS; none for HTTP."""
    if certificate is None:
        if any(each is not None for each in (key, password, authorities, clients)):
            raise UserError("--ssl-keyfile, --ssl-ca-certs and --ssl-cert-reqs need --ssl-certfile.")
        return {}
    demand = clients or ("required" if authorities else "none")
    if authorities is None and demand != "none":
        raise UserError(f"--ssl-cert-reqs {demand} needs --ssl-ca-certs, the authorities of the clients' certificates.")
    return {
        "ssl_certfile": certificate,
        "ssl_keyfile": key,
        "ssl_keyfile_password": password,
        "ssl_ca_certs": authorities,
        "ssl_cert_reqs": ssl.VerifyMode[f"CERT_{demand.upper()}"],
    }


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit status 2."""
    end_with_starter()
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
