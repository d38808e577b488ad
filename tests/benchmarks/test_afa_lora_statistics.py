"""Statistics and design of benchmarks.afa_lora on made-up data with a known answer."""

import json
import math
from functools import partial

import numpy as np
import pytest

from benchmarks.afa_lora import report
from benchmarks.afa_lora.experiment import AGAIN, ARMS, TUNING_SEED, Experiment, Run, score, setup
from benchmarks.afa_lora.intervals import Bootstrap, Scores, holm
from draft.errors import UserError

MEANS = {"lora": 0.50, "afa-lora": 0.52, "full": 0.58, AGAIN: 0.50}


def made(rng, means=MEANS, seeds=5, units=60, between=0.02, paired=False):
    """Scores of arms with these true means: units differ alike for all arms, seeds by `between`.

    paired: LoRA and AFA-LoRA have the same seeds, as in the programs, and units have different weights, as acceptance
    has: two thirds of what a seed does to one of them it does to the other.
    """
    unit = rng.normal(0, 0.1, units)
    weight = rng.integers(20, 100, units).astype(float) if paired else np.ones(units)
    common = rng.normal(0, between * (2 / 3) ** 0.5, (seeds, 1)) if paired else 0.0
    found = {}
    for place, (arm, mean) in enumerate(means.items()):
        together = paired and arm in ("lora", "afa-lora")
        own = rng.normal(0, between * ((1 / 3) ** 0.5 if together else 1.0), (seeds, 1))
        value = mean + unit + own + common * together + rng.normal(0, 0.03, (seeds, units))
        first = 500 if arm == AGAIN else 0 if together else 10 * (place + 1)
        values = np.stack([value * weight, np.broadcast_to(weight, value.shape)], axis=-1)
        found[arm] = Scores(tuple(range(first, first + seeds)), values)
    return found


def resampled_seeds(arms, rng):
    """The interval of afa-lora - lora that resamples seeds like units: the wrong version."""
    means = {arm: scores.values[..., 0].mean(axis=1) for arm, scores in arms.items()}
    drawn = {arm: each[rng.integers(0, 5, (400, 5))].mean(axis=1) for arm, each in means.items()}
    return np.percentile(drawn["afa-lora"] - drawn["lora"], [2.5, 97.5])


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(0)
    rounds, kept = 300, {"score": 0, "difference": 0, "share": 0, "resampled": 0}
    for number in range(rounds):
        arms = made(rng)
        bootstrap = Bootstrap(arms, resamples=300, seed=number)
        found = {
            "score": (bootstrap.score("lora"), 0.50),
            "difference": (bootstrap.difference("afa-lora", "lora")[0], 0.02),
            "share": (bootstrap.share("afa-lora", "lora", "full"), 0.25),
        }
        for name, (interval, truth) in found.items():
            assert interval is not None
            kept[name] += interval.low <= truth <= interval.high
        low, high = resampled_seeds(arms, rng)
        kept["resampled"] += low <= 0.02 <= high
    covered = {name: count / rounds for name, count in kept.items()}
    for name in ("score", "difference", "share"):
        assert 0.93 <= covered[name] <= 0.99, covered
    assert covered["resampled"] < 0.92, covered  # what these intervals are there to avoid


@pytest.mark.parametrize(("seeds", "groups"), [(5, 1), (3, 1), (5, 2)])
def test_intervals_of_arms_with_the_same_seeds_cover_the_truth(seeds, groups):
    rng = np.random.default_rng(4)
    rounds, kept, false = 300, 0, 0
    tasks = ["a", "b"] * 30 if groups == 2 else None
    for number in range(rounds):
        interval, _ = Bootstrap(made(rng, seeds=seeds, paired=True), tasks, resamples=300, seed=number).difference(
            "afa-lora", "lora"
        )
        kept += interval.low <= 0.02 <= interval.high
        same = made(rng, {"lora": 0.5, "afa-lora": 0.5}, seeds=seeds, paired=True)
        false += Bootstrap(same, tasks, resamples=300, seed=number).difference("afa-lora", "lora")[1] < 0.05
    assert 0.93 <= kept / rounds <= 0.99 and false / rounds <= 0.08, (kept, false)


def test_no_difference_is_found_where_there_is_none_and_a_real_one_is():
    rng = np.random.default_rng(1)
    false, true = 0, 0
    for number in range(200):
        bootstrap = Bootstrap(made(rng), resamples=400, seed=number)
        false += bootstrap.difference(AGAIN, "lora")[1] < 0.05
        true += bootstrap.difference("full", "lora")[1] < 0.05
    assert false / 200 <= 0.08 and true / 200 > 0.9


