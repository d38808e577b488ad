"""A comparison as JSON, Markdown, a picture and a table on the terminal. None of them holds absolute paths."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from draft.evaluation.compare import BASELINE, CANDIDATE, GENERAL_TOLERANCE, KEY, Comparison, Pair, trained_row_ids
from draft.evaluation.replay import ReplayResult
from draft.evaluation.tau import Interval
from draft.files import atomic_file, write_json

_COLUMNS = ["K", "baseline τ", "candidate τ", "gain"]
_METHOD = (
    "τ = tokens emitted / verifications, the bonus token included and the prefill's token excluded. Brackets are 95 % "
    "bootstrap intervals by conversation; the gain is paired: both heads are judged on the same conversations in each "
    "resample. Greedy τ is replayed block by block as the engine decodes; τ at temperature 1 is an estimate for the "
    "rejection rule."
)
_ABSOLUTE_PATH = re.compile(r"(?<![\w./~:-])(?:~|/)[^\s'\",:]*/([^\s/'\",:]+)")


def write_report(comparison: Comparison, out_dir: str | Path, console: Console) -> None:
    """Write comparison.json, comparison.md and (see `new_figure`) comparison.png to a folder, made when missing."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", to_json(comparison))
    with atomic_file(folder / "comparison.md") as temporary:
        temporary.write_text(to_markdown(comparison), encoding="utf-8")
    draw(comparison, folder / "comparison.png", console)


def print_report(comparison: Comparison, console: Console) -> None:
    """Print a table of each measurement, the verdict and the warnings."""
    for title, rows in _tables(comparison):
        table = Table(*_COLUMNS, title=title)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == str(comparison.deciding_length) else None)
        console.print(table)
    console.print(summary(comparison), style="green" if comparison.ship else "yellow")
    for warning in comparison.warnings:
        console.print(f"Note: {warning}", style="yellow")


def summary(comparison: Comparison, verdict: str | None = None) -> str:
    """The verdict with the numbers that it follows from, in one line.

    verdict: of who measured more; None: the comparison's own.
    """
    k = comparison.deciding_length
    parts = []
    for name, measurement in comparison.measurements.items():
        base, new = (measurement.greedy.taus[head][k - 1].value for head in (BASELINE, CANDIDATE))
        bar = "needs above 0 %" if name == "domain" else f"needs above -{GENERAL_TOLERANCE:.0%}".replace("%", " %")
        parts.append(f"{name} τ {base:.3f} -> {new:.3f}, gain {_percent(comparison.gain(measurement))} ({bar})")
    return f"Verdict at K = {k}: {verdict or comparison.verdict}. " + "; ".join(parts) + "."


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything that was measured, ready for `json.dumps`; unknown numbers are null."""
    heads = {}
    for name, contender in comparison.contenders.items():
        about, rows = dict(contender.about), trained_row_ids(contender.about)
        about.pop(KEY, None)
        heads[name] = {"name": contender.name, "about": about if rows is None else {**about, KEY: len(rows)}}
    measured = {
        name: {"greedy": _pair_json(each.greedy), "temperature_1": each.sampled and _pair_json(each.sampled)}
        for name, each in comparison.measurements.items()
    }
    return public(
        {
            "verdict": comparison.verdict,
            "summary": summary(comparison),
            "warnings": comparison.warnings,
            "deciding_length": comparison.deciding_length,
            "general_tolerance": GENERAL_TOLERANCE,
            "target": {"name": comparison.target_name, "fingerprint": comparison.target_fingerprint},
            "heads": heads,
            "domain": measured["domain"],
            "general": measured.get("general"),
        }
    )


def _pair_json(pair: Pair) -> dict[str, Any]:
    lengths = []
    for k, gain in enumerate(pair.gains, 1):
        entry: dict[str, Any] = {"speculation_length": k, "gain": asdict(gain)}
        for name, result in pair.results.items():
            entry[name] = {
                "acceptance_length": asdict(pair.taus[name][k - 1]),
                "emitted": result.emitted[:, k - 1].sum().item(),
                "verifications": result.verifications[:, k - 1].sum().item(),
            }
            if isinstance(result, ReplayResult):
                entry[name] |= {
                    "drafted_per_position": result.drafted(k),
                    "accepted_per_position": result.accepted(k),
                    "acceptance_per_position": result.acceptance_per_position(k),
                    "conditional_acceptance_per_position": result.conditional_acceptance_per_position(k),
                }
        lengths.append(entry)
    return {"conversations": pair.conversations, "speculation_lengths": lengths}


def public(value: Any) -> Any:
    """The same value for a JSON file that others read: absolute paths cut to their last part, null for NaN."""
    if isinstance(value, Mapping):
        return {key: public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    if isinstance(value, float) and math.isnan(value):
        return None
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
    for title, rows in _tables(comparison):
        lines += [f"## {title}", "", *_markdown_table(_COLUMNS, rows)]
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


def _tables(comparison: Comparison) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield the title and the rows of each measurement."""
    for name, measurement in comparison.measurements.items():
        for kind, pair in (("greedy", measurement.greedy), ("temperature 1 (estimate)", measurement.sampled)):
            if pair is not None:
                columns = enumerate(zip(pair.taus[BASELINE], pair.taus[CANDIDATE], pair.gains, strict=True), 1)
                rows = [[str(k), str(base), str(new), _percent(gain)] for k, (base, new, gain) in columns]
                yield f"{name.capitalize()}, {kind}, {pair.conversations} conversations", rows


def _percent(gain: Interval) -> str:
    return f"{100 * gain.value:+.1f} % [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def draw(comparison: Comparison, path: Path, console: Console) -> None:
    """τ against K for both heads with their intervals, a panel for each set of rows."""
    measurements = comparison.measurements
    figure = new_figure(path.name, (5.2 * len(measurements), 4.2), console)
    if figure is None:
        return
    panels = figure.subplots(1, len(measurements), sharey=True, squeeze=False)[0]
    for panel, (name, measurement) in zip(panels, measurements.items(), strict=True):
        for kind, pair, line in (("greedy", measurement.greedy, "-"), ("temperature 1", measurement.sampled, "--")):
            for head, taus in pair.taus.items() if pair is not None else ():
                lengths = range(1, len(taus) + 1)
                style = {"color": {BASELINE: "tab:gray", CANDIDATE: "tab:blue"}[head], "linestyle": line}
                panel.plot(lengths, [tau.value for tau in taus], label=f"{head}, {kind}", marker=".", **style)
                panel.fill_between(lengths, [tau.low for tau in taus], [tau.high for tau in taus], alpha=0.1, **style)
        panel.axvline(comparison.deciding_length, color="black", linewidth=0.6, linestyle=":")
        title = f"{name}, {measurement.greedy.conversations} greedy conversations"
        panel.set(title=title, xlabel="speculation length K")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("acceptance length τ (bonus token included)")
    panels[0].legend(fontsize="small")
    figure.suptitle(comparison.verdict)
    figure.savefig(path, dpi=120)


def new_figure(picture: str, size: tuple[float, float], console: Console) -> Any:
    """An empty figure of matplotlib; None, with a sentence on the console, where that is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        missing = f"{picture} is not drawn: matplotlib is missing; `pip install 'draftsmith[train]'` adds it."
        console.print(missing, markup=False)
        return None
    return Figure(figsize=size, layout="constrained")
