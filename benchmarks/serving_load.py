"""draft-serve under load: latency and throughput over loopback, with speculation on, off and automatic.

A closed loop keeps so many requests in flight; Poisson arrivals come as often as 0.7 of what that closed loop answered
with speculation off, however many are in flight. Answers are greedy, streamed by /v1/chat/completions, and all of one
length. The three modes take turns, in an order that rotates from repeat to repeat; rates are medians over repeats,
percentiles are over the requests of all repeats. TPOT is (end - first token) / (tokens by the usage - 1).

--check also compares HTTP with the engine alone, sends 2,000 requests of 16 tokens, and judges the bars.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from benchmarks import shared
from benchmarks.clients import Load, Request, closed_loop, poisson
from benchmarks.core_binding import Cores, bind, bound
from benchmarks.serving_figures import Key, draw, judge, show, summarise
from benchmarks.serving_plan import HTTP_CONCURRENCY, MODES, POISSON_LOAD, Plan, Rates
from benchmarks.shared import spread
from draft.errors import UserError
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
CHAINS = (1, 2, 3, 5)  # the fastest of them is what speculation on means
ENDURANCE_TOKENS = 16
ENDURANCE_PROMPT = 24  # characters

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
        tried = {}
        for length in [self.arguments.num_tokens] if self.arguments.num_tokens else CHAINS:
            self.num_tokens = length
            tried[length] = self.closed("on", 1, 2)
        self.num_tokens = max(tried, key=lambda length: tried[length].requests_per_second)
        loads = {("on", 1): tried[self.num_tokens], ("off", 1): self.closed("off", 1, 2)}
        for mode in ("off", "on"):
            loads[mode, highest] = self.closed(mode, highest, highest)
        short = closed_loop(self.servers["off"].url, self.short_requests(3 * highest), highest)
        for load in (*loads.values(), short):
            if not load.requests_per_second:
                raise UserError(f"the server does not answer: {load.traces[0].error}.")
        measured = {key: load.requests_per_second for key, load in loads.items()}
        rates = Rates(highest, measured, short.requests_per_second)
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


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
