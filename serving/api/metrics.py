"""Prometheus metrics, in one registry per app.

The names after the prefix are those of vLLM, of which llama.cpp has the spec_decode ones too, so dashboards carry over.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from serving.engine import Completion, Engine, Request

PREFIX = "draftsmith"
# seconds; a small model answers in tenths of a second, a large one on a CPU in minutes
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_WAIT = (0.0001, 0.00025, 0.0005, *_LATENCY)
_FIRST_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160, 640)
_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
# name -> (description, buckets)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From receipt to the first token", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Between the steps that brought a request's tokens", _PER_TOKEN),
    "request_time_per_output_token_seconds": ("Decoding time / tokens after the first", _PER_TOKEN),
    "e2e_request_latency_seconds": ("From receipt to the end of generation", _LATENCY),
    "request_queue_time_seconds": ("Time in the queue", _WAIT),
    "request_prefill_time_seconds": ("From the end of the queue to the first token", _WAIT),
    "request_decode_time_seconds": ("From the first token to the last", _LATENCY),
    "request_prompt_tokens": ("Tokens of a prompt", _TOKENS),
    "request_generation_tokens": ("Tokens of an answer", _TOKENS),
}
FINISH_REASONS = ("length", "eos_token", "stop_sequence", "cancelled", "error")
# status of a request that got no answer -> reason
FAILURES = {
    **dict.fromkeys((400, 404, 413, 415, 422), "validation"),
    **dict.fromkeys((408, 504), "timeout"),
    **dict.fromkeys((424, 500), "generation"),
    429: "overloaded",
    499: "cancelled",
    503: "unavailable",
}


@dataclass
class _Watched:
    """A sequence that has not ended."""

    request: Request
    received: float
    began: bool = False  # its first token has been counted
    arrivals: int = 0  # so many of the gaps between them have been counted


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self, engine: Engine, *, prefix: str = PREFIX, model_name: str = "") -> None:
        """prefix: `vllm` is for existing dashboards, with the labels that they select by."""
        disable_created_metrics()  # a creation time beside each counter, which scrapers take for another count
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {}
        self._prefix = prefix + ":"
        self._labels = {"model_name": model_name, "engine": "0"} if prefix != PREFIX else {}
        self._drafts = self._series(Counter, "spec_decode_num_drafts", "Verifications that had drafted tokens")
        self._drafted = self._series(Counter, "spec_decode_num_draft_tokens", "Drafted tokens")
        self._accepted = self._series(Counter, "spec_decode_num_accepted_tokens", "Drafted tokens that were accepted")
        self._accepted_at = {
            position: self._series(
                Counter,
                "spec_decode_num_accepted_tokens_per_pos",
                "Accepted tokens by draft position",
                position=str(position),
            )
            for position in range(engine.speculation_length if engine.head else 0)
        }
        self._prompt_tokens = self._series(Counter, "prompt_tokens", "Tokens of the prompts that were answered")
        self._generated = self._series(Counter, "generation_tokens", "Tokens generated")
        # a series that is there from the start reads as 0, one that appears later as a gap
        self._ended = {
            reason: self._series(Counter, "request_success", "Sequences by finish reason", finished_reason=reason)
            for reason in FINISH_REASONS
        }
        self._failed = {
            reason: self._series(Counter, "request_failure", "Requests without a whole answer", reason=reason)
            for reason in sorted(set(FAILURES.values()))
        }
        self._series(Gauge, "num_requests_running", "Sequences in the engine").set_function(lambda: engine.running)
        self._series(Gauge, "num_requests_waiting", "Sequences in the queue").set_function(lambda: engine.waiting)
        usage = self._series(Gauge, "kv_cache_usage_perc", "Used places of the cache / all of them")
        usage.set_function(lambda: engine.cache_usage)
        self._watched: dict[int, _Watched] = {}  # by number
        self._lock = threading.Lock()
        self._histograms = {
            name: self._series(Histogram, name, description, options={"buckets": buckets})
            for name, (description, buckets) in _HISTOGRAMS.items()
        }

    def watch(self, request: Request, received: float) -> None:
        """Count a sequence's tokens as they come, and the rest when it ends.

        received: the time of its HTTP request, in seconds of time.monotonic().
        """
        watched = _Watched(request, received)

        def ended(future: Future[Completion]) -> None:
            with self._lock:
                del self._watched[request.number]
                self._follow(watched)
            if future.exception() is not None:
                self._ended["error"].inc()
            else:
                self._count(request, future.result(), received)

        with self._lock:
            self._watched[request.number] = watched
        request.future.add_done_callback(ended)

    def failed(self, status: int) -> None:
        """Count a request that got no answer, by the HTTP status that it got instead."""
        if status in FAILURES:
            self._failed[FAILURES[status]].inc()

    def exposition(self) -> bytes:
        with self._lock:
            for watched in self._watched.values():
                self._follow(watched)
        return generate_latest(self.registry)

    def _follow(self, watched: _Watched) -> None:
        """Count the tokens since the last call."""
        request = watched.request
        if not watched.began and request.times.first_token:
            watched.began = True
            self._prompt_tokens.inc(len(request.prompt_ids))
            self._observe("time_to_first_token_seconds", request.times.first_token - watched.received)
        arrivals = request.arrivals[watched.arrivals :]  # the engine's thread may append meanwhile
        for earlier, later in pairwise(arrivals):
            self._observe("inter_token_latency_seconds", later - earlier)
        watched.arrivals += max(0, len(arrivals) - 1)

    def _count(self, request: Request, completion: Completion, received: float) -> None:
        stats, times, generated = completion.stats, request.times, len(completion.token_ids)
        # a verification drafts its first position or nothing, so that position counts the drafts
        self._drafts.inc(stats.drafted_per_position[0] if stats.drafted_per_position else 0)
        self._drafted.inc(stats.drafted)
        self._accepted.inc(stats.accepted)
        for position, accepted in enumerate(stats.accepted_per_position):
            self._accepted_at[position].inc(accepted)
        self._generated.inc(generated)
        self._ended[completion.finish_reason].inc()
        if completion.finish_reason == "cancelled":
            return
        decoding = times.finished - times.first_token
        if generated > 1:
            self._observe("request_time_per_output_token_seconds", decoding / (generated - 1))
        self._observe("e2e_request_latency_seconds", times.finished - received)
        self._observe("request_queue_time_seconds", times.started - times.submitted)
        self._observe("request_prefill_time_seconds", times.first_token - times.started)
        self._observe("request_decode_time_seconds", decoding)
        self._observe("request_prompt_tokens", len(completion.prompt_ids))
        self._observe("request_generation_tokens", generated)

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def _series(self, kind: Any, name: str, description: str, *, options: Any = None, **labels: str) -> Any:
        """Return one time series; those that differ in a label's value only belong to one metric."""
        labels = self._labels | labels
        if name not in self._metrics:
            full_name = self._prefix + name
            self._metrics[name] = kind(full_name, description, tuple(labels), registry=self.registry, **(options or {}))
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric
