"""Finished requests of the engine as rows of captured traffic. Imported by servers that capture only."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry

from draft.data.capture import Captured, CapturedTarget
from serving.backend import Backend
from serving.capture import CaptureCollector, CaptureWriter
from serving.engine import Completion, Request


class Capturing:
    """Capture of one engine's requests by a writer."""

    def __init__(self, writer: CaptureWriter) -> None:
        self._writer = writer
        self.close, self.figures = writer.close, writer.figures

    def start(self, engine: Backend, name: str) -> None:
        """Begin to write; name: of the target. Raises UserError where the folder is another target's."""
        target = engine.target
        self._writer.start(CapturedTarget(name, target.fingerprint, target.vocab_size, engine.weights))

    def count(self, registry: CollectorRegistry, prefix: str) -> None:
        """Add the writer's counters to a registry of metrics."""
        collector: Any = CaptureCollector(self._writer, prefix)
        registry.register(collector)

    def watch(self, requests: Iterable[Request]) -> None:
        """Capture the requests of one client's call when they end, if they are drawn.

        Those that fail, are cancelled, or have no token are left out.
        """
        if not self._writer.chosen():
            return

        def ended(request: Request, future: Future[Completion]) -> None:  # in the engine's thread
            if future.cancelled() or future.exception() is not None:
                return
            completion = future.result()
            if completion.finish_reason != "cancelled" and completion.token_ids:
                self._writer.add(_row(request, completion))

        for request in requests:
            request.future.add_done_callback(partial(ended, request))


def _row(request: Request, completion: Completion) -> Captured:
    params, stats = request.params, completion.stats
    penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    return Captured(
        time=time.time(),
        prompt_ids=request.prompt_ids,
        answer_ids=completion.token_ids,
        temperature=params.temperature,
        truncated=params.top_p < 1 or params.top_k > 0 or params.min_p > 0,
        altered=penalties != (1, 0, 0) or bool(params.logit_bias or params.min_new_tokens or params.ignore_eos),
        finish_reason=completion.finish_reason,
        head=stats.head,
        head_fingerprint=stats.head_fingerprint,
        drafted=stats.drafted,
        accepted=stats.accepted,
        emitted=stats.emitted,
        verifications=stats.verifications,
    )
