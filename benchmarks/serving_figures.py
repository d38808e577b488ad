"""Figures of `benchmarks.serving_load`: rates, percentiles, bars, the tables and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import shared
from benchmarks.clients import Load
from benchmarks.shared import at_least, at_most, spread
from draft.evaluation.tau import acceptance_length

# bars
AUTOMATIC_OVER_BETTER = 0.97
OVER_HTTP = 0.95  # of the engine's throughput without HTTP
MEMORY_GROWTH = 1.05


class Key(NamedTuple):
    """Setting of a row of the results."""

    arrivals: str  # closed or poisson
    concurrency: int
    mode: str


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
