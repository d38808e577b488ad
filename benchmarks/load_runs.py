"""The loops of a run: every mode at every concurrency, HTTP against the engine alone, and many short requests."""

from __future__ import annotations

import itertools
import statistics
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from benchmarks import load_report as report
from benchmarks.decode_report import spread
from benchmarks.load_client import Ask, Load, closed_loop, poisson
from benchmarks.load_plan import HTTP_CONCURRENCY, MODES, POISSON_LOAD, Plan, Rates
from benchmarks.processes import EngineProcess
from draft.errors import UserError
from draft.launcher import Server

CHAINS = (1, 2, 3, 5)  # the fastest of them is what speculation on means
ENDURANCE_TOKENS = 16
_ENDURANCE_PROMPT = 24  # characters


class Bench:
    """The servers, and the requests that they get."""

    def __init__(self, arguments: Namespace, prompts: list[str], servers: dict[str, Server]) -> None:
        self.arguments, self.prompts = arguments, prompts
        # the one that always drafts also answers those that want no drafts, so that automatic learns nothing from them
        self.servers = {"off": servers["chain"], "on": servers["chain"], "automatic": servers["auto"]}
        self.num_tokens = 1  # of chains, where speculation is on

    def wishes(self, mode: str) -> dict[str, Any]:
        wishes: dict[str, dict[str, Any]] = {
            "off": {"enabled": False},
            "on": {"num_tokens": self.num_tokens},
            "automatic": {},
        }
        return wishes[mode]

    def chats(self, count: int, first: int = 0) -> list[str]:
        return list(itertools.islice(itertools.cycle(self.prompts), first, first + count))

    def asks(self, mode: str, count: int, first: int = 0) -> list[Ask]:
        settings = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        settings |= {"max_completion_tokens": self.arguments.max_new_tokens, "speculative": self.wishes(mode)}
        return [
            Ask("/v1/chat/completions", {"messages": [{"role": "user", "content": chat}], **settings})
            for chat in self.chats(count, first)
        ]

    def endurance_asks(self, count: int) -> list[Ask]:
        """Short ones, every other one streamed."""
        settings: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": ENDURANCE_TOKENS}
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return [
            Ask("/v1/completions", {"prompt": chat[:_ENDURANCE_PROMPT], **settings, **(streamed if place % 2 else {})})
            for place, chat in enumerate(self.chats(count))
        ]

    def closed(self, mode: str, concurrency: int, count: int, first: int = 0) -> Load:
        return closed_loop(self.servers[mode].url, self.asks(mode, count, first), concurrency)

    def calibrate(self) -> Rates:
        """Also chooses the chain that is fastest for a request alone."""
        highest = max(*self.arguments.concurrency, HTTP_CONCURRENCY)
        self.closed("off", 1, 1)  # whatever is done once only
        speeds = {}
        for length in [self.arguments.num_tokens] if self.arguments.num_tokens else CHAINS:
            self.num_tokens = length
            speeds[length] = self.closed("on", 1, 2).requests_per_second
        self.num_tokens = max(speeds, key=lambda length: speeds[length])
        measured = {("on", 1): speeds[self.num_tokens], ("off", 1): self.closed("off", 1, 2).requests_per_second}
        for mode in ("off", "on"):
            measured[mode, highest] = self.closed(mode, highest, highest).requests_per_second
        short = closed_loop(self.servers["off"].url, self.endurance_asks(3 * highest), highest)
        rates = Rates(highest, measured, short.requests_per_second)
        if not all([*measured.values(), rates.endurance]):
            failed = next(trace.error for trace in [*short.traces, *self.closed("off", 1, 1).traces] if trace.error)
            raise UserError(f"the server does not answer: {failed}.")
        return rates


def sweep(bench: Bench, plan: Plan, requests: dict[int, int], step: Callable[[], None]) -> tuple[Any, dict[int, float]]:
    """Samples of every mode at every concurrency, and the rates at which Poisson arrivals came."""
    samples: report.Samples = {
        report.Key(arrivals, concurrency, mode): []
        for arrivals in plan.arrivals
        for concurrency in plan.concurrency
        for mode in MODES
    }
    arriving: dict[int, float] = {}
    for concurrency in plan.concurrency:
        count = requests[concurrency]
        for repeat in range(plan.repeats if "closed" in plan.arrivals else 0):
            for mode in _rotated(repeat):
                load = bench.closed(mode, concurrency, count, first=repeat * count)
                samples[report.Key("closed", concurrency, mode)].append(load)
                step()
    for concurrency in plan.concurrency if "poisson" in plan.arrivals else ():
        off = samples.get(report.Key("closed", concurrency, "off")) or [bench.closed("off", concurrency, concurrency)]
        arriving[concurrency] = bench.arguments.rate or POISSON_LOAD * statistics.median(
            load.requests_per_second for load in off
        )
        for mode in MODES:
            asks, seed = bench.asks(mode, requests[concurrency]), bench.arguments.seed
            load = poisson(bench.servers[mode].url, asks, arriving[concurrency], seed)
            samples[report.Key("poisson", concurrency, mode)].append(load)
            step()
    return samples, arriving


def _rotated(repeat: int) -> tuple[str, ...]:
    shift = repeat % len(MODES)
    return MODES[shift:] + MODES[:shift]


def endure(bench: Bench, count: int, step: Callable[[], None]) -> dict[str, Any]:
    """Many short requests to a server in its default mode; its memory after a tenth of them and after all."""
    server, early = bench.servers["automatic"], count // 10
    asks, concurrency = bench.endurance_asks(count), max(bench.arguments.concurrency)
    memory, loads = [], []
    for part in (asks[:early], asks[early:]):
        loads.append(closed_loop(server.url, part, concurrency))
        memory.append(server.memory())
        step()
    errors = [trace.error for load in loads for trace in load.traces if trace.error is not None]
    return {
        "requests": count,
        "tokens": ENDURANCE_TOKENS,
        "concurrency": concurrency,
        "seconds": sum(load.seconds for load in loads),
        "errors": len(errors),
        "kinds_of_errors": sorted(set(errors)),
        "early": early,
        "memory_early": memory[0],
        "memory_late": memory[1],
        "memory_growth": memory[1] / memory[0],
    }


def compare_http(
    bench: Bench, engine: EngineProcess, count: int, repeats: int, step: Callable[[], None]
) -> dict[str, Any]:
    """The same requests over HTTP and by the engine alone, in turns; without speculation, whose plan may differ."""
    with_http, alone = [], []
    wishes = {"enabled": False}
    for repeat in range(repeats + 1):  # the first one warms up
        load = bench.closed("off", HTTP_CONCURRENCY, count, first=repeat * count)
        chats = bench.chats(count, repeat * count)
        tokens, seconds = engine.closed_loop(chats, bench.arguments.max_new_tokens, HTTP_CONCURRENCY, wishes)
        if repeat:
            with_http.append(load.rate)
            alone.append(tokens / seconds)
        step()
    ratios = spread([over / by for over, by in zip(with_http, alone, strict=True)])
    return {
        "concurrency": HTTP_CONCURRENCY,
        "requests": count,
        "over_http": spread(with_http),
        "engine": spread(alone),
        "over_engine": ratios["median"],
        "spread": ratios,
    }
