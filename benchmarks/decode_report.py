"""Figures out of timings, and how they are shown."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.table import Table

from benchmarks import output
from benchmarks.bars import show_bars
from benchmarks.decode_baselines import Timing


class Key(NamedTuple):
    """What is compared."""

    batch: int
    temperature: float
    rule: str | None
    name: str

    @classmethod
    def of(cls, variant: _Variant) -> Key:
        return cls(variant.batch, variant.temperature, variant.rule, variant.name)


class _Variant(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def rule(self) -> str | None: ...


Samples = dict[Key, list[Timing]]  # one for each repeat


def pool(timings: list[Timing]) -> Timing:
    """All batches of one repeat together."""
    parts: dict[str, float] = {}
    for timing in timings:
        for name, seconds in timing.parts:
            parts[name] = parts.get(name, 0.0) + seconds
    return Timing(
        sum(timing.tokens for timing in timings),
        sum(timing.seconds for timing in timings),
        tuple(output for timing in timings for output in timing.outputs),
        sum(timing.verifications for timing in timings),
        sum(timing.emitted for timing in timings),
        tuple(parts.items()),
    )


def floor(size: int, bandwidth: float) -> dict[str, float]:
    """The least that a plain step can take: its weights are read once."""
    return {"weight_bytes": size, "read_bytes_per_second": bandwidth, "seconds": size / bandwidth}


def summarise(samples: Samples) -> list[dict[str, Any]]:
    """A row for each variant: rates, ratios to plain decoding of the same batch and temperature, what it did."""
    rows = []
    order = {key.name: place for place, key in enumerate(samples)}
    by_setting = sorted(samples.items(), key=lambda item: (item[0][:2], item[0].rule or "", order[item[0].name]))
    for key, timings in by_setting:
        plain = samples.get(key._replace(name="plain")) or samples.get(Key(key.batch, 0.0, None, "plain"), [])
        ratios = [own.rate / other.rate for own, other in zip(timings, plain, strict=False)]
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


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def find(results: dict[str, Any], name: str, batch: int = 1, temperature: float = 0.0) -> dict[str, Any] | None:
    """The row of a variant, of its first rule where there are several."""
    rows = (
        row for row in results["rates"] if (row["name"], row["batch"], row["temperature"]) == (name, batch, temperature)
    )
    return next(rows, None)


def predict(results: dict[str, Any]) -> dict[str, Any] | None:
    """tau / (verify + K draft + re-read) of the measured step costs, for the best chain of batch 1, greedy."""
    steps = results["steps"]
    if "draft" not in steps:
        return None
    widths = {int(width): seconds for width, seconds in steps["target"].items()}
    best: dict[str, Any] = {"name": "plain", "tokens_per_second": 1 / widths[1], "over_plain": 1.0}
    for row in results["rates"]:
        kind, _, length = row["name"].partition(" ")
        if kind != "chain" or row["batch"] != 1 or row["temperature"] != 0 or not row["acceptance_length"]:
            continue
        k = int(length)
        seconds = interpolate(widths, k + 1) + k * steps["draft"] + steps["re-read"]
        rate = row["acceptance_length"] / seconds
        if rate > best["tokens_per_second"]:
            best = {"name": row["name"], "tokens_per_second": rate, "over_plain": rate * widths[1]}
    return best


def interpolate(points: dict[int, float], at: int) -> float:
    """Linear between the measured widths."""
    below = max(width for width in points if width <= at)
    above = min((width for width in points if width >= at), default=below)
    share = (at - below) / (above - below) if above > below else 0.0
    return points[below] + share * (points[above] - points[below])


# ---- what people see ----


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
    show_bars(console, results["bars"])


def _table(results: dict[str, Any]) -> Table:
    table = Table(title=f"decode speed, {results['settings']['dtype']}, {results['threads']} threads")
    for heading in ("batch", "T", "variant", "tokens/s", "spread", "of plain", "tau", "ms a verification", "identical"):
        table.add_column(heading, justify="left" if heading in ("variant", "ms a verification") else "right")
    for row in results["rates"]:
        rate, ratio, parts = row["tokens_per_second"], row["over_plain"], row["milliseconds_per_verification"]
        table.add_row(
            str(row["batch"]),
            f"{row['temperature']:g}",
            row["name"] + (f", {row['rule']}" if row["rule"] else ""),
            f"{rate['median']:.1f}",
            f"{rate['least']:.1f}-{rate['most']:.1f}",
            f"{ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['most']:.2f}]" if ratio else "-",
            f"{row['acceptance_length']:.2f}" if row["acceptance_length"] else "-",
            ", ".join(f"{name} {value:.1f}" for name, value in parts.items()) if parts else "-",
            f"{row['identical']:.0%}" if row["identical"] is not None else "-",
        )
    return table


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars of tokens per second, a panel for each batch size; greedy only."""
    sizes = sorted({row["batch"] for row in results["rates"]})
    figure, axes = output.make_figure(len(sizes), "decode speed, greedy, tokens per second")
    for axis, size in zip(axes, sizes, strict=True):
        rows = [row for row in results["rates"] if row["batch"] == size and row["temperature"] == 0]
        medians = [row["tokens_per_second"]["median"] for row in rows]
        errors = [
            [m - row["tokens_per_second"]["least"] for m, row in zip(medians, rows, strict=True)],
            [row["tokens_per_second"]["most"] - m for m, row in zip(medians, rows, strict=True)],
        ]
        axis.barh([row["name"] for row in rows], medians, xerr=errors)
        axis.invert_yaxis()
        axis.set_title(f"batch {size}")
    output.save_figure(figure, path)
