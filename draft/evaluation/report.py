"""A comparison as JSON, Markdown, a picture and a table on the terminal. None of them holds absolute paths."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from draft.errors import plain_console
from draft.evaluation.compare import BASELINE, CANDIDATE, GENERAL_TOLERANCE, Comparison, Measurement, Pair
from draft.evaluation.tau import Interval
from draft.evaluation.trained_rows import KEY, trained_row_ids
from draft.files import write_json

_COLUMNS = ["baseline τ", "candidate τ", "gain"]
_METHOD = (
    "τ = tokens emitted / verifications, the bonus token included and the prefill's token excluded. Brackets are 95 % "
    "bootstrap intervals by conversation; the gain is paired: both heads are judged on the same conversations in each "
    "resample. Greedy τ is replayed block by block as the engine decodes; τ at temperature 1 is an estimate for the "
    "rejection rule."
)
_ABSOLUTE_PATH = re.compile(r"(?<![\w./~:-])(?:~|/)[^\s'\",:]*/([^\s/'\",:]+)")


def write_report(comparison: Comparison, out_dir: str | Path) -> None:
    """Write comparison.json, comparison.md and comparison.png to a folder, which is made when missing."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", to_json(comparison))
    (folder / "comparison.md").write_text(to_markdown(comparison))
    draw(comparison, folder / "comparison.png")


def print_report(comparison: Comparison, console: Console | None = None) -> None:
    """Print a table of each measurement, the verdict and the warnings."""
    console = console or plain_console()
    for title, pair in _pairs(comparison):
        table = Table("K", *_COLUMNS, title=f"{title}, {pair.conversations} conversations")
        for column, cells in enumerate(_cells(pair)):
            deciding = column + 1 == comparison.deciding_length
            table.add_row(str(column + 1), *cells, style="bold" if deciding else None)
        console.print(table)
    console.print(summary(comparison), style="green" if comparison.ship else "yellow")
    for warning in comparison.warnings:
        console.print(f"Note: {warning}", style="yellow")


