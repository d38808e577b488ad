"""Figures of `benchmarks.decode_speed`: rates, predictions, bars, the table and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import llama_cpp, shared
from benchmarks.shared import at_least, at_most, spread
from benchmarks.timing import Key, Samples

GOOD_HEAD = 2.8  # acceptance length from which higher bars hold


def summarise(samples: Samples) -> list[dict[str, Any]]:
    """Return a row for each variant: rates, ratios to plain decoding of the same batch and temperature, counts."""
    rows = []
    order = {(key.name, key.weights): place for place, key in enumerate(samples)}
    by_setting = sorted(samples.items(), key=lambda item: (item[0][:2], item[0].rule or "", order[item[0][3:]]))
    for key, timings in by_setting:
        plain = samples.get(key._replace(name="plain"), [])
        plain = plain or samples.get(Key(key.batch, 0.0, None, "plain", key.weights), [])
        ratios = [one.rate / other.rate for one, other in zip(timings, plain, strict=False)]
        last = timings[-1]
        outputs = list(zip(last.outputs, plain[-1].outputs, strict=False)) if plain else []
        steps = sum(timing.verifications for timing in timings)
        rows.append(
            {
                **key._asdict(),
                "repeats": len(timings),
                "tokens_per_second": spread([timing.rate for timing in timings]),
                "over_plain": spread(ratios) if ratios else None,
                "acceptance_length": last.emitted / last.verifications if last.verifications else None,
                "milliseconds_per_verification": {
                    name: 1e3 * sum(dict(timing.parts)[name] for timing in timings) / steps * key.batch
                    for name, _ in last.parts
                }
                if steps
                else None,
                # of answers of the same length; transformers' are shorter
                "identical": sum(a == b[: len(a)] for a, b in outputs) / len(outputs) if outputs else None,
            }
        )
    return rows


def find(
    results: dict[str, Any], name: str, batch: int = 1, temperature: float = 0.0, weights: str | None = None
) -> dict[str, Any] | None:
    """Return the row of a variant, of its first rule where there are several."""
    wanted = {"name": name, "batch": batch, "temperature": temperature, "weights": weights}
    return next((row for row in results["rates"] if wanted.items() <= row.items()), None)


def own(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of engines with the target's weights as they are."""
    return [row for row in results["rates"] if row["weights"] is None]


