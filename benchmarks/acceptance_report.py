"""What benchmarks.acceptance_length makes of its records: figures with intervals, tables, the picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import output
from draft.evaluation.tau import bootstrap_gain, bootstrap_ratio

DECIDING_LENGTH = 5  # the speculation length of the table by category, where it was measured


@dataclass(frozen=True)
class Variant:
    """One way to decode a prompt; without a head it is plain decoding."""

    temperature: float
    head: str | None = None
    rule: str | None = None
    speculation_length: int = 0

    @property
    def plain(self) -> Variant:
        return Variant(self.temperature)


# ---- figures out of records ----


class Totals:
    """Records added up by prompt, for one variant and category: the unit that the bootstrap resamples."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self.records = list(records)
        self.emitted: Counter[str] = Counter()
        self.verifications: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        for row in self.records:
            self.emitted[row["prompt"]] += row["emitted"]
            self.verifications[row["prompt"]] += row["verifications"]
            self.seconds[row["prompt"]] += row["decode_seconds"]

    def per_position(self, key: str) -> list[int]:
        return [sum(column) for column in zip_longest(*(row[key] for row in self.records), fillvalue=0)]

    def tokens_per_second(self) -> float | None:
        seconds = sum(self.seconds.values())
        return sum(self.emitted.values()) / seconds if seconds else None


def paired(baseline: Totals, candidate: Totals, denominator: str) -> dict[str, Any]:
    """Relative gain of candidate over baseline in emitted tokens / `denominator`, with its interval, by prompt.

    Prompts whose answer ended with the prefill's token hold nothing to compare and are left out.
    """
    below, above = getattr(baseline, denominator), getattr(candidate, denominator)
    prompts = [prompt for prompt in baseline.emitted if below[prompt] and above[prompt]]
    if not prompts:
        return {"value": None, "low": None, "high": None, "prompts": 0}
    gain = bootstrap_gain(
        [(baseline.emitted[prompt], below[prompt]) for prompt in prompts],
        [(candidate.emitted[prompt], above[prompt]) for prompt in prompts],
    )
    return {**output.interval_values(gain, len(prompts)), "prompts": len(prompts)}


def group(records: list[dict[str, Any]]) -> dict[tuple[Variant, str], Totals]:
    """Totals by variant and category, `overall` among them."""
    rows: dict[tuple[Variant, str], list[dict[str, Any]]] = {}
    for row in records:
        variant = Variant(row["temperature"], row["head"], row["rule"], row["speculation_length"])
        for category in ("overall", row["category"]):
            rows.setdefault((variant, category), []).append(row)
    return {key: Totals(members) for key, members in rows.items()}


def summarise(groups: dict[tuple[Variant, str], Totals]) -> list[dict[str, Any]]:
    """One row for each speculative variant and category."""
    rows = []
    for (variant, category), totals in groups.items():
        if variant.head is None:
            continue
        plain = groups[variant.plain, category]
        drafted = totals.per_position("drafted_per_position")
        accepted = totals.per_position("accepted_per_position")
        counted = [prompt for prompt, steps in totals.verifications.items() if steps]  # as in `paired`
        tau = bootstrap_ratio([totals.emitted[p] for p in counted], [totals.verifications[p] for p in counted])
        speed = paired(plain, totals, "seconds")
        same = [row["first_difference"] is None for row in totals.records]
        rows.append(
            {
                **vars(variant),
                "category": category,
                "prompts": len(totals.emitted),
                "answers": len(totals.records),
                "emitted": sum(totals.emitted.values()),
                "verifications": sum(totals.verifications.values()),
                "acceptance_length": output.interval_values(tau, len(counted)),
                "acceptance_rate": sum(accepted) / sum(drafted) if sum(drafted) else None,
                "acceptance_per_position": [a / d if d else None for a, d in zip(accepted, drafted, strict=True)],
                "tokens_per_second": totals.tokens_per_second(),
                "plain_tokens_per_second": plain.tokens_per_second(),
                "speed_up": {
                    key: speed[key] + 1 if speed[key] is not None else None for key in ("value", "low", "high")
                },
                "identical_share": None if variant.rule == "rejection" else sum(same) / len(same),
            }
        )
    return rows


def compare(groups: dict[tuple[Variant, str], Totals], heads: list[str]) -> list[dict[str, Any]]:
    """Every later head against the first: relative gain in τ, paired by prompt."""
    rows = []
    for (variant, category), totals in groups.items():
        if variant.head in heads[1:]:
            first = Variant(variant.temperature, heads[0], variant.rule, variant.speculation_length)
            gain = paired(groups[first, category], totals, "verifications")
            row = {"baseline": heads[0], "candidate": variant.head, **vars(variant), "category": category, **gain}
            del row["head"]
            rows.append(row)
    return rows


