"""benchmarks.adaptation_domains on a tiny fine-tuned target: one method, judged, and gone on with."""

import json

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target, save_tiny_target
from peft import LoraConfig, get_peft_model

from benchmarks import adaptation_domains
from draft import demo
from draft.files import read_json
from draft.heads.checkpoint import save_head


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("domains")
    target = save_tiny_target(root / "target", max_length=1024)
    save_head(make_tiny_head(target), root / "head", dtype=torch.float32, about={})
    tuned = get_peft_model(make_tiny_target(dtype=torch.float32).model, LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(root / "tuned")
    (root / "general.jsonl").write_text("".join(json.dumps({"prompt": f"General {n}"}) + "\n" for n in range(8)))
    (root / "methods.yaml").write_text("mixed: --method full --mix-general 0.1\n")
    return root


def test_a_method_is_judged_and_not_run_twice(world, capsys, monkeypatch):
    monkeypatch.setattr(demo, "GENERAL_PROMPTS", world / "general.jsonl")
    out = world / "out"
    arguments = ["--target", str(world / "target"), "--head", str(world / "head"), "--out", str(out)]
    arguments += ["--target-adapter", str(world / "tuned"), "--methods", str(world / "methods.yaml"), "--count", "12"]
    arguments += ["--only", "tickets-fine-tuned", "--base", "--max-steps 2 --draft-steps 2", "--max-new-tokens", "12"]
    assert adaptation_domains.main(arguments) == 0
    results = read_json(out / "adaptation_domains.json")
    (run,) = results["runs"]
    assert (run["case"], run["method"]) == ("tickets-fine-tuned", "mixed")
    for what, rows in (("domain", 3), ("general", 4)):
        assert 0 < run[what]["conversations"] <= rows and run[what]["gain"]["low"] <= run[what]["gain"]["high"]
        assert all(1 <= run[what][head]["value"] <= 6 for head in ("base", "adapted"))
    assert "| tickets-fine-tuned | mixed | " in (out / "adaptation_domains.md").read_text()
    assert (out / "adaptation_domains.png").stat().st_size > 5_000
    monkeypatch.setattr(adaptation_domains, "draft_train", lambda *words: None)  # prepare says that it is complete
    monkeypatch.setattr(adaptation_domains, "replay", None)  # nothing is left to judge
    assert adaptation_domains.main(arguments) == 0
    assert read_json(out / "adaptation_domains.json")["runs"] == results["runs"]
    capsys.readouterr()
    for wrong, message in (
        (["--only", "mine"], "--only 'mine' is no domain"),
        (["--serve", "lora"], "--serve 'lora' is no method; they are mixed."),
    ):
        assert adaptation_domains.main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
