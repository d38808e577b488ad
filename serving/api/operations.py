"""Routes for operators and browsers, none of which waits for generation: health, figures, tokens, the page."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from pydantic_core import to_jsonable_python

from serving.api import schemas
from serving.api.errors import RETRY, ApiError
from serving.api.service import Service
from serving.engine.sampling import MAX_LOGPROBS
from serving.names import public_name

router = APIRouter(tags=["operations"], responses=schemas.ERRORS)

_SCRIPTS = ("api.js", "figures.js", "view.js", "main.js")  # one after the other, in one module


class TokenizeRequest(schemas.Strict):
    """Body of POST /tokenize."""

    inputs: schemas.Prompt = Field(examples=["Once upon a time"])
    add_special_tokens: bool | None = None


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 while a restart would not help; 503 once the engine's thread has ended."""
    service: Service = request.app.state.service
    if service.stage == "unhealthy":
        raise ApiError("healthcheck", "unhealthy", headers=RETRY)
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """200 while requests are taken; 503 while the model is loaded, the server upstream is away, or this one drains."""
    service: Service = request.app.state.service
    if service.stage != "ready":
        raise ApiError("healthcheck", service.stage, headers=RETRY)
    return {"status": service.stage}


@router.get("/info")
async def info(request: Request) -> dict[str, Any]:
    """The target, the draft head, the limits, the versions, and the engine's decisions about speculation."""
    service: Service = request.app.state.service
    engine, target, head = service.engine, service.engine.target, service.engine.head
    check, every = engine.watch.check, schemas.SpeculativeWithOrigin.model_fields
    return {
        "model_id": service.model_name,
        "target_adapter": target.adapter and public_name(target.adapter.name),
        "architecture": target.architecture,
        "dtype": engine.dtype,
        "device": engine.device,
        "chat_template": bool(target.chat_template or target.tokenizer.chat_template),
        "head": head
        and {
            "name": engine.head_name,
            "architecture": head.stored_as,
            "draft_vocab_size": head.config.draft_vocab_size,
            "self_check": check and to_jsonable_python(check.figures(), inf_nan_mode="null"),
            "degraded": engine.watch.degraded,
        },
        "speculation": engine.speculation,
        "speculative_fields": sorted(every if (taken := engine.speculative_fields) is None else taken),
        "speculation_length": engine.head_length,
        "tree_size": engine.tree_size,
        "lookup_length": engine.lookup_length,
        "rule": engine.rule,
        "limits": {
            "max_total_tokens": engine.max_length,
            "max_new_tokens": service.max_new_tokens,
            "max_concurrent_requests": engine.max_batch,
            "max_waiting_requests": engine.max_waiting,
            "max_waiting_tokens": engine.max_waiting_tokens,
            "max_draft_tokens": engine.longest_draft,
            "max_stop_sequences": schemas.MAX_STOP_SEQUENCES,
            "max_stop_characters": schemas.MAX_STOP_CHARACTERS,
            "max_top_n_tokens": schemas.MAX_TOP_N_TOKENS,
            "max_logprobs": MAX_LOGPROBS,
            "max_choices": service.max_choices,
            "max_body_bytes": service.limits.max_body_bytes,
            "request_seconds": service.limits.request_seconds,
        },
        "engine": to_jsonable_python(engine.stats(), inf_nan_mode="null"),  # JSON has no NaN
        "capture": service.capture and service.capture.figures(),
        "version": package_version(),
        "versions": {name: package_version(name) for name in ("draftsmith", "torch", "transformers")},
    }


def package_version(name: str = "draftsmith") -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    service: Service = request.app.state.service
    text = service.metrics.exposition() if service.metrics is not None else b""
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> list[dict[str, Any]]:
    """The tokens of a text, as /generate would read it; start, stop: characters of the text."""
    service: Service = request.app.state.service
    special = body.add_special_tokens is not False
    encoded = await service.encode(body.inputs, "inputs", add_special_tokens=special, return_offsets_mapping=True)
    tokens = []
    for token_id, (start, stop) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        text = body.inputs[start:stop] or service.token_text(token_id)[0]
        tokens.append({"id": token_id, "text": text, "start": start, "stop": stop})
    return tokens


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> Response:
    """The page that shows speculation at work: it holds no data, and requests the public API as any client does."""
    document, policy = _document()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(document, media_type="text/html; charset=utf-8", headers=headers)


@cache
def _document() -> tuple[str, str]:
    """Return the page with its style and script in it, and the policy which lets browsers run those two only."""
    folder = files("serving") / "page"
    style = (folder / "style.css").read_text("utf-8")
    script = "".join((folder / name).read_text("utf-8") for name in _SCRIPTS)
    document = (folder / "index.html").read_text("utf-8")
    document = document.replace("/* style */", style).replace("/* script */", script)

    def hashed(text: str) -> str:
        return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = {
        "default-src": "'none'",
        "script-src": hashed(script),
        "style-src": hashed(style),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # no text of an answer ever becomes markup
    }
    return document, "; ".join(f"{name} {value}" for name, value in policy.items())
