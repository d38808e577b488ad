"""What decoding speed has to reach, and whether this run did."""

from __future__ import annotations

from typing import Any

from benchmarks import decode_report as report
from benchmarks.bars import at_least, at_most

GOOD_HEAD = 2.8  # the acceptance length from which more is owed


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar with the figure of this run; met is None where the run did not measure it."""
    steps = {int(width): seconds for width, seconds in results["steps"]["target"].items()}
    plain, automatic = report.find(results, "plain"), report.find(results, "automatic")
    generate = report.find(results, f"transformers {results['settings']['dtype']}, dynamic cache")
    bars = [
        at_most("plain step / reading its weights", steps[1] / results["floor"]["seconds"], 1.6),
        at_least("plain / transformers generate", _ratio(plain, generate), 2.5),
        at_most("verifying 8 tokens / plain step", steps[8] / steps[1], 1.6),
        at_most("verifying 16 tokens / plain step", steps[16] / steps[1], 1.9),
    ]
    if "draft" in results["steps"]:
        bars.append(at_most("draft step / plain step", results["steps"]["draft"] / steps[1], 0.10))
    best = results["predicted"]
    if automatic and best:
        reached = automatic["tokens_per_second"]["median"] / best["tokens_per_second"]
        bars.append(at_least("automatic / what the costs predict", reached, 0.9))
        bars.append(at_least("automatic / plain, batch 1", automatic["over_plain"]["median"], _owed(results)))
        if _longest_tau(results) >= GOOD_HEAD:
            bars.append(at_least("automatic / transformers generate", _ratio(automatic, generate), 4.0))
    for row in results["rates"]:
        if row["name"] != "automatic" or (row["batch"], row["temperature"]) == (1, 0):
            continue
        name = f"automatic / plain, batch {row['batch']}, temperature {row['temperature']:g}"
        name += f", {row['rule']}" if row["rule"] else ""
        good = (row["batch"], row["temperature"]) == (1, 1) and _longest_tau(results) >= GOOD_HEAD
        bars.append(at_least(name, row["over_plain"]["median"], 1.25 if good else 0.98))
    bars.append(at_least("plain, batch 8 / batch 1", _ratio(report.find(results, "plain", batch=8), plain), 4.0))
    surroundings = results.get("surroundings") or {}
    bars.append(at_least("plain beside a busy process / alone", surroundings.get("busy_share"), 1 / 3))
    bars.append(at_most("seconds from the second start to 80 % of full speed", surroundings.get("start"), 20))
    return bars


def _owed(results: dict[str, Any]) -> float:
    """What automatic mode owes over plain decoding, by the acceptance length."""
    tau = _longest_tau(results)
    return 1.6 if tau >= GOOD_HEAD else 1.1 if tau >= 1.9 else 1.0


def _longest_tau(results: dict[str, Any]) -> float:
    """The greatest acceptance length of all greedy chains, one request at a time."""
    rows = [row for row in results["rates"] if row["name"].startswith("chain") and row["batch"] == 1]
    return max((row["acceptance_length"] or 1.0 for row in rows if row["temperature"] == 0), default=1.0)


def _ratio(row: dict[str, Any] | None, other: dict[str, Any] | None) -> float | None:
    if row is None or other is None:
        return None
    return row["tokens_per_second"]["median"] / other["tokens_per_second"]["median"]
