"""Comparison of a cell's arms, and the tables and pictures of all cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from benchmarks import shared
from benchmarks.afa_lora.experiment import AGAIN, Experiment, Run, Tuned, scores_of, setup, without_divergence
from benchmarks.afa_lora.intervals import Bootstrap, Scores, holm
from draft.evaluation.tau import Interval
from draft.files import atomic_file

NAMES = {"lora": "LoRA", "afa-lora": "AFA-LoRA", "full": "all weights", AGAIN: "LoRA, other seeds"}
COLOURS = {"afa-lora": "tab:blue", "full": "tab:gray", AGAIN: "tab:orange"}


def run_cell(
    experiment: Experiment,
    place: str,
    options: Mapping[str, Any],
    rates: Mapping[str, Sequence[float]],
    *,
    label: str,
    arms: Sequence[str],
    measures: Sequence[str],
    seeds: Mapping[str, int] | None = None,
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Tune, train and judge a cell's arms, as far as that is not done, and return the comparison.

    rates: the first grid by method. seeds: of arms that have another number of them. groups: of the units; the score
    is the mean over groups, and each group is reported by itself as well.
    """
    specs = {arm: setup(place, arm, options) for arm in arms}
    tried = [arm for arm in arms if arm != AGAIN]  # LoRA's other seeds are trained at LoRA's rate

    def fresh(tuned: Mapping[str, Tuned]) -> dict[str, list[Run]]:
        return {
            arm: experiment.fresh(spec, tuned["lora" if arm == AGAIN else arm].rate, (seeds or {}).get(arm))
            for arm, spec in specs.items()
        }

    def completed(runs: Mapping[str, list[Run]]) -> dict[str, list[dict[str, Any]]]:
        # all at once, so that two processes that share the work do not wait for each other after every arm
        experiment.complete([run for each in runs.values() for run in each])
        return {arm: experiment.complete(each) for arm, each in runs.items()}

    completed({arm: experiment.tuning(specs[arm], rates[specs[arm].method]) for arm in tried})
    tuned = {arm: experiment.tuned(specs[arm], rates[specs[arm].method]) for arm in tried}
    while True:
        runs = fresh(tuned)
        results = completed(runs)
        lower = {arm: without_divergence(tuned[arm], results[arm]) for arm in tried}
        if lower == tuned:
            break
        tuned = lower
    tuned |= {arm: tuned["lora"] for arm in arms if arm == AGAIN}
    cell: dict[str, Any] = {"cell": label, "place": place, "options": dict(options), "arms": {}, "measures": {}}
    for arm in arms:
        extra = {key: value for key, value in results[arm][0].items() if key not in ("units", "seconds", "commit")}
        seconds = float(np.median([result["seconds"] for result in results[arm]]))
        cell["arms"][arm] = {
            **tuning(tuned[arm]),
            "commits": sorted({result.get("commit", "unknown") for result in results[arm]}),
            "seeds": [run.seed for run in runs[arm]],
            "seconds": seconds,
            "first_seed": extra,
        }
    for measure in measures:
        scores = {arm: scores_of(results[arm], runs[arm], measure) for arm in arms}
        parts = {"all": np.ones(next(iter(scores.values())).values.shape[1], dtype=bool)}
        if groups is not None and len(set(groups)) > 1:
            parts |= {each: np.array(groups) == each for each in sorted(set(groups))}
        cell["measures"][measure] = {}
        for part, chosen in parts.items():
            of_part = {arm: Scores(each.seeds, each.values[:, chosen]) for arm, each in scores.items()}
            names = None if groups is None else [name for name, kept in zip(groups, chosen, strict=True) if kept]
            cell["measures"][measure][part] = {"units": int(chosen.sum()), **figures(Bootstrap(of_part, names))}
    return cell