def summary(comparison: Comparison) -> str:
    """The verdict with the numbers that it follows from, in one line."""
    k = comparison.deciding_length
    parts = []
    for name, measurement in comparison.measurements.items():
        base, new = (measurement.greedy.taus[head][k - 1].value for head in (BASELINE, CANDIDATE))
        bar = "needs above 0 %" if name == "domain" else f"needs above -{GENERAL_TOLERANCE:.0%}".replace("%", " %")
        parts.append(f"{name} τ {base:.3f} -> {new:.3f}, gain {_percent(comparison.gain(measurement))} ({bar})")
    return f"Verdict at K = {k}: {comparison.verdict}. " + "; ".join(parts) + "."


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that was measured, ready for `json.dumps`; unknown numbers are null."""
    heads = {}
    for name, contender in comparison.contenders.items():
        about = {key: value for key, value in contender.about.items() if key != KEY}
        rows = trained_row_ids(contender.about)
        about |= {} if rows is None else {KEY: len(rows)}
        heads[name] = {"name": public(contender.name), "about": public(about)}
    measured = comparison.measurements
    return {
        "verdict": comparison.verdict,
        "summary": summary(comparison),
        "warnings": comparison.warnings,
        "deciding_length": comparison.deciding_length,
        "general_tolerance": GENERAL_TOLERANCE,
        "target": {"name": public(comparison.target_name), "fingerprint": comparison.target_fingerprint},
        "heads": heads,
        **{name: _measurement_json(measured[name]) if name in measured else None for name in ("domain", "general")},
    }


def _measurement_json(measurement: Measurement) -> dict[str, Any]:
    greedy = _pair_json(measurement.greedy)
    for column, entry in enumerate(greedy["speculation_lengths"]):
        for name in (BASELINE, CANDIDATE):
            replayed, k = measurement.replay(name), column + 1
            entry[name] |= {
                "drafted_per_position": replayed.drafted(k),
                "accepted_per_position": replayed.accepted(k),
                "acceptance_per_position": _numbers(replayed.acceptance_per_position(k)),
                "conditional_acceptance_per_position": _numbers(replayed.conditional_acceptance_per_position(k)),
            }
    return {"greedy": greedy, "temperature_1": measurement.sampled and _pair_json(measurement.sampled)}


def _pair_json(pair: Pair) -> dict[str, Any]:
    lengths = []
    for column, gain in enumerate(pair.gains):
        entry: dict[str, Any] = {"speculation_length": column + 1, "gain": _interval(gain)}
        for name, result in pair.results.items():
            entry[name] = {
                "acceptance_length": _interval(pair.taus[name][column]),
                "emitted": result.emitted[:, column].sum().item(),
                "verifications": result.verifications[:, column].sum().item(),
            }
        lengths.append(entry)
    return {"conversations": pair.conversations, "speculation_lengths": lengths}


def _interval(interval: Interval) -> dict[str, float | None]:
    value, low, high = _numbers([interval.value, interval.low, interval.high])
    return {"value": value, "low": low, "high": high}


def _numbers(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def public(value: Any) -> Any:
    """The same value with every absolute path in its strings cut to its last part."""
    if isinstance(value, Mapping):
        return {key: public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    return _ABSOLUTE_PATH.sub(r"\1", value) if isinstance(value, str) else value


def to_markdown(comparison: Comparison) -> str:
    """The same tables as on the terminal, with acceptance per position at the deciding length."""
    lines = [
        f"# {comparison.verdict.capitalize()}",
        "",
        summary(comparison),
        "",
        *(f"- Note: {warning}" for warning in comparison.warnings),
        "",
        f"Target {public(comparison.target_name)} ({comparison.target_fingerprint}). "
        + ", ".join(f"{name.capitalize()}: {public(head.name)}" for name, head in comparison.contenders.items())
        + f". {_METHOD}",
        "",
    ]
    for title, pair in _pairs(comparison):
        lines += [f"## {title}, {pair.conversations} conversations", ""]
        rows = [[str(column + 1), *cells] for column, cells in enumerate(_cells(pair))]
        lines += _markdown_table(["K", *_COLUMNS], rows)
    for name, measurement in comparison.measurements.items():
        k = comparison.deciding_length
        lines += [f"## {name.capitalize()}: greedy acceptance per draft position at K = {k}", ""]
        lines += ["Accepted / drafted, and in parentheses among those whose earlier drafts were all accepted.", ""]
        rows = []
        for head in (BASELINE, CANDIDATE):
            replayed = measurement.replay(head)
            pairs = zip(
                replayed.acceptance_per_position(k), replayed.conditional_acceptance_per_position(k), strict=True
            )
            rows.append([head, *(f"{plain:.3f} ({conditional:.3f})" for plain, conditional in pairs)])
        lines += _markdown_table(["head", *(str(position) for position in range(1, k + 1))], rows)
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(titles: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [titles, ["---"] * len(titles), *rows]] + [""]


def _pairs(comparison: Comparison) -> list[tuple[str, Pair]]:
    pairs = []
    for name, measurement in comparison.measurements.items():
        pairs.append((f"{name.capitalize()}, greedy", measurement.greedy))
        if measurement.sampled is not None:
            pairs.append((f"{name.capitalize()}, temperature 1 (estimate)", measurement.sampled))
    return pairs


def _cells(pair: Pair) -> list[list[str]]:
    columns = zip(pair.taus[BASELINE], pair.taus[CANDIDATE], pair.gains, strict=True)
    return [[str(base), str(new), _percent(gain)] for base, new, gain in columns]


def _percent(gain: Interval) -> str:
    return f"{100 * gain.value:+.1f} % [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def draw(comparison: Comparison, path: Path) -> None:
    """τ against K for both heads with their intervals, a panel for each set of rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measurements = comparison.measurements
    figure = Figure(figsize=(5.2 * len(measurements), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(measurements), sharey=True, squeeze=False)[0]
    for panel, (name, measurement) in zip(panels, measurements.items(), strict=True):
        for head, colour in ((BASELINE, "tab:gray"), (CANDIDATE, "tab:blue")):
            _curve(panel, measurement.greedy.taus[head], f"{head}, greedy", colour, "-")
            if measurement.sampled is not None:
                _curve(panel, measurement.sampled.taus[head], f"{head}, temperature 1", colour, "--")
        panel.axvline(comparison.deciding_length, color="black", linewidth=0.6, linestyle=":")
        panel.set_title(f"{name}, {measurement.greedy.conversations} greedy conversations")
        panel.set_xlabel("speculation length K")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("acceptance length τ (bonus token included)")
    panels[0].legend(fontsize="small")
    figure.suptitle(comparison.verdict)
    figure.savefig(path, dpi=120)


def _curve(panel: Any, taus: list[Interval], label: str, colour: str, line: str) -> None:
    values = [tau.value for tau in taus]
    below = [max(0.0, tau.value - tau.low) for tau in taus]  # rounding may leave -1e-16, which matplotlib refuses
    above = [max(0.0, tau.high - tau.value) for tau in taus]
    style = {"label": label, "color": colour, "linestyle": line, "marker": "o", "markersize": 3, "capsize": 2}
    panel.errorbar(range(1, len(taus) + 1), values, yerr=[below, above], **style)
