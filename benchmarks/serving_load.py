"""draft-serve under load: latency and throughput over loopback, with speculation on, off and automatic.

A closed loop keeps so many requests in flight; Poisson arrivals come as often as 0.7 of what that closed loop answered
with speculation off, however many are in flight. Answers are greedy, streamed by /v1/chat/completions, and all of one
length. The three modes take turns, in an order that rotates from repeat to repeat; rates are medians over repeats,
percentiles are over the requests of all repeats. TPOT is (end - first token) / (tokens by the usage - 1).

--check also compares HTTP with the engine alone, sends 2,000 requests of 16 tokens, and judges the bars.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks import shared
from benchmarks.shared import at_least, at_most, spread
from draft.errors import UserError
from draft.evaluation.tau import acceptance_length
from draft.launcher import Server, draft_serve
from draft.target import Target, load_target
from serving.cli import load_engine
from serving.engine import Engine, SamplingParams, Speculation
from serving.engine.setup import MODES as ENGINE_MODES
from serving.engine.setup import decoding_dtype

MODULE = "benchmarks.serving_load"
EXAMPLES = f"""
examples:
  all of it, with the bars, in at most 25 minutes (the bundled target and head):
    python -m {MODULE} --check --out runs/serving_load
  a short look:
    python -m {MODULE} --concurrency 1 4 --requests 4 --repeats 1 --arrivals closed --out runs/serving_load
