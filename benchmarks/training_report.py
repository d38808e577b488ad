"""Figures out of the timings of training steps, the bars, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.decode_report import spread
from benchmarks.kernel_costs import Bar
from benchmarks.output import make_figure, save_figure

__all__ = ["bar_values", "bars", "draw", "ratios", "show", "spread", "summarise"]

SHARE_OF_PRODUCT = 0.45
MOST_OVER_LORA = 1.05

Samples = list[dict[str, float]]  # seconds by part, one a repeat


def summarise(
    name: str, samples: Samples, tokens: int, flops: float, product: float, memory: int | None
) -> dict[str, Any]:
    """A row of the table: tokens a second, the parts, and the share of the best product that the step reaches."""
    seconds = [sum(sample.values()) for sample in samples]
    return {
        "method": name,
        "tokens_per_second": spread([tokens / each for each in seconds]),
        "seconds": spread(seconds),
        "parts": {part: median(sample[part] for sample in samples) for part in samples[0]},
        "flops": flops,
        "flops_per_second": flops / median(seconds),
        "share_of_product": flops / median(seconds) / product,
        "memory_peak_bytes": memory,
    }


def ratios(samples: Samples, others: Samples) -> dict[str, float]:
    """Step time over step time of the same repeat."""
    pairs = zip(samples, others, strict=True)
    return spread([sum(ours.values()) / sum(theirs.values()) for ours, theirs in pairs])


def bars(results: dict[str, Any]) -> list[Bar]:
    adapted = next(row for row in results["methods"] if row["method"] == "afa-lora")
    dtype = results["settings"]["dtype"]
    asked = "" if dtype == "bfloat16" else "; --dtype bfloat16 judges the bar as it was set"
    return [
        Bar(
            f"adapting / best {dtype} product, FLOP/s of unpadded tokens (trained in {dtype}{asked})",
            adapted["share_of_product"],
            SHARE_OF_PRODUCT,
            at_least=True,
        ),
        Bar("AFA-LoRA step / LoRA step", results["afa_over_lora"]["median"], MOST_OVER_LORA, at_least=False),
    ]


def bar_values(bar: Bar) -> dict[str, Any]:
    return {**asdict(bar), "met": bar.met}


def show(results: dict[str, Any], parts: Sequence[str], console: Console) -> None:
    """The tables: methods, ceilings, packing."""
    settings = results["settings"]
    table = Table(
        title=f"{settings['rows']} rows of {settings['length']} tokens, K = {settings['draft_steps']}, "
        f"{settings['dtype']}, {results['machine']['threads']} threads; medians of {settings['repeats']}"
    )
    table.add_column("method")
    for column in ("tokens/s", "least–most", "ms/step", *parts, "GFLOP/s", "of product", "memory peak"):
        table.add_column(column, justify="right")
    for row in results["methods"]:
        rate, seconds = row["tokens_per_second"], row["seconds"]["median"]
        memory = row["memory_peak_bytes"]
        table.add_row(
            row["method"],
            f"{rate['median']:.0f}",
            f"{rate['least']:.0f}–{rate['most']:.0f}",
            f"{1e3 * seconds:.1f}",
            *[f"{row['parts'][part] / seconds:.0%}" for part in parts],
            f"{row['flops_per_second'] / 1e9:.1f}",
            f"{row['share_of_product']:.1%}",
            "–" if memory is None else f"{memory / 2**20:.0f} MiB",
        )
    console.print(table)
    for name, product in results["products"].items():
        console.print(f"best {name} product: {product['flops_per_second'] / 1e9:.1f} GFLOP/s at {product['size']}³")
    ratio = results["afa_over_lora"]
    console.print(f"AFA-LoRA / LoRA step time: {_spread(ratio)}; system time {results['system_time_share']:.1%}")
    if results["packing"]:
        _show_packing(results["packing"], console)


def _show_packing(packing: dict[str, Any], console: Console) -> None:
    for name, rate in packing["tokens_per_second"].items():
        console.print(f"{name}: {rate['median']:.0f} real tokens/s, {packing['padding'][name]:.1%} padding")
    console.print(f"packed / padded speed: {_spread(packing['packed_over_padded'])}")


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['least']:.3f}–{values['most']:.3f})"


def draw(results: dict[str, Any], parts: Sequence[str], path: Path) -> None:
    """Step time by part, and the share of the best product."""
    rows = results["methods"]
    names = [row["method"] for row in rows]
    figure, (left, right) = make_figure(
        2, f"training steps, {results['settings']['dtype']}, {results['machine']['cpu']}"
    )
    bottom = [0.0] * len(rows)
    for part in parts:
        heights = [1e3 * row["parts"][part] for row in rows]
        left.bar(names, heights, bottom=bottom, label=part)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    left.set(ylabel="milliseconds a step")
    left.legend()
    right.bar(names, [row["share_of_product"] for row in rows])
    right.axhline(SHARE_OF_PRODUCT, linestyle="--", color="grey")
    right.set(ylabel="FLOP/s over the best matrix product's")
    save_figure(figure, path)