def test_pairing_by_unit_and_seed_takes_out_what_arms_share():
    rng = np.random.default_rng(2)
    base = 0.5 + rng.normal(0, 0.2, 40) + rng.normal(0, 0.2, (5, 1)) + rng.normal(0, 0.001, (5, 40))

    def scores(value, seeds):
        return Scores(seeds, np.stack([value, np.ones_like(value)], axis=-1))

    arms = {"lora": scores(base, (0, 1, 2, 3, 4)), "afa-lora": scores(base + 0.01, (0, 1, 2, 3, 4))}
    interval, p = Bootstrap(arms).difference("afa-lora", "lora")
    assert interval.value == pytest.approx(0.01) and 0.0099 < interval.low < interval.high < 0.0101
    assert p < 0.001
    apart = arms | {"afa-lora": scores(base + 0.01, (5, 6, 7, 8, 9))}  # the same numbers, of seeds that do not pair
    wide, p = Bootstrap(apart).difference("afa-lora", "lora")
    assert wide.low < 0 < wide.high and p > 0.5


def test_the_score_is_the_mean_over_groups_of_ratios_of_sums():
    values = np.array([[[1, 2], [3, 4], [1, 1]], [[2, 2], [4, 4], [0, 1]]], dtype=float)  # [2 seeds, 3 units, 2]
    bootstrap = Bootstrap({"lora": Scores((0, 1), values)}, ["a", "a", "b"])
    assert bootstrap.points["lora"] == pytest.approx(((4 / 6 + 1) / 2 + (6 / 6 + 0) / 2) / 2)
    assert math.isnan(Bootstrap({"lora": Scores((0,), values[:1])}).score("lora").low)  # one seed: no spread


def test_share_is_left_out_where_there_is_no_gap():
    none = made(np.random.default_rng(3), {"lora": 0.5, "afa-lora": 0.51, "full": 0.5})
    assert Bootstrap(none).share("afa-lora", "lora", "full") is None


def test_holm():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": math.nan}
    assert holm(p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02, "e": math.nan}, nan_ok=True)
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


# ---- the design, with runs whose scores are a formula ----


def perform(best, calls, run, folder):
    """Scores that are best at a rate, by arm: what a training run would give."""
    assert folder.is_dir()
    calls.append(run)
    rng = np.random.default_rng(run.seed)
    if run.rate > 100 * best[run.setup.method]:
        return {"diverged": "step 3"}
    value = MEANS[run.setup.arm] - 0.05 * abs(math.log(run.rate / best[run.setup.method])) + rng.normal(0, 0.001, 20)
    (folder / "left").write_text("kept")
    (folder / "scratch").write_text("gone")
    return {"units": {"accuracy": [[float(each), 1.0] for each in value]}, "beta": 0.0}


def experiment(folder, best, calls):
    made = partial(perform, best, calls)
    return Experiment(folder, made, "accuracy", seeds=3, keep=("left",), say=lambda text: None)


def test_rates_are_tuned_until_the_best_one_is_inside(tmp_path):
    calls = []
    study = experiment(tmp_path, {"lora": 8e-3, "full": 1e-3}, calls)
    tuned = study.tuned(setup("maths", "lora", {"rank": 2}), [1e-3, 2e-3, 4e-3])
    assert tuned.rate == pytest.approx(8e-3) and tuned.inside
    assert list(tuned.scores) == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
    assert {(run.seed, run.part) for run in calls} == {(TUNING_SEED, "validation")}
    lower = study.tuned(setup("maths", "full", {"rank": 2}), [1.0, 2.0, 4.0])
    assert (lower.rate, lower.inside, len(lower.scores)) == (1 / 16, False, 7)  # given up, and said so
    assert lower.scores[4.0] == -math.inf  # diverged
    with pytest.raises(UserError, match="2 learning rates for lora; give three or more"):
        study.tuned(setup("maths", "lora", {}), [1e-3, 2e-3])


