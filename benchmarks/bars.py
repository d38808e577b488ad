"""Bars: what a figure has to reach, and whether it did."""

from __future__ import annotations

from typing import Any

from rich.console import Console

Bar = dict[str, Any]  # bar: its name; figure; limit, in words; met: None where the run did not measure it


def at_most(bar: str, figure: float | None, limit: float) -> Bar:
    return {
        "bar": bar,
        "figure": figure,
        "limit": f"at most {limit:.4g}",
        "met": None if figure is None else figure <= limit,
    }


def at_least(bar: str, figure: float | None, limit: float) -> Bar:
    return {
        "bar": bar,
        "figure": figure,
        "limit": f"at least {limit:.4g}",
        "met": None if figure is None else figure >= limit,
    }


def show_bars(console: Console, bars: list[Bar], digits: int = 2) -> None:
    for bar in bars:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[bar["met"]]
        figure = "-" if bar["figure"] is None else f"{bar['figure']:.{digits}f}"
        console.print(f"{verdict:>12}  {bar['bar']}: {figure} ({bar['limit']})", highlight=False)