def pooled(experiment: Experiment, cells: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Any]:
    """Return the figures of all cells together: the mean over places of the mean over a place's cells.

    The cells of a place judge the same units, which are drawn together, and so are the seeds. measure: one of which a
    unit has the same denominator in all of them, so that the mean is over numerators.
    """
    shared_arms = [arm for arm in NAMES if all(arm in cell["arms"] for cell in cells)]
    places = list(dict.fromkeys(cell["place"] for cell in cells))
    scores, groups = {}, [""]
    for arm in shared_arms:
        parts, groups = [], []
        for place in places:
            values = []
            for cell in (each for each in cells if each["place"] == place):
                about = cell["arms"][arm]
                runs = experiment.fresh(setup(place, arm, cell["options"]), about["rate"], len(about["seeds"]))
                values.append(scores_of(experiment.complete(runs), runs, measure).values)
            parts.append(np.mean(values, axis=0))
            groups += [place] * parts[-1].shape[1]
        scores[arm] = Scores(tuple(about["seeds"]), np.concatenate(parts, axis=1))
    return figures(Bootstrap(scores, groups))


def gains(
    experiment: Experiment,
    cell: Mapping[str, Any],
    measure: str,
    before: Sequence[Sequence[float]],
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return what each arm of a cell has gained over what was there before training, paired by unit.

    before: the units of the untrained model.
    """
    found = {}
    for arm, about in cell["arms"].items():
        runs = experiment.fresh(setup(cell["place"], arm, cell["options"]), about["rate"], len(about["seeds"]))
        scores = scores_of(experiment.complete(runs), runs, measure)
        start = Scores(scores.seeds, np.repeat(np.array(before)[None], len(runs), axis=0))  # it has no seeds of its own
        found[arm] = values(Bootstrap({arm: scores, "start": start}, groups).difference(arm, "start")[0])
    return found


def gains_text(found: Mapping[str, Any]) -> str:
    return "; ".join(f"{NAMES[arm]} {interval(gain, '+.4f')}" for arm, gain in found.items())


def tuning(tuned: Tuned) -> dict[str, Any]:
    grid = [[rate, value if math.isfinite(value) else None] for rate, value in tuned.scores.items()]
    return {"rate": tuned.rate, "inside": tuned.inside, "grid": grid, "diverged": list(tuned.diverged)}


def figures(bootstrap: Bootstrap) -> dict[str, Any]:
    """Return scores, differences to LoRA with their p-values, and the share of the gap that AFA-LoRA closes."""
    arms = list(bootstrap.points)
    found: dict[str, Any] = {
        "scores": {arm: values(bootstrap.score(arm)) for arm in arms},
        "by_seed": bootstrap.by_seed,
        "differences": {},
    }
    for arm in arms:
        if arm != "lora" and "lora" in arms:
            interval, p = bootstrap.difference(arm, "lora")
            found["differences"][arm] = {**values(interval), "p": None if math.isnan(p) else p}
    if {"lora", "afa-lora", "full"} <= set(arms):
        share = bootstrap.share("afa-lora", "lora", "full")
        found["share"] = None if share is None else values(share)
    return found


def values(interval: Interval) -> dict[str, float | None]:
    """Return an interval for JSON, which has no NaN."""
    found = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def correct(cells: Sequence[dict[str, Any]]) -> None:
    """Add "p_holm" to the difference of AFA-LoRA in each cell, corrected over these cells, by measure."""
    for measure in {measure: None for cell in cells for measure in cell["measures"]}:
        entries = {
            str(place): cell["measures"][measure]["all"]["differences"]["afa-lora"]
            for place, cell in enumerate(cells)
            if "afa-lora" in cell["measures"].get(measure, {}).get("all", {}).get("differences", {})
        }
        p_values = {name: math.nan if entry["p"] is None else entry["p"] for name, entry in entries.items()}
        for name, p in holm(p_values).items():
            entries[name]["p_holm"] = None if math.isnan(p) else p


# ---- tables and pictures ----


HEADINGS = ("cell", "measure", *NAMES.values(), "AFA-LoRA - LoRA", "p, Holm", "other seeds - LoRA", "share of the gap")


def markdown(title: str, about: str, tables: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Return a table for each list of cells; `about` stands above them."""
    parts = [f"# {title}\n\n{about}\n"]
    for name, cells in tables.items():
        if cells:
            parts.append(f"\n## {name}\n\n{table(HEADINGS, [row for cell in cells for row in table_rows(cell)])}")
    return "".join(parts)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(headings), " | ".join("---" for _ in headings), *map(" | ".join, rows)]
    return "".join(f"| {line} |\n" for line in lines)


