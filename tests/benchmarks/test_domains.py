"""benchmarks.domains and benchmarks.fine_tuned_target: prompts from templates, and a target that learns answers."""

import json

import pytest
import torch
from conftest import save_tiny_target

from benchmarks import domains, fine_tuned_target
from draft.data.prompts import kept_rows, load_prompts
from draft.errors import UserError
from draft.target import load_target


@pytest.mark.parametrize("name", domains.DOMAINS)
def test_prompts_are_different_and_depend_on_the_seed_alone(name):
    made = domains.conversations(name, 150, 1)
    prompts = [messages[-1]["content"] for messages, _ in made]
    assert len(set(prompts)) == 150 and made == domains.conversations(name, 150, 1)
    assert not any("{" in prompt for prompt in prompts)
    others = {messages[-1]["content"] for messages, _ in domains.conversations(name, 150, 2)}
    assert len(others & set(prompts)) < 75
    with_system = [message for messages, _ in made for message in messages if message["role"] == "system"]
    assert len(with_system) == (150 if domains.DOMAINS[name].system else 0)
    assert all(len(messages) == 1 for messages, _ in domains.conversations(name, 5, 1, system=False))


def test_records_of_tickets_are_json_of_what_the_ticket_says():
    for messages, answer in domains.conversations("tickets", 100, 3):
        record, text = json.loads(answer), messages[-1]["content"]
        assert list(record) == list(json.loads(domains.TICKET_SYSTEM.split("Example:\n")[1]))
        assert all(part in text for part in (record["product"], *record["customer"].values()))
        assert record["needs_human"] == (record["sentiment"] == "angry")


def test_mistakes_are_named(tmp_path, capsys, monkeypatch):
    few = domains.Domain("few", "", lambda pick: pick.choice("abc"))
    monkeypatch.setitem(domains.DOMAINS, "few", few)
    assert len(domains.conversations("few", 3, 0)) == 3
    with pytest.raises(UserError, match="--count 4: the templates of few give 3 different prompts; take fewer"):
        domains.conversations("few", 4, 0)
    out = str(tmp_path / "x.jsonl")
    assert domains.main(["sql", "--answers", "--out", out]) == 2
    assert "sql has prompts only; choose tickets" in capsys.readouterr().err


def test_a_target_learns_the_answers(tmp_path, capsys):
    save_tiny_target(tmp_path / "target", max_length=1024)
    pairs = tmp_path / "pairs.jsonl"
    assert domains.main(["tickets", "--no-system", "--answers", "--count", "12", "--out", str(pairs)]) == 0
    options = ["--target", str(tmp_path / "target"), "--pairs", str(pairs), "--out", str(tmp_path / "lora")]
    options += ["--epochs", "6", "--rank", "4", "--modules", "q_proj", "down_proj"]
    options += ["--learning-rate", "0.05", "--tokens-per-batch", "2500"]
    assert fine_tuned_target.main(options) == 0
    assert "--epochs 6" in (tmp_path / "lora" / "README.md").read_text()

    def loss(adapter):
        target = load_target(str(tmp_path / "target"), "float32", "cpu", adapter)
        rows = [row for pair in load_prompts(str(pairs), keep_responses=True) for row in kept_rows(target, pair)]
        with torch.no_grad():
            return float(fine_tuned_target.answer_loss(target, rows))

    assert loss(tmp_path / "lora") < 0.8 * loss(None)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    capsys.readouterr()
    assert fine_tuned_target.main([*options, "--pairs", str(prompts)]) == 2
