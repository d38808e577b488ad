"""benchmarks.pretraining on a tiny target: settings of two architectures, judged kind by kind, and gone on with."""

import json

import pytest
import torch
from conftest import make_tiny_target, save_tiny_target
from written_data import prepared

from benchmarks import pretraining
from draft.files import read_json


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("pretraining")
    save_tiny_target(root / "target")
    target = make_tiny_target(dtype=torch.float32)
    for kind in ("chat", "code"):
        (root / f"{kind}.jsonl").write_text("".join(json.dumps({"prompt": f"{kind} {n}"}) + "\n" for n in range(12)))
    prompts = [root / "chat.jsonl", root / "code.jsonl"]
    prepared(target, root / "data", prompts=prompts, max_new_tokens=12, greedy_share=1.0, held_out_share=0.25)
    settings = (
        "base: --draft-vocab-size 180\nfrozen: --freeze-lm-head --draft-vocab-size 100\neagle: --architecture eagle\n"
    )
    (root / "settings.yaml").write_text(settings)
    return root


def test_settings_are_judged_by_kind_and_not_trained_twice(world, capsys, monkeypatch):
    data, out = str(world / "data"), world / "out"
    arguments = ["--target", str(world / "target"), "--data", data, "--held-out", data, "--tokens", "300"]
    arguments += ["--base", "--draft-steps 2 --tokens-per-batch 100 --save-every 1"]
    arguments += ["--seeds", "3", "--settings", str(world / "settings.yaml"), "--out", str(out)]
    assert pretraining.main(arguments) == 0
    results = read_json(out / "pretraining.json")
    assert [run["setting"] for run in results["runs"]] == ["base", "frozen", "eagle"]
    assert set(results["kinds"]) == {"chat", "code"}
    for run in results["runs"]:
        assert set(run["tau"]) == {"chat", "code"} and 1 <= run["mean"] <= 6 and 150 <= run["tokens"] <= 300
    assert (out / "pretraining.png").stat().st_size > 5_000
    monkeypatch.setattr(pretraining.sys, "executable", "no-python")  # nothing is left to run
    assert pretraining.main(arguments) == 0
    again = read_json(out / "pretraining.json")
    assert [run["tau"] for run in again["runs"]] == [run["tau"] for run in results["runs"]]
    capsys.readouterr()
    assert pretraining.main([*arguments, "--only", "mine"]) == 2
    assert "--only 'mine' is no setting; they are base, frozen, eagle." in capsys.readouterr().err
    assert pretraining.main([*arguments, "--tokens", "200"]) == 2
    assert "holds a run of another command" in capsys.readouterr().err
    assert pretraining.main([*arguments, "--tokens", "1000000"]) == 2
    assert "none is read twice" in capsys.readouterr().err


def test_heads_that_are_there_are_judged_alone(world, capsys):
    data, out = str(world / "data"), world / "judged"
    heads = [str(world / "out" / f"{name}-3" / "head") for name in ("base", "eagle")]
    arguments = ["--target", str(world / "target"), "--held-out", data, "--out", str(out)]
    assert pretraining.main([*arguments, "--heads", *heads]) == 0
    runs = {run["setting"]: run for run in read_json(out / "pretraining.json")["runs"]}
    trained = {run["setting"]: run for run in read_json(world / "out" / "pretraining.json")["runs"]}
    assert list(runs) == heads
    assert runs[heads[0]]["tau"] == trained["base"]["tau"] and runs[heads[1]]["tau"] == trained["eagle"]["tau"]
    assert pretraining.main(arguments) == 2
    assert "nothing to judge" in capsys.readouterr().err