"""
ARRIVALS = ("closed", "poisson")
MODES = ("off", "on", "automatic")
CHAINS = (1, 2, 3, 5)  # the fastest of them is what speculation on means
HTTP_CONCURRENCY = 8
POISSON_LOAD = 0.7  # of what the closed loop answered with speculation off
LOOP_SECONDS = (60.0, 50, 40, 32, 26, 21, 17, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2)  # tried, with speculation off
ENDURANCE_TOKENS = 16
ENDURANCE_PROMPT = 24  # characters
TIMEOUT = 600.0  # seconds for one answer

# bars
AUTOMATIC_OVER_BETTER = 0.97
OVER_HTTP = 0.95  # of the engine's throughput without HTTP
MEMORY_GROWTH = 1.05

# ---- the program ----


def parse(arguments: Sequence[str]) -> Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    whole = shared.whole(1)
    parser.add_models(default=True)
    parser.add_prompts()
    parser.add("--limit", whole, default=32, metavar="N", help="the shortest N prompts")
    parser.add("--concurrency", whole, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="requests in flight")
    parser.add("--arrivals", choices=ARRIVALS, nargs="+", default=list(ARRIVALS))
    parser.add("--rate", shared.real(1e-3, 1e5), metavar="R", help="Poisson arrivals a second, at every level")
    parser.add("--requests", whole, metavar="N", help="a loop, at least (default: what fits --minutes)")
    parser.add("--minutes", shared.real(0, 1e5), default=22.0, metavar="M", help="of the whole run")
    parser.add("--repeats", whole, default=3, metavar="N", help="of closed loops")
    parser.add("--max-new-tokens", shared.whole(2), default=32, metavar="N")
    parser.add("--num-tokens", whole, metavar="K", help="drafted where speculation is on (default: the best)")
    parser.add("--endurance", shared.whole(10), default=2000, metavar="N", help="short requests of --check")
    parser.add("--seed", shared.whole(0), default=0, metavar="N", help="of Poisson arrivals")
    parser.add_dtype()
    parser.add("--mode", choices=ENGINE_MODES, default="auto")
    parser.add_output(MODULE)
    return parser.parse_args(arguments)


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    began = time.monotonic()
    console = shared.make_console()
    out = shared.output_folder(arguments.out)
    disable_progress_bar()
    chosen = shared.load_prompts(arguments.prompts)
    cores = Cores.split()
    target = load_target(arguments.target, decoding_dtype(arguments.dtype, arguments.mode))
    shared.load_fitting_head(arguments.head, target)
    prompts = shortest(target, chosen.prompts, arguments)
    results: dict[str, Any] = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, target),
        "heads": [shared.head_provenance(arguments.head, arguments.head)],
        "prompts": chosen.provenance(len(prompts)),
        "settings": vars(arguments),
        "cores": {"engine": cores.engine, "io": cores.io, "in_words": str(cores)},
    }
    del target  # the servers load it
    console.print(f"{cores}; the servers start")
    with bound(cores.io), ExitStack() as stack:
        results |= measure(arguments, prompts, cores, began, stack, console)
    results["seconds"] = time.monotonic() - began
    results["bars"] = judge(results) if arguments.check else []
    show(console, results)
    shared.finish(console, results, out / "serving_load", draw)
    return shared.exit_status(results, arguments.check)


def shortest(target: Target, prompts: Sequence[shared.Prompt], arguments: Namespace) -> list[str]:
    """Return first turns, the shortest first: a long prompt takes the same time in every mode, and hides the rest."""
    lengths = {prompt.turns[0]: len(shared.chat_ids(target, prompt.turns[0])) for prompt in prompts}
    room = target.max_length - arguments.max_new_tokens
    fitting = [turn for turn in sorted(lengths, key=lambda turn: lengths[turn]) if lengths[turn] <= room]
    if not fitting:
        raise shared.nothing_fits(target, arguments.max_new_tokens)
    return fitting[: arguments.limit]


def measure(
    arguments: Namespace, prompts: list[str], cores: Cores, began: float, stack: ExitStack, console: Console
) -> dict[str, Any]:
    """Start the servers, calibrate, and run every part; endurance first, on a server that has done nothing else yet."""
    options = {"target": arguments.target, "head": arguments.head, "dtype": arguments.dtype, "mode": arguments.mode}
    # a queue without an end: what a mode cannot keep up with waits, and is not refused
    options |= {"threads": len(cores.engine), "max_batch": max(*arguments.concurrency, HTTP_CONCURRENCY)}
    options |= {"max_waiting": 1_000_000}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    with bound(cores.engine):  # the engines' threads inherit the cores
        servers = {
            name: stack.enter_context(draft_serve([*flags, f"--speculation={name}"])) for name in ("auto", "chain")
        }
    for server in servers.values():
        bind(server.process, cores.io)
    engine = None
    if arguments.check:
        everything: dict[str, Any] = {**options, "warm_up": True, "speculation": "chain"}
        with bound(cores.engine):
            engine = load_engine(**everything)
            stack.callback(engine.close)
            engine.start()
    bench = Bench(arguments, prompts, servers)
    plan = Plan(
        tuple(sorted(set(arguments.concurrency))),
        tuple(dict.fromkeys(arguments.arrivals)),
        arguments.repeats,
        arguments.repeats + 2 if arguments.check else 0,
        arguments.endurance if arguments.check else 0,
    )
    console.print("calibrating")
    rates = bench.calibrate()
    requests = plan.fit(rates, 60 * arguments.minutes - (time.monotonic() - began), arguments.requests)
    counts = ", ".join(f"{requests[level]} at {level}" for level in plan.concurrency)
    console.print(
        f"calibrated without speculation: {rates.of('off', 1):.2f} requests/s alone, "
        f"{rates.of('off', rates.highest):.2f} at concurrency {rates.highest}; requests a loop: {counts}; "
        f"about {plan.seconds(rates, requests) / 60:.1f} minutes from now"
    )
    found: dict[str, Any] = {}
    with shared.progress_bar() as progress:
        loops = len(plan.concurrency) * len(MODES)
        total = loops * (plan.repeats * ("closed" in plan.arrivals) + ("poisson" in plan.arrivals))
        bar = progress.add_task("serving", total=total + (2 + plan.http_repeats + 1 if engine else 0))

        def step() -> None:
            progress.advance(bar)

        if engine is not None:
            found["endurance"] = endure(bench, plan.endurance, step)
            found["http"] = compare_http(bench, engine, requests[HTTP_CONCURRENCY], plan.http_repeats, step)
        found["loads"] = summarise(*sweep(bench, plan, requests, step))
    return {**found, "num_tokens": bench.num_tokens, "requests": requests, "server_flags": flags}


# ---- the loops of a run ----


class Key(NamedTuple):
    """Setting of a row of the results."""

    arrivals: str  # closed or poisson
    concurrency: int
    mode: str


class Bench:
    """The servers, and the requests that they get."""

    def __init__(self, arguments: Namespace, prompts: list[str], servers: dict[str, Server]) -> None:
        self.arguments, self.prompts = arguments, prompts
        # the one that always drafts also answers the requests without drafts, so that automatic learns nothing of them
        self.servers = {"off": servers["chain"], "on": servers["chain"], "automatic": servers["auto"]}
        self.num_tokens = 1  # of chains, where speculation is on

    def chats(self, count: int, first: int = 0) -> list[str]:
        return list(itertools.islice(itertools.cycle(self.prompts), first, first + count))

    def chat_requests(self, mode: str, count: int, first: int = 0) -> list[Request]:
        speculative = {"off": {"enabled": False}, "on": {"num_tokens": self.num_tokens}, "automatic": {}}[mode]
        settings = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        settings |= {"max_completion_tokens": self.arguments.max_new_tokens, "speculative": speculative}
        return [
            Request("/v1/chat/completions", {"messages": [{"role": "user", "content": chat}], **settings})
            for chat in self.chats(count, first)
        ]

    def short_requests(self, count: int) -> list[Request]:
        """Return short requests, every other one streamed."""
        settings: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": ENDURANCE_TOKENS}
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return [
            Request(
                "/v1/completions", {"prompt": chat[:ENDURANCE_PROMPT], **settings, **(streamed if place % 2 else {})}
            )
            for place, chat in enumerate(self.chats(count))
        ]

    def closed(self, mode: str, concurrency: int, count: int, first: int = 0) -> Load:
        return closed_loop(self.servers[mode].url, self.chat_requests(mode, count, first), concurrency)

    def calibrate(self) -> Rates:
        """Measure requests per second briefly; also chooses the chain that is fastest for a request alone."""
        highest = max(*self.arguments.concurrency, HTTP_CONCURRENCY)
        self.closed("off", 1, 1)  # the first request pays for set-up
        speeds = {}
        for length in [self.arguments.num_tokens] if self.arguments.num_tokens else CHAINS:
            self.num_tokens = length
            speeds[length] = self.closed("on", 1, 2).requests_per_second
        self.num_tokens = max(speeds, key=lambda length: speeds[length])
        measured = {("on", 1): speeds[self.num_tokens], ("off", 1): self.closed("off", 1, 2).requests_per_second}
        for mode in ("off", "on"):
            measured[mode, highest] = self.closed(mode, highest, highest).requests_per_second
        short = closed_loop(self.servers["off"].url, self.short_requests(3 * highest), highest)
        rates = Rates(highest, measured, short.requests_per_second)
        if not all([*measured.values(), rates.endurance]):
            failed = next(trace.error for trace in [*short.traces, *self.closed("off", 1, 1).traces] if trace.error)
            raise UserError(f"the server does not answer: {failed}.")
        return rates


def sweep(
    bench: Bench, plan: Plan, requests: dict[int, int], step: Callable[[], None]
) -> tuple[dict[Key, list[Load]], dict[int, float]]:
    """Return loads of every mode at every concurrency, and the rates at which Poisson arrivals came."""
    samples: dict[Key, list[Load]] = {
        Key(arrivals, concurrency, mode): []
        for arrivals in plan.arrivals
        for concurrency in plan.concurrency
        for mode in MODES
    }
    arriving: dict[int, float] = {}
    for concurrency in plan.concurrency if "closed" in plan.arrivals else ():
        count = requests[concurrency]
        for repeat in range(plan.repeats):
            shift = repeat % len(MODES)
            for mode in MODES[shift:] + MODES[:shift]:
                load = bench.closed(mode, concurrency, count, first=repeat * count)
                samples[Key("closed", concurrency, mode)].append(load)
                step()
    for concurrency in plan.concurrency if "poisson" in plan.arrivals else ():
        off = samples.get(Key("closed", concurrency, "off")) or [bench.closed("off", concurrency, concurrency)]
        arriving[concurrency] = bench.arguments.rate or POISSON_LOAD * statistics.median(
            load.requests_per_second for load in off
        )
        for mode in MODES:
            chats = bench.chat_requests(mode, requests[concurrency])
            load = poisson(bench.servers[mode].url, chats, arriving[concurrency], bench.arguments.seed)
            samples[Key("poisson", concurrency, mode)].append(load)
            step()
    return samples, arriving


def endure(bench: Bench, count: int, step: Callable[[], None]) -> dict[str, Any]:
    """Send many short requests to a server in its default mode; note its memory after a tenth of them and after all."""
    server, early = bench.servers["automatic"], count // 10
    requests, concurrency = bench.short_requests(count), max(bench.arguments.concurrency)
    memory, loads = [], []
    for part in (requests[:early], requests[early:]):
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


def compare_http(bench: Bench, engine: Engine, count: int, repeats: int, step: Callable[[], None]) -> dict[str, Any]:
    """Time the same requests over HTTP and by the engine alone, in turns, without speculation: its plans may differ."""
    params = SamplingParams(max_new_tokens=bench.arguments.max_new_tokens, ignore_eos=True)
    with_http, alone = [], []
    for repeat in range(repeats + 1):  # the first one warms up
        load = bench.closed("off", HTTP_CONCURRENCY, count, first=repeat * count)
        prompts = [shared.chat_ids(engine.target, chat) for chat in bench.chats(count, repeat * count)]
        began = perf_counter()
        with ThreadPoolExecutor(HTTP_CONCURRENCY) as pool:
            answers = pool.map(lambda ids: engine.submit(ids, params, Speculation(enabled=False)).result(), prompts)
            tokens = sum(len(answer.token_ids) for answer in answers)
        seconds = perf_counter() - began
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


# ---- requests that a run can afford, by a short calibration ----


@dataclass(frozen=True)
class Plan:
    """The parts of a run, and how many requests each loop has."""

    concurrency: tuple[int, ...]
    arrivals: tuple[str, ...]  # closed, poisson
    repeats: int
    http_repeats: int  # 0: HTTP is not compared with the engine alone
    endurance: int  # requests

    def requests(self, rates: Rates, seconds: float) -> dict[int, int]:
        """Return, by concurrency, the requests of a loop that takes so long with speculation off."""
        levels = {*self.concurrency, HTTP_CONCURRENCY}
        return {level: level * max(1, round(seconds * rates.of("off", level) / level)) for level in levels}

    def seconds(self, rates: Rates, requests: dict[int, int]) -> float:
        """Return the seconds that the whole run takes."""
        loops = {(mode, level): requests[level] / rates.of(mode, level) for mode in MODES for level in self.concurrency}
        total = self.repeats * sum(loops.values()) if "closed" in self.arrivals else 0.0
        if "poisson" in self.arrivals:
            total += sum(max(loops[mode, level], loops["off", level] / POISSON_LOAD) for mode, level in loops)
        total += 2 * self.http_repeats * requests[HTTP_CONCURRENCY] / rates.of("off", HTTP_CONCURRENCY)
        return total + self.endurance / rates.endurance

    def fit(self, rates: Rates, seconds: float, least: int | None = None) -> dict[int, int]:
        """Return the most requests a loop that let the run end in time, or the fewest that make sense.

        least: so many a loop instead, rounded up for each client to have as many.
        """
        if least:
            return {level: level * -(-least // level) for level in {*self.concurrency, HTTP_CONCURRENCY}}
        tries = [self.requests(rates, each) for each in LOOP_SECONDS]
        return next((each for each in tries if self.seconds(rates, each) <= seconds), tries[-1])


@dataclass(frozen=True)
class Rates:
    """Requests per second as calibrated, at a concurrency of 1 and at the highest."""

    highest: int
    measured: dict[tuple[str, int], float]  # (off or on, concurrency)
    endurance: float

    def of(self, mode: str, concurrency: int) -> float:
        """Interpolate by a power of the concurrency; automatic counts as the slower of on and off."""
        if mode == "automatic":
            return min(self.of("off", concurrency), self.of("on", concurrency))
        least, most = self.measured[mode, 1], self.measured[mode, self.highest]
        if self.highest == 1:
            return least
        exponent = min(1.0, math.log(concurrency) / math.log(self.highest))
        return least * (most / least) ** exponent


# ---- requests and their traces ----


@dataclass(frozen=True)
class Request:
    """One POST request."""

    path: str
    body: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Number of tokens that the answer must have."""
        return int(self.body.get("max_tokens") or self.body["max_completion_tokens"])