def test_a_finished_run_is_not_done_again_and_arms_share_what_they_have_in_common(tmp_path):
    best, calls = {"lora": 2e-3, "afa-lora": 2e-3, "full": 1e-3}, []
    study = experiment(tmp_path, best, calls)
    rates = dict.fromkeys(best, [1e-3, 2e-3, 4e-3]) | {"full": [5e-4, 1e-3, 2e-3]}
    arms = (*ARMS, AGAIN)

    def cells(study):
        return [
            report.run_cell(study, "maths", {"rank": 4, "decay_ratio": decay}, rates, label=f"decay {decay}",
                            arms=arms, measures=["accuracy"], groups=["a"] * 12 + ["b"] * 8)
            for decay in (0.3, 0.6)
        ]  # fmt: skip

    found = cells(study)
    assert len(calls) == 4 * (3 + 3) + 3  # afa-lora twice, lora and full once, LoRA's other seeds
    assert len({run.name for run in calls}) == len(calls)
    first = tmp_path / "runs" / "maths" / "lora-rank-4" / "rate-0.002-seed-0"
    assert sorted(path.name for path in first.iterdir()) == ["left", "test.json"]
    again = []
    assert cells(experiment(tmp_path, best, again)) == found and not again
    (first / "test.json").unlink()
    assert cells(experiment(tmp_path, best, again))[0]["measures"] == found[0]["measures"] and len(again) == 1

    everything = found[0]["measures"]["accuracy"]
    assert set(everything) == {"all", "a", "b"} and everything["a"]["units"] == 12
    assert everything["all"]["share"]["value"] == pytest.approx(0.25, abs=0.02)
    assert everything["all"]["differences"]["afa-lora"]["value"] == pytest.approx(0.02, abs=0.002)
    results = {"benchmark": "made up", "cells": found, "ablations": []}
    report.write(tmp_path, "made", results, "About.", {"Cells": "cells", "Ablations": "ablations"}, "accuracy")
    text = (tmp_path / "made.md").read_text()
    assert "| decay 0.6, b | accuracy (8) | " in text and "## Ablations" not in text
    assert (tmp_path / "made.png").stat().st_size > 5_000
    written = json.loads((tmp_path / "made.json").read_text())
    entries = [cell["measures"]["accuracy"]["all"]["differences"]["afa-lora"] for cell in written["cells"]]
    assert all(entry["p_holm"] == pytest.approx(2 * entry["p"]) for entry in entries)


def test_all_cells_together(tmp_path):
    """Ranks of a place judge the same units: two that agree in all say no more than one; two places are independent."""
    best = {"lora": 2e-3, "afa-lora": 2e-3, "full": 1e-3}
    study = experiment(tmp_path, best, [])
    rates = dict.fromkeys(best, [1e-3, 2e-3, 4e-3]) | {"full": [5e-4, 1e-3, 2e-3]}
    cells = [
        report.run_cell(study, place, {"rank": rank}, rates, label="x", arms=ARMS, measures=["accuracy"])
        for place in ("maths", "law")
        for rank in (2, 4)
    ]
    alone = cells[0]["measures"]["accuracy"]["all"]
    same = report.pooled(study, cells[:2], "accuracy")
    assert same["differences"]["afa-lora"] == pytest.approx(alone["differences"]["afa-lora"], abs=1e-9)
    together = report.pooled(study, cells, "accuracy")
    assert together["scores"]["full"]["value"] == pytest.approx(alone["scores"]["full"]["value"])
    assert together["share"]["value"] == pytest.approx(0.25, abs=0.02)


def test_a_rate_with_which_a_fresh_seed_diverges_gives_way_to_a_lower_one(tmp_path):
    def perform(run, folder):
        if run.part == "test" and run.rate == 2e-3 and run.seed == 1:
            return {"diverged": "step 3"}
        value = 0.5 - 0.05 * abs(math.log(run.rate / 2e-3))
        return {"units": {"accuracy": [[value + 0.001 * unit, 1.0] for unit in range(10)]}}

    study = Experiment(tmp_path, perform, "accuracy", seeds=3, say=lambda text: None)
    rates = {"lora": [5e-4, 1e-3, 2e-3, 4e-3]}
    cell = report.run_cell(study, "maths", {}, rates, label="x", arms=["lora"], measures=["accuracy"])
    assert (cell["arms"]["lora"]["rate"], cell["arms"]["lora"]["diverged"]) == (1e-3, [2e-3])


def test_equal_rates_do_not_let_a_grid_grow(tmp_path):
    def perform(run, folder):
        return {"units": {"accuracy": [[0.5, 1.0]] * 10}}

    study = Experiment(tmp_path, perform, "accuracy", seeds=3, say=lambda text: None)
    tuned = study.tuned(setup("maths", "lora", {}), [1e-3, 2e-3, 4e-3])
    assert (tuned.rate, tuned.inside) == (2e-3, False)  # an edge is as good


def test_runs_of_other_settings_are_refused(tmp_path):
    study = Experiment(tmp_path, lambda run, folder: {}, "accuracy", seeds=3)
    study.settle({"epochs": 1.0})
    study.settle({"epochs": 1.0})
    with pytest.raises(UserError, match="epochs was 1.0 there and is 2.0 now"):
        study.settle({"epochs": 2.0})


def test_a_run_that_diverged_is_named(tmp_path):
    study = experiment(tmp_path, {"lora": 1e-6}, [])
    (result,) = study.complete([Run(setup("maths", "lora", {}), 1.0, 0, "test")])
    assert score(result, "accuracy") == -math.inf
    with pytest.raises(UserError, match="maths/lora/rate-1-seed-0 diverged"):
        report.scores_of([result], [Run(setup("maths", "lora", {}), 1.0, 0, "test")], "accuracy")
