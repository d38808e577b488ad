"""benchmarks.afa_lora.draft_heads on a tiny target and head: cells, ablations, and going on."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import make_tiny_head, save_tiny_target
from written_data import prepared

from benchmarks.afa_lora import draft_heads, options
from benchmarks.afa_lora.draft_heads import ABLATIONS, Heads, largest_gap, parse
from benchmarks.afa_lora.experiment import Run, setup
from draft.data.dataset import open_dataset
from draft.files import read_json
from draft.heads.checkpoint import load_head, save_head
from draft.training import trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("evidence")
    target = save_tiny_target(root / "target")
    save_head(make_tiny_head(target), root / "head", dtype=torch.float32, about={})
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {n}"}) + "\n" for n in range(20)))
    prepared(target, root / "data", prompts=[prompts], max_new_tokens=16, held_out_share=0.5, greedy_share=1.0)
    return root


def words(world, *more):
    models = ["--target", str(world / "target"), "--head", str(world / "head"), "--dtype", "float32"]
    return [*models, "--data", f"mine={world / 'data'}", "--out", str(world / "out"), *more]


def test_quick_run_compares_arms_and_goes_on(world, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "draw", lambda *given: None)  # a picture a run
    chosen = ["--ranks", "2", "--arms", "lora", "afa-lora", "--rates", "lora=1e-3,2e-3,1e30"]
    quick = words(world, "--quick", *chosen)
    assert draft_heads.main(quick) == 0
    results = read_json(world / "out" / "draft_heads.json")
    (cell,) = results["cells"]
    (before,) = [place["before"] for place in results["data"]]
    assert 0 < before["acceptance"] < 1 <= before["tau"] < 6
    assert cell["cell"] == "mine, rank 2" and set(cell["arms"]) == {"lora", "afa-lora"}
    assert cell["arms"]["lora"]["grid"][-1] == [1e30, None]  # diverged, which is an answer
    assert cell["arms"]["afa-lora"]["seeds"] == [0, 1]
    annealed = cell["arms"]["afa-lora"]["first_seed"]
    assert annealed["beta"] == 0 and annealed["merged_differences"]["float32"] < 1e-5
    assert 0 < annealed["merged_differences"]["bfloat16"] < 0.05
    for measure, low, high in (("acceptance", 0, 1), ("tau", 1, 6)):
        found = cell["measures"][measure]["all"]
        assert all(low <= score["value"] <= high for score in found["scores"].values())
        assert found["differences"]["afa-lora"]["low"] <= found["differences"]["afa-lora"]["high"]
    (log,) = (world / "out" / "runs" / "mine" / "afa-lora-alpha-4-rank-2").glob("rate-*-seed-0/metrics.jsonl")
    betas = [json.loads(line).get("beta") for line in log.read_text().splitlines()]
    assert betas == [None, pytest.approx(1 / 6), 0, 0, 0]  # 4 steps, annealed over the first 1.2
    text = (world / "out" / "draft_heads.md").read_text()
    assert options.QUICK_NOTE in text and "Mean of all domains and ranks, acceptance: AFA-LoRA - LoRA" in text
    assert (world / "out" / "draft_heads.png").stat().st_size > 5_000

    monkeypatch.setattr(Heads, "perform", None)  # nothing is left to do
    capsys.readouterr()
    assert draft_heads.main(quick) == 0
    assert read_json(world / "out" / "draft_heads.json")["cells"] == results["cells"]
    (world / "other").mkdir()
    (world / "other" / "train.parquet").write_bytes(b"other rows")
    assert draft_heads.main([*quick, "--data", f"mine={world / 'other'}"]) == 2
    assert "holds runs of another experiment (data_sha256 was" in capsys.readouterr().err
    assert draft_heads.main(words(world, "--quick", "--arms", "full")) == 2
    assert "the others are compared with lora; add it." in capsys.readouterr().err


def test_the_adaptive_annealing_ends_in_a_matrix(world, tmp_path):
    study = Heads(parse(words(world, "--quick")), tmp_path)
    chosen = {"rank": 2, "alpha": 4, **ABLATIONS["adaptive"]}
    result = study.perform(Run(setup("mine", "afa-lora", chosen), 1e-3, 0, "validation"), tmp_path / "run")
    assert result["beta"] == 0 and result["merged_differences"]["float32"] < 1e-5
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    annealed = [json.loads(line)["beta"] for line in log if "beta" in json.loads(line)]
    assert annealed == sorted(annealed, reverse=True) and annealed[-1] == 0 < annealed[0]


@torch.no_grad()
def test_acceptance_is_the_overlap_of_the_distributions(world):
    """The sum that the study makes from parts, made again position by position from whole distributions."""
    study = Heads(parse(words(world)), world / "out")
    head, _ = load_head(str(world / "head"), dtype=torch.float32)
    part = study._part("mine", "validation")
    rows = {row.id for row in part.rows}
    assert rows and not rows & {row.id for row in study._part("mine", "test").rows}
    assert not rows & {row.id for row in open_dataset(world / "data").rows("train")}
    units = study.acceptance(head, part)
    target, row = study.target, min(part.rows, key=lambda row: row.id)
    ids = torch.tensor([row.ids])
    output = target.forward(ids, layers=head.auxiliary_layers(target))
    p = target.logits(output.last_hidden)[0].softmax(-1)  # [tokens, vocab]
    p[:, sorted(target.eos_token_ids)] = 0
    total, count = 0.0, 0
    end = next(
        (n + 1 for n in range(row.prompt_length, len(row.ids)) if row.ids[n] in target.eos_token_ids), len(row.ids)
    )
    for step, hidden in enumerate(
        head.unroll(target.embedding(ids), output.states_of(head.auxiliary_layers(target)), 5)
    ):
        for entry in range(row.prompt_length - 1, end - 2 - step):
            q = torch.zeros_like(p[0])
            q[head.vocabulary] = head.logits(hidden[0, entry], step).softmax(-1)
            total, count = total + torch.minimum(p[entry + 1 + step], q).sum().item(), count + 1
    assert units[0] == [pytest.approx(total, rel=1e-4), count]


def made_up(study, run, folder):
    """The result of a run by formula: all weights gain, and AFA-LoRA a part of it."""
    value = {"lora": 0.5, "afa-lora": 0.52, "full": 0.6}[run.setup.method] - abs(math.log(run.rate / 1e-3)) / 100
    noise = np.random.default_rng(run.seed).normal(0, 0.001, 12)
    (folder / "metrics.jsonl").write_text("")
    return {"units": dict.fromkeys(("acceptance", "tau"), [[value + each, 1.0] for each in noise])}


def test_ablations_share_the_runs_that_they_do_not_change(world, monkeypatch):
    monkeypatch.setattr(Heads, "perform", made_up)
    out = world / "design"
    rates = [word for arm in ("lora", "afa-lora", "full") for word in ("--rates", f"{arm}=5e-4,1e-3,2e-3")]
    some = ["decay 0.6", "rank-stabilised", "three times the steps"]
    rest = ["--ranks", "4", "16", "--seeds", "3", "--ablations", *some, "--out", str(out)]
    assert set(some) < set(ABLATIONS) and draft_heads.main([*words(world, *rates), *rest]) == 0
    results = read_json(out / "draft_heads.json")
    assert [cell["cell"] for cell in results["cells"]] == [f"mine, rank {rank}" for rank in (4, 16)]
    assert [len(cell["arms"]) for cell in results["cells"]] == [3, 4]  # LoRA with itself at rank 16
    assert results["cells"][1]["arms"]["lora-again"]["seeds"] == [500, 501, 502]
    assert [cell["cell"] for cell in results["ablations"]] == [f"mine, {name}" for name in some]
    assert results["cells"][1]["measures"]["acceptance"]["all"]["share"]["value"] == pytest.approx(0.2, abs=0.02)
    stabilised = next(cell for cell in results["ablations"] if "stabilised" in cell["cell"])
    assert stabilised["options"]["alpha"] / 16 == pytest.approx(32 / 4)  # alpha / √rank
    runs = list((out / "runs" / "mine").glob("*/*/*.json"))
    cells, ablations = 2 * 2 * 6 + 6 + 3, 6 + 2 * 6 + 3 * 6  # all weights have no rank: once for both cells
    assert len(runs) == cells + ablations


def test_ablations_take_the_domain_with_the_largest_gap():
    def cell(place, rank, value):
        found = {"all": {"differences": {"full": {"value": value}}}}
        return {"place": place, "options": {"rank": rank}, "measures": {"acceptance": found}}

    cells = [cell("a", 16, 0.01), cell("b", 16, 0.03), cell("c", 16, 0.02), cell("a", 2, 0.5)]
    assert largest_gap(cells, 16) == "b"