# ---- showing ----


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def summary_table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("category", "head", "T", "rule"):
        table.add_column(name, overflow="fold")
    for name in ("K", "τ", "α", "α by position", "tok/s", "plain", "speed-up", "identical"):
        table.add_column(name, justify="right", no_wrap=name != "α by position")
    for row in rows:
        table.add_row(
            row["category"],
            row["head"],
            f"{row['temperature']:g}",
            row["rule"],
            str(row["speculation_length"]),
            output.interval_text(row["acceptance_length"]),
            percent(row["acceptance_rate"]),
            " ".join(percent(value).rstrip("%") for value in row["acceptance_per_position"]),
            rate(row["tokens_per_second"]),
            rate(row["plain_tokens_per_second"]),
            output.interval_text(row["speed_up"]),
            percent(row["identical_share"]),
        )
    return table


def comparison_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Gain in τ, paired by prompt, all categories", title_justify="left")
    for name in ("candidate", "baseline", "T", "rule", "K", "prompts", "gain", ""):
        table.add_column(name, overflow="fold")
    for row in rows:
        low, high = row["low"], row["high"]
        verdict = "no difference shown" if low is None or low <= 0 <= high else "better" if low > 0 else "worse"
        gain = {key: row[key] if row[key] is None else 100 * row[key] for key in ("value", "low", "high")}
        where = (f"{row['temperature']:g}", row["rule"], str(row["speculation_length"]), str(row["prompts"]))
        table.add_row(row["candidate"], row["baseline"], *where, output.interval_text(gain, "+.1f") + " %", verdict)
    return table


def show(console: Console, results: dict[str, Any]) -> None:
    """Print the tables, and the machine that their times are of."""
    overall = [row for row in results["summary"] if row["category"] == "overall"]
    lengths = {row["speculation_length"] for row in overall}
    deciding = DECIDING_LENGTH if DECIDING_LENGTH in lengths else max(lengths)
    by_category = [
        row for row in results["summary"] if row["category"] != "overall" and row["speculation_length"] == deciding
    ]
    by_category.sort(key=lambda row: (row["temperature"], row["rule"], row["category"]))
    console.print(summary_table("All categories", overall))
    console.print(summary_table(f"By category at K = {deciding} (the JSON has every K)", by_category))
    if results["comparisons"]:
        console.print(comparison_table([row for row in results["comparisons"] if row["category"] == "overall"]))
    machine = results["machine"]
    console.print(f"{machine['cpu']}, {machine['threads']} threads, {machine['device']}, {machine['dtype']}")


def draw(results: dict[str, Any], path: Path) -> None:
    """τ against K with intervals, and acceptance by position at the largest K."""
    figure, (left, right) = output.make_figure(2, f"Acceptance length, target {Path(results['target']['name']).name}")
    overall = [row for row in results["summary"] if row["category"] == "overall"]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in overall:
        lines.setdefault(f"T = {row['temperature']:g}, {row['rule']}, {row['head']}", []).append(row)
    for at, (label, rows) in enumerate(lines.items()):
        rows = sorted((row for row in rows if row["acceptance_length"]["value"]), key=lambda r: r["speculation_length"])
        if not rows:
            continue
        taus = [row["acceptance_length"] for row in rows]
        spread = [[abs((t[end] or t["value"]) - t["value"]) for t in taus] for end in ("low", "high")]
        shift = 0.06 * (at - (len(lines) - 1) / 2)  # beside each other, so that the intervals can be told apart
        places = [row["speculation_length"] + shift for row in rows]
        left.errorbar(places, [t["value"] for t in taus], yerr=spread, marker="o", capsize=3, label=label)
        rates = [math.nan if value is None else value for value in rows[-1]["acceptance_per_position"]]
        label += f", K = {rows[-1]['speculation_length']}"
        right.plot(range(1, len(rates) + 1), rates, marker="o", label=label)
    left.set(xlabel="speculation length K", ylabel="acceptance length τ, 95 % interval over prompts")
    left.set_xticks(sorted({row["speculation_length"] for row in overall}))
    right.set(xlabel="drafted position", ylabel="accepted / drafted", ylim=(0, 1))
    right.xaxis.get_major_locator().set_params(integer=True)
    for axis in (left, right):
        axis.legend(fontsize=8)
    output.save_figure(figure, path)