@dataclass
class Trace:
    """One request as its client saw it: seconds of perf_counter(), and tokens by its usage."""

    sent: float
    first: float = 0.0  # the first text; 0: it was not streamed, or none came
    ended: float = 0.0
    tokens: int = 0
    accepted: int = 0  # by the steps
    steps: int = 0  # verifications of at least one drafted token
    error: str | None = None

    @property
    def first_token_seconds(self) -> float | None:
        return self.first - self.sent if self.first else None

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds per token after the first one."""
        return (self.ended - self.first) / (self.tokens - 1) if self.first and self.tokens > 1 else None

    @property
    def seconds(self) -> float:
        return self.ended - self.sent


@dataclass(frozen=True)
class Load:
    """Traces of some requests, and the seconds from the first one's sending to the last one's end."""

    traces: list[Trace]
    seconds: float

    @property
    def good(self) -> list[Trace]:
        return [trace for trace in self.traces if trace.error is None]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return sum(trace.tokens for trace in self.good) / self.seconds

    @property
    def requests_per_second(self) -> float:
        return len(self.good) / self.seconds


def closed_loop(url: str, requests: Sequence[Request], concurrency: int) -> Load:
    """Run so many clients, each of which sends its next request when the last one is answered."""

    async def run(client: httpx.AsyncClient) -> list[Trace]:
        left, traces = iter(requests), list[Trace]()

        async def work() -> None:
            for request in left:
                traces.append(await send(client, request))

        await asyncio.gather(*(work() for _ in range(concurrency)))
        return traces

    return _load(url, run)


def poisson(url: str, requests: Sequence[Request], per_second: float, seed: int) -> Load:
    """Send requests with exponential gaps between them, however many are being answered."""
    gaps = random.Random(seed)

    async def run(client: httpx.AsyncClient) -> list[Trace]:
        due, tasks = perf_counter(), []
        for request in requests:
            await asyncio.sleep(max(0.0, due - perf_counter()))
            tasks.append(asyncio.ensure_future(send(client, request)))
            due += gaps.expovariate(per_second)
        return list(await asyncio.gather(*tasks))

    return _load(url, run)


def _load(url: str, conversation: Callable[[httpx.AsyncClient], Coroutine[Any, Any, list[Trace]]]) -> Load:
    async def run() -> Load:
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=unlimited, trust_env=False) as client:
            began = perf_counter()
            traces = await conversation(client)
            return Load(traces, perf_counter() - began)

    return asyncio.run(run())


async def send(client: httpx.AsyncClient, request: Request) -> Trace:
    """Send one request; whatever is wrong with its answer is in the trace."""
    trace = Trace(perf_counter())
    try:
        async with client.stream("POST", request.path, json=request.body) as response:
            if response.status_code != 200:
                trace.error = f"status {response.status_code}"
            elif request.body.get("stream"):
                await _note_stream(trace, response)
            else:
                _note_usage(trace, json.loads(await response.aread()))
    except (httpx.HTTPError, ValueError, LookupError) as error:
        trace.error = f"{type(error).__name__}: {error}"
    trace.ended = trace.ended or perf_counter()
    if trace.error is None and trace.tokens != request.tokens:
        trace.error = f"{trace.tokens} tokens instead of {request.tokens}"
    return trace


async def _note_stream(trace: Trace, response: httpx.Response) -> None:
    done = False
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            done = True
        elif line.startswith("data:"):
            chunk = json.loads(line.removeprefix("data:"))
            if "error" in chunk:
                trace.error = chunk["error"]["message"]
            elif chunk.get("usage"):
                _note_usage(trace, chunk)
            else:
                choice = chunk["choices"][0]
                if not trace.first and (choice.get("text") or choice.get("delta", {}).get("content")):
                    trace.first = perf_counter()
                if choice["finish_reason"]:
                    trace.ended = perf_counter()
    if not done:
        trace.error = trace.error or "the stream ended without [DONE]"


def _note_usage(trace: Trace, answer: dict[str, Any]) -> None:
    trace.tokens = answer["usage"]["completion_tokens"]
    if figures := answer.get("metrics"):  # of other servers there are none
        figures = figures["speculative_decoding"]
        trace.accepted, trace.steps = figures["num_accepted_draft_tokens"], figures["num_spec_steps"]


# ---- cores ----

CAN_BIND = hasattr(os, "sched_setaffinity")


@dataclass(frozen=True)
class Cores:
    """Cores for the arithmetic, and cores for the sockets: a server's event loop, and clients."""

    engine: tuple[int, ...]
    io: tuple[int, ...]

    @classmethod
    def split(cls) -> Cores:
        """Give half of the cores that this process may use to each; a single one is shared."""
        allowed = sorted(os.sched_getaffinity(0)) if CAN_BIND else list(range(os.cpu_count() or 1))
        half = max(1, len(allowed) // 2)
        return cls(tuple(allowed[:half]), tuple(allowed[half:] or allowed))

    def __str__(self) -> str:
        if not CAN_BIND:
            return "processes are bound to no cores: this system cannot"
        engine, io = (", ".join(map(str, cores)) for cores in (self.engine, self.io))
        return f"engine on core {engine}; server I/O and client on core {io}"


def bind(thread: int, cores: Sequence[int]) -> None:
    """Bind a thread to cores, and with it the threads that it starts from now on.

    thread: the system's number, a process's number being that of its first thread; 0: the calling thread.
    """
    if CAN_BIND:
        os.sched_setaffinity(thread, cores)


@contextmanager
def bound(cores: Sequence[int]) -> Iterator[None]:
    """Bind the calling thread to cores until the block ends."""
    before = os.sched_getaffinity(0) if CAN_BIND else ()
    bind(0, cores)
    try:
        yield
    finally:
        bind(0, tuple(before))


# ---- figures ----


def summarise(samples: dict[Key, list[Load]], arrival_rates: dict[int, float]) -> list[dict[str, Any]]:
    """Return a row for each key: seconds at percentiles over the requests of all repeats, rates with their spread.

    arrival_rates: requests per second that came, by concurrency; of Poisson arrivals.
    """
    return [
        {
            **key._asdict(),
            "arrivals_per_second": arrival_rates.get(key.concurrency) if key.arrivals == "poisson" else None,
            "requests": sum(len(load.traces) for load in loads),
            "errors": [trace.error for load in loads for trace in load.traces if trace.error is not None],
            "tokens_per_second": spread([load.rate for load in loads]),
            "repeats": [load.rate for load in loads],
            "acceptance_length": tau(loads),
            **latencies(loads),
        }
        for key, loads in samples.items()
        if loads
    ]


def latencies(loads: list[Load]) -> dict[str, dict[str, float] | None]:
    good = [trace for load in loads for trace in load.good]
    return {
        "ttft": percentiles(trace.first_token_seconds for trace in good),
        "tpot": percentiles(trace.seconds_per_token for trace in good),
        "e2e": percentiles(trace.seconds for trace in good),
    }


def percentiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """Return seconds, linear between the two values next to a percentile; None when there are no values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    p50, p99 = np.percentile(known, [50, 99])
    return {"p50": float(p50), "p99": float(p99)}


def tau(loads: list[Load]) -> float | None:
    """Return 1 + accepted / verifications, of those that had drafted tokens, before an answer's end cut any off."""
    steps = sum(trace.steps for load in loads for trace in load.good)
    accepted = sum(trace.accepted for load in loads for trace in load.good)
    return acceptance_length(accepted + steps, steps) if steps else None


def judge(results: dict[str, Any]) -> list[shared.Bar]:
    """Return each bar with the figure of this run."""
    closed = [row for row in results["loads"] if row["arrivals"] == "closed"]
    found = []
    for concurrency in sorted({row["concurrency"] for row in closed}):
        rates = {row["mode"]: row["repeats"] for row in closed if row["concurrency"] == concurrency}
        figure = automatic_over_better(rates)
        name = f"automatic / the better of on and off, concurrency {concurrency}"
        found.append(at_least(name, figure, AUTOMATIC_OVER_BETTER))
    http = results.get("http") or {}
    name = f"tokens/s over HTTP / by the engine alone, concurrency {http.get('concurrency', 8)}"
    found.append(at_least(name, http.get("over_engine"), OVER_HTTP))
    endurance = results.get("endurance") or {}
    requests = endurance.get("requests", 2000)
    found.append(at_most(f"errors in {requests} requests of 16 tokens", endurance.get("errors"), 0))
    name = f"server's memory after {requests} requests / after {endurance.get('early', 200)}"
    found.append(at_most(name, endurance.get("memory_growth"), MEMORY_GROWTH))
    return found


def automatic_over_better(rates: dict[str, list[float]]) -> float | None:
    """Return the median over repeats of automatic's tokens per second / those of the mode that is better overall.

    rates: mode -> tokens per second of each repeat. Taking the better anew in each repeat would reward its luck.
    """
    if not {"on", "off", "automatic"} <= rates.keys():
        return None
    better = max(("off", "on"), key=lambda mode: statistics.median(rates[mode]))
    ratios = [one / other for one, other in zip(rates["automatic"], rates[better], strict=False)]
    return statistics.median(ratios) if ratios else None


# ---- tables and picture ----

LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "end to end"}  # name in the JSON -> its heading in the table


