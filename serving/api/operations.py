"""What operators ask: is it alive, is it ready, what does it serve, how is it doing. Never behind generation."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from serving.api.documentation import documented
from serving.api.errors import RETRY, ApiError
from serving.api.schemas import (
    MAX_STOP_CHARACTERS,
    MAX_STOP_SEQUENCES,
    MAX_TOP_N_TOKENS,
    ErrorResponse,
    Prompt,
    Strict,
    described,
)
from serving.api.service import Names, Service, encode, public_name
from serving.engine import Engine
from serving.engine.sampling import MAX_LOGPROBS

router = APIRouter(tags=["operations"])

_GUARDED = (401, 503)


class Status(BaseModel):
    status: str


class TokenizeRequest(Strict):
    """Body of POST /tokenize."""

    model_config = described(example={"inputs": "Once upon a time"})

    inputs: Prompt
    add_special_tokens: bool | None = None


class TokenOfText(BaseModel):
    """start, stop: characters of the text."""

    id: int
    text: str
    start: int
    stop: int


@router.get("/health", responses={503: {"model": ErrorResponse}})
async def health(request: Request) -> Status:
    """200 while a restart would not help; 503 once the engine's thread has ended."""
    service: Service = request.app.state.service
    if not service.alive:
        raise ApiError("healthcheck", "unhealthy", headers=RETRY)
    return Status(status="ok")


@router.get("/ready", responses=documented(ErrorResponse, (503,)))
async def ready(request: Request) -> Status:
    """200 while requests are taken; 503 while the model is loaded, and while the server finishes what runs."""
    service: Service = request.app.state.service
    why = "draining" if service.draining else "loading" if not service.loaded else "" if service.alive else "unhealthy"
    if why:
        raise ApiError("healthcheck", why, headers=RETRY)
    return Status(status="ready")


@router.get("/info", responses=documented(ErrorResponse, _GUARDED))
async def info(request: Request) -> dict[str, Any]:
    """The target, the head, the limits, the versions, and how the engine decides about speculation."""
    service: Service = request.app.state.service
    engine, target = service.engine, service.engine.target
    return {
        "model_id": service.model_name,
        "target_adapter": target.adapter and public_name(target.adapter.name),
        "architecture": type(target.model).__name__,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": target.device.type,
        "chat_template": bool(target.tokenizer.chat_template),
        "head": _about_head(service),
        "speculation": engine.speculation,
        "speculation_length": service.speculation_length,
        "rule": engine.rule,
        "limits": {
            "max_total_tokens": engine.max_length,
            "max_new_tokens": service.max_new_tokens,
            "max_concurrent_requests": engine.max_batch,
            "max_waiting_requests": engine.max_waiting,
            "max_waiting_tokens": engine.max_waiting_tokens,
            "max_stop_sequences": MAX_STOP_SEQUENCES,
            "max_stop_characters": MAX_STOP_CHARACTERS,
            "max_top_n_tokens": MAX_TOP_N_TOKENS,
            "max_logprobs": MAX_LOGPROBS,
            "max_choices": service.max_choices,
            "max_body_bytes": service.limits.max_body_bytes,
            "request_seconds": service.limits.request_seconds,
        },
        "engine": _engine_stats(engine),
        "version": package_version(),
        "versions": {name: package_version(name) for name in ("draftsmith", "torch", "transformers")},
    }


@router.get("/metrics", response_class=PlainTextResponse, responses=documented(ErrorResponse, _GUARDED))
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service: Service = request.app.state.service
    text = service.metrics.exposition() if service.metrics is not None else b""
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.post("/tokenize", responses=documented(ErrorResponse, (400, 401, 408, 413, 415, 422, 503)))
async def tokenize(body: TokenizeRequest, request: Request) -> list[TokenOfText]:
    """The tokens of a text, as /generate would read it."""
    service: Service = request.app.state.service
    special = body.add_special_tokens is not False
    ids = await encode(service, body.inputs, Names("inputs", ""), special_tokens=special)
    spans = await service.offsets(body.inputs, special_tokens=special)
    return [
        TokenOfText(
            id=token_id, text=body.inputs[start:stop] or service.token_text(token_id)[0], start=start, stop=stop
        )
        for token_id, (start, stop) in zip(ids, spans, strict=True)
    ]


def package_version(name: str = "draftsmith") -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def _about_head(service: Service) -> dict[str, Any] | None:
    head = service.engine.head
    if head is None:
        return None
    return {
        "name": service.head_name,
        "architecture": head.stored_as,
        "draft_vocab_size": head.config.draft_vocab_size,
    }


def _engine_stats(engine: Engine) -> Any:
    try:
        return _json_able(engine.stats())
    except RuntimeError:  # the engine's thread changed a table while it was read
        return None


def _json_able(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    match value:
        case dict():
            return {str(key): _json_able(each) for key, each in value.items()}
        case list() | tuple():
            return [_json_able(each) for each in value]
        case float():
            return value if math.isfinite(value) else None
    return value
