"""Prometheus metrics, in one registry per app.

The names after the prefix are those of vLLM, of which llama.cpp has the spec_decode ones too, so dashboards carry over.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.backend import Backend
from serving.engine import Completion, Request, SpeculationStats
from serving.engine.heads import Heads

PREFIX = "draftsmith"
# seconds; a small model answers in tenths of a second, a large one on a CPU in minutes
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_WAIT = (0.0001, 0.00025, 0.0005, *_LATENCY)
_FIRST_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160, 640)
_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
_COUNTERS = {  # name -> (description, label)
    "spec_decode_num_drafts": ("Verifications that had drafted tokens", None),
    "spec_decode_num_draft_tokens": ("Drafted tokens", None),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that were accepted", None),
    "spec_decode_num_accepted_tokens_per_pos": ("Accepted tokens by draft position", "position"),
    "spec_decode_num_draft_tokens_by_source": ("Drafted tokens by what drafted them", "source"),
    "spec_decode_num_accepted_tokens_by_source": ("Accepted tokens by what drafted them", "source"),
    "prompt_tokens": ("Tokens of the prompts that were answered", None),
    "generation_tokens": ("Tokens generated", None),
    "request_success": ("Sequences by finish reason", "finished_reason"),
    "request_failure": ("Requests without a whole answer", "reason"),
}
_GAUGES = {  # name -> (description, attribute of the engine)
    "num_requests_running": ("Sequences in the engine", "running"),
    "num_requests_waiting": ("Sequences in the queue", "waiting"),
    "kv_cache_tokens": ("Tokens that the cache holds", "cache_tokens"),
    "kv_cache_usage_perc": ("Reserved blocks of the cache / all of them", "cache_usage"),
    "speculation_self_check_tau": ("Acceptance length of the self-check at the start; NaN without one", "watch.tau"),
    "speculation_degraded": ("1 while drafts are accepted far less than they should be, else 0", "watch.is_degraded"),
}
_HISTOGRAMS = {  # name -> (description, buckets)
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
_OF_HEADS = {  # name -> (description, attribute of a loaded head)
    "head_verifications": ("Verifications of a head's drafts", "verifications"),
    "head_draft_tokens": ("Tokens that a head drafted", "drafted"),
    "head_accepted_tokens": ("Tokens that a head drafted and the target accepted", "accepted"),
}
_OF_SWAPS = {  # name -> (description, attribute of all heads together)
    "head_swaps": ("Changes of the default head by its operator", "swaps"),
    "head_rollbacks": ("New default heads that gave way to the one before, since they were accepted less", "rollbacks"),
    "head_explorations": ("Requests that tried another head than the best known for their kind", "explorations"),
}
SOURCES = ("head", "lookup")
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


class HeadMetrics(Collector):
    """Counters of the heads that are loaded at present; a head that is removed takes its own along."""

    def __init__(self, heads: Heads, prefix: str, labels: dict[str, str]) -> None:
        self.heads, self.prefix, self.labels = heads, prefix, labels

    def collect(self) -> Iterator[CounterMetricFamily]:
        own = [*self.labels.values()]
        for name, (description, attribute) in _OF_SWAPS.items():
            family = CounterMetricFamily(f"{self.prefix}:{name}", description, labels=[*self.labels])
            family.add_metric(own, getattr(self.heads, attribute))
            yield family
        for name, (description, attribute) in _OF_HEADS.items():
            family = CounterMetricFamily(f"{self.prefix}:{name}", description, labels=[*self.labels, "head"])
            for head in self.heads:
                family.add_metric([*own, head.name], getattr(head, attribute))
            yield family


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self, engine: Backend, *, prefix: str = PREFIX, model_name: str = "") -> None:
        """prefix: `vllm` is for existing dashboards, with the labels that they select by."""
        disable_created_metrics()  # a creation time beside each counter, which scrapers take for another count
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"} if prefix != PREFIX else {}
        self._metrics: dict[str, Any] = {}
        self._watched: dict[int, _Watched] = {}  # by number
        self._lock = threading.Lock()

        values = {
            "position": range(engine.longest_draft),
            "source": SOURCES,
            "finished_reason": FINISH_REASONS,
            "reason": sorted(set(FAILURES.values())),
        }

        def add(kind: Any, name: str, description: str, label: str | None = None, **options: Any) -> None:
            labels = (*self._labels, label) if label else tuple(self._labels)
            self._metrics[name] = kind(f"{prefix}:{name}", description, labels, registry=self.registry, **options)
            # a series that is there from the start reads as 0, one that appears later as a gap
            for own in [{label: str(value)} for value in values[label]] if label else [{}]:
                self._series(name, **own)

        self._counts_drafts = engine.draft_counts() is None
        for name, (description, label) in _COUNTERS.items():
            if self._counts_drafts or not name.startswith("spec_decode"):
                add(Counter, name, description, label)
        if not self._counts_drafts:
            self.registry.register(_Reported(engine, prefix, self._labels))
        for name, (description, buckets) in _HISTOGRAMS.items():
            add(Histogram, name, description, buckets=buckets)
        for name, (description, attribute) in _GAUGES.items():
            add(Gauge, name, description)
            self._series(name).set_function(partial(attrgetter(attribute), engine))
        if (heads := getattr(engine, "heads", None)) is not None:
            self.registry.register(HeadMetrics(heads, prefix, self._labels))

    def _series(self, name: str, **labels: str) -> Any:
        """Return one time series of a metric."""
        labels |= self._labels
        return self._metrics[name].labels(**labels) if labels else self._metrics[name]

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
                self._series("request_success", finished_reason="error").inc()
            else:
                self._count(request, future.result(), received)

        with self._lock:
            self._watched[request.number] = watched
        request.future.add_done_callback(ended)

    def failed(self, status: int) -> None:
        """Count a request that got no answer, by the HTTP status that it got instead."""
        if status in FAILURES:
            self._series("request_failure", reason=FAILURES[status]).inc()

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
            self._series("prompt_tokens").inc(len(request.prompt_ids))
            self._series("time_to_first_token_seconds").observe(request.times.first_token - watched.received)
        arrivals = request.arrivals[watched.arrivals :]  # the engine's thread may append meanwhile
        for earlier, later in pairwise(arrivals):
            self._series("inter_token_latency_seconds").observe(later - earlier)
        watched.arrivals += max(0, len(arrivals) - 1)

    def _count(self, request: Request, completion: Completion, received: float) -> None:
        stats, times, generated = completion.stats, request.times, len(completion.token_ids)
        if self._counts_drafts:
            self._count_drafts(stats)
        self._series("generation_tokens").inc(generated)
        self._series("request_success", finished_reason=completion.finish_reason).inc()
        if completion.finish_reason == "cancelled":
            return
        decoding = times.finished - times.first_token
        observed = {
            "e2e_request_latency_seconds": times.finished - received,
            "request_queue_time_seconds": times.started - times.submitted,
            "request_prefill_time_seconds": times.first_token - times.started,
            "request_decode_time_seconds": decoding,
            "request_prompt_tokens": len(completion.prompt_ids),
            "request_generation_tokens": generated,
        }
        if generated > 1:
            observed["request_time_per_output_token_seconds"] = decoding / (generated - 1)
        for name, value in observed.items():
            self._series(name).observe(value)

    def _count_drafts(self, stats: SpeculationStats) -> None:
        # a verification drafts its first position or nothing, so that position counts the drafts
        self._series("spec_decode_num_drafts").inc(stats.drafted_per_position[0] if stats.drafted_per_position else 0)
        self._series("spec_decode_num_draft_tokens").inc(stats.drafted)
        self._series("spec_decode_num_accepted_tokens").inc(stats.accepted)
        for position, accepted in enumerate(stats.accepted_per_position):
            self._series("spec_decode_num_accepted_tokens_per_pos", position=str(position)).inc(accepted)
        for source, counts in stats.by_source.items():
            for name in ("draft", "accepted"):
                count = counts["drafted" if name == "draft" else name]
                self._series(f"spec_decode_num_{name}_tokens_by_source", source=source).inc(count)


class _Reported:
    """The drafts that a server upstream counts, of all its clients, under the names that ours have."""

    def __init__(self, engine: Backend, prefix: str, labels: dict[str, str]) -> None:
        self.engine, self.prefix, self.labels = engine, prefix, labels

    def collect(self) -> Iterator[Metric]:
        counts = self.engine.draft_counts()
        if counts is None:
            return
        values = {
            "spec_decode_num_drafts": counts.drafts,
            "spec_decode_num_draft_tokens": counts.drafted,
            "spec_decode_num_accepted_tokens": counts.accepted,
        }
        for name, value in values.items():
            family = CounterMetricFamily(f"{self.prefix}:{name}", _COUNTERS[name][0], labels=[*self.labels])
            if value is not None:
                family.add_metric([*self.labels.values()], value)
            yield family
        name = "spec_decode_num_accepted_tokens_per_pos"
        family = CounterMetricFamily(f"{self.prefix}:{name}", _COUNTERS[name][0], labels=[*self.labels, "position"])
        for position, accepted in enumerate(counts.accepted_per_position):
            family.add_metric([*self.labels.values(), str(position)], accepted)
        yield family
        for name, description, value in (
            (
                "upstream_acceptance_length",
                "1 + accepted / drafts upstream",
                counts.acceptance_length,
            ),
            ("upstream_up", "1 while the server upstream takes requests, else 0", float(self.engine.ready)),
        ):
            gauge = GaugeMetricFamily(f"{self.prefix}:{name}", description, labels=[*self.labels])
            gauge.add_metric([*self.labels.values()], value)
            yield gauge