def show(console: Console, results: dict[str, Any]) -> None:
    for arrivals, title in (("closed", "closed loop"), ("poisson", "Poisson arrivals")):
        rows = [row for row in results["loads"] if row["arrivals"] == arrivals]
        if rows:
            console.print(_table(rows, title))
    console.print(f"{results['cores']['in_words']}; on: chains of {results['num_tokens']}; milliseconds at p50 / p99")
    if http := results.get("http"):
        console.print(
            f"concurrency {http['concurrency']}: {http['over_http']['median']:.1f} tokens/s over HTTP, "
            f"{http['engine']['median']:.1f} by the engine alone"
        )
    if endurance := results.get("endurance"):
        early, late = (endurance[name] / 2**20 for name in ("memory_early", "memory_late"))
        console.print(
            f"{endurance['requests']} requests of {endurance['tokens']} tokens in {endurance['seconds']:.0f} s: "
            f"{endurance['errors']} errors, {early:.0f} MiB after {endurance['early']}, {late:.0f} MiB at the end"
        )
    shared.show_bars(console, results["bars"])


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    headings = ("concurrency", "speculation", "arrivals/s", "tokens/s", "spread", *LATENCIES.values(), "tau", "errors")
    table = shared.make_table(f"serving load, {title}", headings, ("speculation",))
    for row in rows:
        rate, arriving = row["tokens_per_second"], row["arrivals_per_second"]
        table.add_row(
            str(row["concurrency"]),
            row["mode"],
            f"{arriving:.2f}" if arriving else "-",
            f"{rate['median']:.1f}",
            f"{rate['least']:.1f}-{rate['most']:.1f}",
            *(_milliseconds(row[name]) for name in LATENCIES),
            f"{row['acceptance_length']:.2f}" if row["acceptance_length"] else "-",
            f"{len(row['errors'])} of {row['requests']}",
        )
    return table


