"""Prometheus metrics, in a registry of the app's own.

The names after the prefix are those of vLLM, of which llama.cpp has the spec_decode ones too, so dashboards carry over.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.api.worker import Worker
from serving.engine import Completion

_PREFIX = "draftsmith:"
# a small model answers in tenths of a second, a large one on a CPU in minutes
_LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKEN_BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
FINISH_REASONS = ("length", "eos_token", "stop_sequence")
# the status of a request that got no answer -> why
FAILURES = {
    400: "validation",
    413: "validation",
    415: "validation",
    422: "validation",
    429: "overloaded",
    499: "cancelled",
    500: "generation",
    503: "generation",
}


class Metrics:
    """Counters, gauges and histograms of one server. `positions`: how many tokens are drafted at most."""

    def __init__(self, worker: Worker, positions: int) -> None:
        self.registry = CollectorRegistry()
        self._drafts = self._counter("spec_decode_num_drafts", "Verifications that had drafted tokens")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Drafted tokens")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted")
        self._accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by draft position", "position"
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of the prompts that were answered")
        self._generated = self._counter("generation_tokens", "Tokens of the answers")
        self._answered = self._counter("request_success", "Answered requests", "finished_reason")
        self._failed = self._counter("request_failure", "Requests without an answer", "reason")
        self._gauge("num_requests_running", "Requests in the engine").set_function(lambda: worker.running)
        self._gauge("num_requests_waiting", "Requests in the line").set_function(lambda: worker.waiting)
        self._end_to_end = self._histogram("e2e_request_latency_seconds", "From receipt to answer", _LATENCY_BUCKETS)
        self._queued = self._histogram("request_queue_time_seconds", "Time in the line", _LATENCY_BUCKETS)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Decoding time per token after the first", _TOKEN_BUCKETS
        )
        # a series that is there from the start reads as 0, one that appears later as a gap
        for position in range(positions):
            self._accepted_at.labels(str(position))
        for reason in FINISH_REASONS:
            self._answered.labels(reason)
        for reason in FAILURES.values():
            self._failed.labels(reason)

    def answered(self, completion: Completion, *, queued: float, total: float) -> None:
        """Count an answer; `queued` and `total` in seconds."""
        stats, generated = completion.stats, len(completion.token_ids)
        # a verification drafts its first position or nothing, so that position counts the drafts
        self._drafts.inc(stats.drafted_per_position[0] if stats.drafted_per_position else 0)
        self._drafted.inc(stats.drafted)
        self._accepted.inc(stats.accepted)
        for position, accepted in enumerate(stats.accepted_per_position):
            self._accepted_at.labels(str(position)).inc(accepted)
        self._prompt_tokens.inc(len(completion.prompt_ids))
        self._generated.inc(generated)
        self._answered.labels(completion.finish_reason).inc()
        self._queued.observe(queued)
        self._end_to_end.observe(total)
        if generated > 1:
            self._per_token.observe(stats.decode_seconds / (generated - 1))

    def failed(self, status: int) -> None:
        """Count a request that got no answer, by the HTTP status that it got instead."""
        if status in FAILURES:
            self._failed.labels(FAILURES[status]).inc()

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, about, labels, registry=self.registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(_PREFIX + name, about, registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(_PREFIX + name, about, registry=self.registry, buckets=buckets)