def table_rows(cell: dict[str, Any]) -> list[list[str]]:
    rows = []
    for measure, parts in cell["measures"].items():
        for part, each in parts.items():
            name = cell["cell"] if part == "all" else f"{cell['cell']}, {part}"
            scores = [interval(each["scores"].get(arm)) for arm in NAMES]
            difference, again = (each["differences"].get(arm) for arm in ("afa-lora", AGAIN))
            p = None if difference is None else difference.get("p_holm")  # of a single task: none
            row = [name, f"{measure} ({each['units']})", *scores, interval(difference, "+.4f")]
            row += [
                "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
                interval(again, "+.4f"),
                interval(each.get("share"), ".2f"),
            ]
            rows.append(row)
    return rows


def interval(found: Mapping[str, Any] | None, form: str = ".4f") -> str:
    return "–" if found is None else shared.interval_text(dict(found), form)


def draw(title: str, cells: Sequence[dict[str, Any]], measure: str, path: Path) -> None:
    """Draw each arm's difference to LoRA in each cell, and the share of the gap that AFA-LoRA closes."""
    figure, (left, right) = shared.make_figure(2, title)
    figure.set_figheight(max(4.6, 0.45 * len(cells) + 1.6))
    for place, cell in enumerate(cells):
        each = cell["measures"][measure]["all"]
        for number, (arm, colour) in enumerate(COLOURS.items()):
            _bar(left, each["differences"].get(arm), place + 0.2 * (number - 1), colour)
        _bar(right, each.get("share"), place, "tab:blue")
    drawn = {arm for cell in cells for arm in cell["measures"][measure]["all"]["differences"]}
    for arm, colour in COLOURS.items():
        if arm in drawn:
            left.plot([], [], "o", color=colour, label=NAMES[arm])
    for axis in (left, right):
        axis.set_yticks(range(len(cells)), [cell["cell"] for cell in cells])
        axis.set_ylim(len(cells) - 0.5, -0.5)
        axis.axvline(0, color="black", linewidth=0.8)
    right.axvline(1, color="black", linewidth=0.8, linestyle=":")
    left.legend(fontsize=8)
    left.set(xlabel=f"{measure}: difference to LoRA, 95 % interval")
    right.set(xlabel="share of the gap LoRA - all weights that AFA-LoRA closes")
    shared.save_figure(figure, path)


def _bar(axis: Any, found: Mapping[str, Any] | None, place: float, colour: str) -> None:
    if found is None:
        return
    axis.plot(found["value"], place, "o", color=colour)
    if found["low"] is not None:
        axis.plot([found["low"], found["high"]], [place, place], color=colour)


def write(out: Path, name: str, results: dict[str, Any], about: str, tables: Mapping[str, str], measure: str) -> None:
    """Write NAME.json, NAME.md and NAME.png; tables: title -> key of its cells in the results."""
    for key in tables.values():
        correct(results[key])
    shown = {title: results[key] for title, key in tables.items()}
    cells = [cell for key in tables.values() for cell in results[key]]
    with FileLock(out / f".{name}.lock"):  # two copies of a command may write at once
        shared.write_results(out / f"{name}.json", results)
        with atomic_file(out / f"{name}.md") as temporary:
            temporary.write_text(markdown(results["benchmark"], about, shown), encoding="utf-8")
        draw(f"{name}: AFA-LoRA and all weights beside LoRA", cells, measure, out / f"{name}.png")