def _milliseconds(values: dict[str, float] | None) -> str:
    return f"{1e3 * values['p50']:.0f} / {1e3 * values['p99']:.0f}" if values else "-"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw tokens per second and latencies over concurrency, a line for each mode; dashed: p99."""
    panels: list[tuple[str, str | None, str]] = [("closed", None, "tokens per second, closed loop")]
    panels += [("closed", "tpot", "ms per output token, closed loop"), ("poisson", "e2e", "ms to the end, Poisson")]
    panels = [panel for panel in panels if any(row["arrivals"] == panel[0] for row in results["loads"])]
    figure, axes = shared.make_figure(len(panels), "serving load: speculation on, off and automatic")
    for axis, (arrivals, latency, title) in zip(axes, panels, strict=True):
        rows = [row for row in results["loads"] if row["arrivals"] == arrivals]
        for colour, mode in enumerate(sorted({row["mode"] for row in rows})):
            of_mode = [row for row in rows if row["mode"] == mode and (latency is None or row[latency])]
            at = [row["concurrency"] for row in of_mode]
            if latency is None:
                rates = [row["tokens_per_second"] for row in of_mode]
                medians = [rate["median"] for rate in rates]
                below = [rate["median"] - rate["least"] for rate in rates]
                above = [rate["most"] - rate["median"] for rate in rates]
                axis.errorbar(at, medians, [below, above], marker="o", label=mode, color=f"C{colour}")
            else:
                for name, line in (("p50", "-"), ("p99", "--")):
                    times = [1e3 * row[latency][name] for row in of_mode]
                    label = mode if name == "p50" else None
                    axis.plot(at, times, line, marker="o", label=label, color=f"C{colour}")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("concurrency")
        axis.set_title(title)
        axis.legend()
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
