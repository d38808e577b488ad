"""What the benchmarks leave behind: intervals as text, JSON and PNG files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from draft.evaluation.tau import Interval


def interval_values(interval: Interval, prompts: int) -> dict[str, float | None]:
    """An interval for JSON, which has no NaN; without bounds for a single prompt, whose spread nobody knows."""
    values = {"value": interval.value, "low": interval.low, "high": interval.high}
    known = {name: prompts > 1 or name == "value" for name in values}
    return {name: value if known[name] and math.isfinite(value) else None for name, value in values.items()}


def interval_text(values: dict[str, float | None], form: str = ".2f") -> str:
    """`2.31 [2.20, 2.43]`; a dash for what could not be measured."""
    if values["value"] is None:
        return "–"
    if values["low"] is None or values["high"] is None:
        return f"{values['value']:{form}} [–]"
    return f"{values['value']:{form}} [{values['low']:{form}}, {values['high']:{form}}]"


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write JSON atomically: a list of rows gets one row a line, so that thousands of them stay readable."""
    parts = []
    for key, value in results.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"    {json.dumps(row, allow_nan=False, ensure_ascii=False)}" for row in value)
            text = f"[\n{rows}\n  ]"
        else:
            text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {text}")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(temporary, path)


def make_figure(columns: int, title: str) -> tuple[Any, Any]:
    """A figure with `columns` axes side by side, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * columns, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write the PNG through a temporary name and a rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, path)
