"""What serving has to reach, and whether this run did."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.bars import Bar, at_least, at_most

AUTOMATIC_OVER_BETTER = 0.97
OVER_HTTP = 0.95  # of the engine's throughput without HTTP
MEMORY_GROWTH = 1.05


def judge(results: dict[str, Any]) -> list[Bar]:
    """Each bar with the figure of this run."""
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
    """The median over repeats of automatic's tokens per second / those, in the same repeat, of what is better overall.

    rates: mode -> tokens per second of each repeat. Taking the better anew in each repeat would reward its luck.
    """
    if not {"on", "off", "automatic"} <= rates.keys():
        return None
    better = max(("off", "on"), key=lambda mode: statistics.median(rates[mode]))
    ratios = [own / other for own, other in zip(rates["automatic"], rates[better], strict=False)]
    return statistics.median(ratios) if ratios else None
