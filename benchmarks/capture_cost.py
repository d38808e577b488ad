"""The cost of capturing traffic: a draft-serve with --capture beside one without, in turn, under the same requests.

Both decode without speculation, because what pays with it is still being learnt while they are timed; a captured
request is the same work either way. The requests are short, and so capturing is a larger share of the work than in
most traffic. A ratio is taken between neighbours in time; the bar is for the median of the ratios.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import parquet

from benchmarks import shared
from benchmarks.clients import Request, closed_loop
from benchmarks.core_binding import Cores, bind, bound
from benchmarks.serving_load import shortest
from benchmarks.shared import spread
from draft.errors import UserError
from draft.launcher import draft_serve
from draft.target import load_target
from serving.engine.setup import decoding_dtype

MODULE = "benchmarks.capture_cost"
EXAMPLES = f"""
examples:
  with the bar, in at most five minutes on two idle cores:
    python -m {MODULE} --check --out runs/capture_cost
  another load:
    python -m {MODULE} --concurrency 32 --requests 128 --max-new-tokens 16 --out runs/capture_cost
"""
MODES = ("without", "with")
THROUGHPUT = 0.99  # with --capture over without


def parse(arguments: Sequence[str]) -> Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    whole = shared.whole(1)
    parser.add_models(default=True)
    parser.add_prompts()
    parser.add("--limit", whole, default=32, metavar="N", help="the shortest N prompts")
    parser.add("--concurrency", whole, default=8, metavar="N", help="requests in flight")
    parser.add("--requests", whole, default=32, metavar="N", help="a loop")
    parser.add("--repeats", whole, default=8, metavar="N", help="loops of each server")
    parser.add("--max-new-tokens", shared.whole(2), default=32, metavar="N")
    parser.add_dtype()
    parser.add_output(MODULE)
    return parser.parse_args(arguments)


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    console = shared.make_console()
    out = shared.output_folder(arguments.out)
    chosen = shared.load_prompts(arguments.prompts)
    target = load_target(arguments.target, decoding_dtype(arguments.dtype, "auto"))
    shared.load_fitting_head(arguments.head, target)
    prompts = shortest(target, chosen.prompts, arguments)
    results: dict[str, Any] = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, target),
        "heads": [shared.head_provenance(arguments.head, arguments.head)],
        "prompts": chosen.provenance(len(prompts)),
        "settings": vars(arguments),
    }
    del target  # the servers load it
    rates, results["captured"] = measure(arguments, prompts)
    ratios = [one / other for one, other in zip(rates["with"], rates["without"], strict=True)]
    results["tokens_per_second"] = {mode: spread(rates[mode]) for mode in MODES}
    results["ratios"] = ratios
    results["ratio"] = spread(ratios)
    results["bars"] = judge(results)
    for mode in MODES:
        figures = results["tokens_per_second"][mode]
        console.print(
            f"{mode:>8} --capture: {figures['median']:.1f} tokens/s [{figures['least']:.1f}, {figures['most']:.1f}]"
        )
    console.print(f"{results['captured']} requests captured")
    shared.show_bars(console, results["bars"])
    shared.finish(console, results, out / "capture_cost", draw)
    return shared.exit_status(results, arguments.check)


def measure(arguments: Namespace, prompts: list[str]) -> tuple[dict[str, list[float]], int]:
    """Return the tokens per second of each loop by server, and the number of requests that were captured."""
    cores = Cores.split()
    flags = ["--target", arguments.target, "--head", arguments.head, "--speculation", "off"]
    flags += ["--dtype", arguments.dtype]
    flags += ["--threads", str(len(cores.engine)), "--max-batch", str(arguments.concurrency)]
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, list[str]] = {"without": [], "with": ["--capture", folder]}
        with bound(cores.io), ExitStack() as stack:
            with bound(cores.engine):  # the engines' threads inherit the cores
                servers = {mode: stack.enter_context(draft_serve([*flags, *options[mode]])) for mode in MODES}
            for server in servers.values():
                bind(server.process, cores.io)
            rates = time_loops({mode: server.url for mode, server in servers.items()}, arguments, prompts)
        # the server has ended, and so written all
        return rates, sum(parquet.read_metadata(file).num_rows for file in Path(folder).glob("*.parquet"))


def time_loops(urls: dict[str, str], arguments: Namespace, prompts: list[str]) -> dict[str, list[float]]:
    """Return the tokens per second of each loop by server; they take turns, and the first of each warms up."""
    requests = make_requests(arguments, prompts)
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    with shared.progress_bar() as progress:
        bar = progress.add_task("loops", total=len(MODES) * (arguments.repeats + 1))
        for repeat in range(arguments.repeats + 1):
            for mode in MODES if repeat % 2 else reversed(MODES):
                load = closed_loop(urls[mode], requests, arguments.concurrency)
                if failed := next((trace.error for trace in load.traces if trace.error), None):
                    raise UserError(f"the server {mode} --capture failed: {failed}.")
                if repeat:
                    rates[mode].append(load.rate)
                progress.advance(bar)
    return rates


def make_requests(arguments: Namespace, prompts: list[str]) -> list[Request]:
    settings = {"temperature": 0, "ignore_eos": True, "max_completion_tokens": arguments.max_new_tokens}
    return [
        Request(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": prompts[place % len(prompts)]}], **settings},
        )
        for place in range(arguments.requests)
    ]


def judge(results: dict[str, Any]) -> list[shared.Bar]:
    sent = results["settings"]["requests"] * (results["settings"]["repeats"] + 1)
    return [
        shared.at_least("tokens/s with --capture / without", results["ratio"]["median"], THROUGHPUT),
        shared.at_least("requests captured / sent", results["captured"] / sent, 1.0),
    ]


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the ratio of each pair of loops."""
    figure, (axis,) = shared.make_figure(1, "tokens/s with --capture over without")
    axis.plot(range(1, len(results["ratios"]) + 1), results["ratios"], "o", color="tab:blue")
    axis.axhline(results["ratio"]["median"], color="tab:blue", linewidth=1)
    axis.axhline(THROUGHPUT, color="gray", linestyle="--", linewidth=1)
    axis.set(xlabel="pair of loops")
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