def predict(results: dict[str, Any]) -> dict[str, Any] | None:
    """Return τ / (verify + K draft + re-read) by the measured step costs, of the best greedy chain at batch 1."""
    steps = results["steps"]
    if "draft" not in steps:
        return None
    widths = {int(width): seconds for width, seconds in steps["target"].items()}
    best: dict[str, Any] = {"name": "plain", "tokens_per_second": 1 / widths[1], "over_plain": 1.0}
    for row in own(results):
        kind, _, length = row["name"].partition(" ")
        if kind != "chain" or row["batch"] != 1 or row["temperature"] != 0 or not row["acceptance_length"]:
            continue
        k = int(length)
        seconds = float(np.interp(k + 1, list(widths), list(widths.values()))) + k * steps["draft"] + steps["re-read"]
        rate = row["acceptance_length"] / seconds
        if rate > best["tokens_per_second"]:
            best = {"name": row["name"], "tokens_per_second": rate, "over_plain": rate * widths[1]}
    return best


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each bar with the figure of this run; met is None where the run did not measure it."""
    steps = {int(width): seconds for width, seconds in results["steps"]["target"].items()}
    plain, automatic = find(results, "plain"), find(results, "automatic")
    generate = find(results, f"transformers {results['settings']['dtype']}, dynamic cache")
    bars = [
        at_most("plain step / reading its weights", steps[1] / results["floor"]["seconds"], 1.6),
        at_least("plain / transformers generate", _ratio(plain, generate), 2.5),
        at_most("verifying 8 tokens / plain step", steps[8] / steps[1], 1.25),
        at_most("verifying 16 tokens / plain step", steps[16] / steps[1], 1.7),
    ]
    if "draft" in results["steps"]:
        bars.append(at_most("draft step / plain step", results["steps"]["draft"] / steps[1], 0.06))
    chains = [row for row in own(results) if row["name"].startswith("chain") and row["batch"] == 1]
    tau = max((row["acceptance_length"] or 1.0 for row in chains if row["temperature"] == 0), default=1.0)
    owed = 1.6 if tau >= GOOD_HEAD else 1.1 if tau >= 1.9 else 1.0
    best = results["predicted"]
    if automatic and best:
        reached = automatic["tokens_per_second"]["median"] / best["tokens_per_second"]
        bars.append(at_least("automatic / what the costs predict", reached, 0.9))
        bars.append(at_least("automatic / plain, batch 1", automatic["over_plain"]["median"], owed))
        if tau >= GOOD_HEAD:
            bars.append(at_least("automatic / transformers generate", _ratio(automatic, generate), 4.0))
    for row in results["rates"]:
        if row["name"] != "automatic" or (row["batch"], row["temperature"], row["weights"]) == (1, 0, None):
            continue
        name = f"automatic / plain, batch {row['batch']}, temperature {row['temperature']:g}"
        name += "".join(f", {row[part]}" for part in ("rule", "weights") if row[part])
        good = (row["batch"], row["temperature"]) == (1, 1) and tau >= GOOD_HEAD
        bars.append(at_least(name, row["over_plain"]["median"], 1.25 if good else 0.98))
    bars.append(at_least("plain, batch 8 / batch 1", _ratio(find(results, "plain", batch=8), plain), 4.0))
    surroundings = results.get("surroundings") or {}
    bars.append(at_least("plain beside a busy process / alone", surroundings.get("busy_share"), 1 / 3))
    bars.append(at_most("seconds from the second start to 80 % of full speed", surroundings.get("start"), 20))
    bars.append(at_least("plain, int8 / plain", _ratio(find(results, "plain", weights="int8"), plain), 1.7))
    return bars + llama_cpp.judge(results["llama_cpp"])


def _ratio(row: dict[str, Any] | None, other: dict[str, Any] | None) -> float | None:
    if row is None or other is None:
        return None
    return row["tokens_per_second"]["median"] / other["tokens_per_second"]["median"]


# ---- table and picture ----


def show(console: Console, results: dict[str, Any]) -> None:
    steps, least = results["steps"], results["floor"]
    widths = {int(width): seconds for width, seconds in steps["target"].items()}
    console.print(_table(results))
    console.print(
        f"floor of a plain step: {least['weight_bytes'] / 1e6:.0f} MB at "
        f"{least['read_bytes_per_second'] / 1e9:.1f} GB/s = {1e3 * least['seconds']:.1f} ms; measured "
        f"{1e3 * widths[1]:.1f} ms, {widths[1] / least['seconds']:.2f} times that"
    )
    passes = ", ".join(f"{width}: {1e3 * s:.1f} ms ({s / widths[1]:.2f})" for width, s in widths.items())
    console.print(f"a pass over so many tokens (times a plain step): {passes}")
    if "draft" in steps:
        console.print(
            f"a draft step {1e3 * steps['draft']:.2f} ms ({steps['draft'] / widths[1]:.1%} of a plain step), "
            f"a re-read {1e3 * steps['re-read']:.2f} ms"
        )
    if results["predicted"]:
        best = results["predicted"]
        console.print(
            f"best by these costs: {best['name']}, {best['tokens_per_second']:.1f} tokens/s, "
            f"{best['over_plain']:.2f} times plain"
        )
    if results["llama_cpp"]:
        llama_cpp.show(console, results["llama_cpp"])
    shared.show_bars(console, results["bars"])


def _table(results: dict[str, Any]) -> Table:
    headings = ("batch", "T", "variant", "tokens/s", "spread", "of plain", "tau", "ms a verification", "identical")
    title = f"decode speed, {results['settings']['dtype']}, {results['threads']} threads"
    table = shared.make_table(title, headings, ("variant", "ms a verification"))
    for row in results["rates"]:
        rate, ratio, parts = row["tokens_per_second"], row["over_plain"], row["milliseconds_per_verification"]
        table.add_row(
            str(row["batch"]),
            f"{row['temperature']:g}",
            row["name"] + "".join(f", {row[part]}" for part in ("weights", "rule") if row[part]),
            f"{rate['median']:.1f}",
            f"{rate['least']:.1f}-{rate['most']:.1f}",
            f"{ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['most']:.2f}]" if ratio else "-",
            f"{row['acceptance_length']:.2f}" if row["acceptance_length"] else "-",
            ", ".join(f"{name} {value:.1f}" for name, value in parts.items()) if parts else "-",
            f"{row['identical']:.0%}" if row["identical"] is not None else "-",
        )
    return table


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw bars of tokens per second, a panel for each batch size; greedy only."""
    sizes = sorted({row["batch"] for row in results["rates"]})
    figure, axes = shared.make_figure(len(sizes), "decode speed, greedy, tokens per second")
    for axis, size in zip(axes, sizes, strict=True):
        rows = [row for row in results["rates"] if row["batch"] == size and row["temperature"] == 0]
        medians = [row["tokens_per_second"]["median"] for row in rows]
        errors = [
            [m - row["tokens_per_second"]["least"] for m, row in zip(medians, rows, strict=True)],
            [row["tokens_per_second"]["most"] - m for m, row in zip(medians, rows, strict=True)],
        ]
        names = [row["name"] + (f", {row['weights']}" if row["weights"] else "") for row in rows]
        axis.barh(names, medians, xerr=errors)
        axis.invert_yaxis()
        axis.set_title(f"batch {size}")
    shared.save_figure(figure, path)
