"""What operators ask: is it alive, what does it serve, how is it doing. None of it queues behind generation."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from draft.heads import ARCHITECTURES
from serving.api.metrics import Metrics
from serving.api.schemas import MAX_STOP_CHARACTERS, MAX_STOP_SEQUENCES, ApiError, ErrorResponse
from serving.api.worker import Worker
from serving.engine import Engine

router = APIRouter(tags=["operations"])


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    max_waiting: int = 64  # requests in the line behind the one that runs
    max_new_tokens: int | None = None  # None: as many as the context holds
    max_body_bytes: int = 2_000_000


class Service:
    """What the routes share: the engine behind its worker, the limits, the metrics."""

    def __init__(self, engine: Engine, head_name: str | None, limits: Limits) -> None:
        self.engine = engine
        self.head_name = head_name and public_name(head_name)
        self.limits = limits
        self.worker = Worker(engine, limits.max_waiting)
        self.metrics = Metrics(self.worker, engine.speculation_length if engine.head else 0)
        # one thread: a tokenizer may not be set up by two at once
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, off the event loop: two megabytes of text take a second."""
        tokenizer = self.engine.target.tokenizer
        return await asyncio.get_running_loop().run_in_executor(
            self._encoder, lambda: tokenizer(text, verbose=False).input_ids
        )

    def stop(self) -> None:
        self.worker.stop()
        self._encoder.shutdown(wait=False, cancel_futures=True)


def public_name(name: str) -> str:
    """A name that tells clients nothing of the machine's folders: a path's last part; hub ids stay whole."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else name


def package_version() -> str:
    try:
        return version("draftsmith")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


@router.get("/health", responses={503: {"model": ErrorResponse}})
async def health(request: Request) -> dict[str, str]:
    """200 while requests can be served; 503 once the engine's thread has ended."""
    service: Service = request.app.state.service
    if not service.worker.alive:
        raise ApiError(503, "healthcheck", "unhealthy")
    return {"status": "ok"}


@router.get("/info")
async def info(request: Request) -> dict[str, Any]:
    """The target, the head and the limits."""
    service: Service = request.app.state.service
    engine, target = service.engine, service.engine.target
    return {
        "model_id": public_name(target.name),
        "architecture": type(target.model).__name__,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": target.device.type,
        "head": _about_head(service),
        "speculation_length": engine.speculation_length if engine.head else 0,
        "rule": engine.rule,
        "limits": {
            "max_total_tokens": engine.max_length,
            "max_new_tokens": service.limits.max_new_tokens or engine.max_length,
            "max_waiting_requests": service.limits.max_waiting,
            "max_stop_sequences": MAX_STOP_SEQUENCES,
            "max_stop_characters": MAX_STOP_CHARACTERS,
            "max_body_bytes": service.limits.max_body_bytes,
        },
        "version": package_version(),
    }


def _about_head(service: Service) -> dict[str, Any] | None:
    head = service.engine.head
    if head is None:
        return None
    architecture = next(name for name, (_, built) in ARCHITECTURES.items() if isinstance(head, built))
    return {
        "name": service.head_name,
        "architecture": architecture,
        "draft_vocab_size": head.config.draft_vocab_size,
    }


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
