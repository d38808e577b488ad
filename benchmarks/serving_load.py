"""draft-serve under load: latency and throughput over loopback, with speculation on, off and automatic.

A closed loop keeps so many requests in flight; Poisson arrivals come as often as 0.7 of what that closed loop answered
with speculation off, however many are in flight. Answers are greedy, streamed by /v1/chat/completions, and all of one
length. The three modes take turns, in an order that rotates from repeat to repeat; rates are medians over repeats,
percentiles are over the requests of all repeats. TPOT is (end - first token) / (tokens by the usage - 1).

--check also compares HTTP with the engine alone, sends 2,000 requests of 16 tokens, and judges the bars.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from benchmarks import cli, load_bars, output, prompt_sets, provenance
from benchmarks import load_report as report
from benchmarks.load_plan import HTTP_CONCURRENCY, MODES, Plan, Rates
from benchmarks.load_runs import Bench, compare_http, endure, sweep
from benchmarks.processes import Cores, EngineProcess, bind, bound
from draft.errors import UserError
from draft.heads.checkpoint import attach_head, load_head
from draft.launcher import draft_serve
from draft.target import Target, load_target
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


def parse(arguments: Sequence[str]) -> Namespace:
    parser = cli.Parser(prog=f"python -m {MODULE}", description=__doc__, epilog=EXAMPLES)
    whole = cli.whole(1)
    options: dict[str, dict[str, Any]] = {
        "--target": {"default": "smollm2", "help": "hub id, folder, .gguf file, or smollm2 (default)"},
        "--head": {"default": "smollm2-eagle3", "help": "a head's folder, or smollm2-eagle3 (default)"},
        "--prompts": {"metavar": "FILE", "help": "JSONL with turns, prompt or question (default: benchmarks/prompts/)"},
        "--limit": {"type": whole, "default": 32, "metavar": "N", "help": "the shortest N prompts; default: 32"},
        "--concurrency": {"type": whole, "nargs": "+", "default": [1, 2, 4, 8, 16], "metavar": "N"},
        "--arrivals": {"choices": ARRIVALS, "nargs": "+", "default": list(ARRIVALS), "help": "default: both"},
        "--rate": {"type": cli.real(1e-3, 1e5), "metavar": "R", "help": "Poisson arrivals a second, at every level"},
        "--requests": {"type": whole, "metavar": "N", "help": "a loop, at least (default: what fits --minutes)"},
        "--minutes": {"type": cli.real(0, 1e5), "default": 22.0, "metavar": "M", "help": "default: %(default)g"},
        "--repeats": {"type": whole, "default": 3, "metavar": "N", "help": "of closed loops; default: %(default)s"},
        "--max-new-tokens": {"type": cli.whole(2), "default": 32, "metavar": "N", "help": "default: %(default)s"},
        "--num-tokens": {"type": whole, "metavar": "K", "help": "drafted where speculation is on (default: the best)"},
        "--endurance": {"type": cli.whole(10), "default": 2000, "metavar": "N", "help": "requests; default: 2000"},
        "--seed": {"type": cli.whole(0), "default": 0, "metavar": "N", "help": "of Poisson arrivals; default: 0"},
        "--dtype": {"default": "auto", "help": "auto (default), bfloat16, float16, float32 or float64"},
        "--mode": {"choices": ENGINE_MODES, "default": "auto", "help": "default: %(default)s"},
        "--check": {"action": "store_true", "help": "measure all that has a bar, and exit 1 when one is missed"},
        "--out": {"required": True, "metavar": "DIR", "help": "folder for serving_load.json and .png"},
    }
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    return parser.parse_args(arguments)


def shortest(target: Target, prompts: Sequence[prompt_sets.Prompt], arguments: Namespace) -> list[str]:
    """First turns, the shortest first: reading a long prompt costs the same in every mode, and hides the rest."""
    room = target.max_length - arguments.max_new_tokens
    lengths = {
        turn: len(target.encode_chat([{"role": "user", "content": turn}], add_generation_prompt=True))
        for turn in dict.fromkeys(prompt.turns[0] for prompt in prompts)
    }
    fitting = [turn for turn in sorted(lengths, key=lambda turn: lengths[turn]) if lengths[turn] <= room]
    if not fitting:
        raise UserError(
            f"none of the prompts fits the target's {target.max_length} tokens with {arguments.max_new_tokens} new "
            "ones; take shorter ones."
        )
    return fitting[: arguments.limit]


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    began = time.monotonic()
    console = cli.make_console()
    out = cli.output_folder(arguments.out)
    disable_progress_bar()
    chosen = prompt_sets.load_prompts(arguments.prompts)
    cores = Cores.split()
    target = load_target(arguments.target, decoding_dtype(arguments.dtype, arguments.mode))
    head, about = load_head(arguments.head, dtype=target.dtype, device=target.device)
    attach_head(head, about, target)
    results: dict[str, Any] = {
        "benchmark": MODULE,
        **provenance.provenance(MODULE, command, target),
        "heads": [provenance.head_provenance(arguments.head, arguments.head)],
    }
    prompts = shortest(target, chosen.prompts, arguments)
    del target, head  # the servers have their own
    results |= {
        "prompts": {"files": chosen.files, "sha256": chosen.sha256, "count": len(prompts)},
        "settings": vars(arguments),
        "cores": {"engine": cores.engine, "io": cores.io, "in_words": str(cores)},
    }
    console.print(f"{cores}; the servers start")
    with bound(cores.io), ExitStack() as stack:
        results |= measure(arguments, prompts, cores, began, stack, console)
    results["seconds"] = time.monotonic() - began
    results["bars"] = load_bars.judge(results) if arguments.check else []
    report.show(console, results)
    output.write_results(out / "serving_load.json", results)
    report.draw(results, out / "serving_load.png")
    console.print(f"wrote {out / 'serving_load.json'} and {out / 'serving_load.png'}", soft_wrap=True)
    missed = [bar for bar in results["bars"] if bar["met"] is False]
    return 1 if arguments.check and missed else 0


def measure(
    arguments: Namespace, prompts: list[str], cores: Cores, began: float, stack: ExitStack, console: Any
) -> dict[str, Any]:
    """All that needs the servers."""
    size = max(*arguments.concurrency, HTTP_CONCURRENCY)
    options = {"target": arguments.target, "head": arguments.head, "dtype": arguments.dtype, "mode": arguments.mode}
    # a line without an end: what a mode cannot keep up with waits, and is not refused
    numbers = {"threads": len(cores.engine), "max_batch": size, "max_waiting": 1_000_000}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (options | numbers).items()]
    servers = {
        name: stack.enter_context(draft_serve([*flags, f"--speculation={name}"], lambda: bind(0, cores.engine)))
        for name in ("auto", "chain")
    }
    for each in servers.values():
        bind(each.process, cores.io)
    engine = None
    if arguments.check:
        everything = {**options, **numbers, "warm_up": True, "speculation": "chain"}
        engine = stack.enter_context(EngineProcess(everything, cores))
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
    left = 60 * arguments.minutes - (time.monotonic() - began)
    if arguments.requests:
        levels = {*plan.concurrency, HTTP_CONCURRENCY}
        requests = {level: level * -(-arguments.requests // level) for level in levels}
    else:
        requests = plan.fit(rates, left)
    console.print(_forecast(plan, rates, requests))
    with cli.progress_bar() as progress:
        found = run_all(bench, plan, requests, engine, progress)
    return {**found, "num_tokens": bench.num_tokens, "requests": requests, "server_flags": flags}


def run_all(
    bench: Bench, plan: Plan, requests: dict[int, int], engine: EngineProcess | None, progress: Progress
) -> dict[str, Any]:
    """Endurance first, by a server that has done nothing else yet."""
    loops = len(plan.concurrency) * len(MODES)
    total = loops * (plan.repeats * ("closed" in plan.arrivals) + ("poisson" in plan.arrivals))
    extra = 2 + plan.http_repeats + 1 if engine is not None else 0
    bar = progress.add_task("serving", total=total + extra)

    def step() -> None:
        progress.advance(bar)

    found: dict[str, Any] = {}
    if engine is not None:
        found["endurance"] = endure(bench, plan.endurance, step)
        found["http"] = compare_http(bench, engine, requests[HTTP_CONCURRENCY], plan.http_repeats, step)
    samples, arriving = sweep(bench, plan, requests, step)
    return found | {"loads": report.summarise(samples, arriving)}


def _forecast(plan: Plan, rates: Rates, requests: dict[int, int]) -> str:
    counts = ", ".join(f"{requests[level]} at {level}" for level in plan.concurrency)
    seconds = plan.seconds(rates, requests)
    highest = rates.highest
    return (
        f"calibrated without speculation: {rates.of('off', 1):.2f} requests/s alone, {rates.of('off', highest):.2f} at "
        f"concurrency {highest}; requests a loop: {counts}; about {seconds / 60:.1f} minutes from now"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with command-line arguments; gives the exit status."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parse(command)
    return cli.run_program(lambda: benchmark(parsed, command))


if __name__ == "__main__":
    sys.exit(main())
