"""benchmarks.afa_lora.reinforcement on a tiny target: GRPO, rollouts, reward, and the whole comparison."""

import json
import re

import pytest
import torch
from conftest import save_tiny_target
from transformers import TrainerCallback

from benchmarks.afa_lora import language_models, reinforcement
from benchmarks.afa_lora.experiment import Run, Setup
from benchmarks.afa_lora.reinforcement import (
    Problem,
    Reinforcement,
    divided,
    is_right,
    make_trainer,
    read_problems,
)
from draft.afa import beta_at, merge_adapter
from draft.errors import UserError
from draft.files import read_json

STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("reinforcement")
    save_tiny_target(root / "target")
    names = ["Ann", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal"]
    rows = [
        {"question": f"What are {n} {what} of {name} and {n}?", "answer": 2 * n}
        for n, name in enumerate(names)
        for what in ("cups", "hats", "pens", "pins", "keys", "jars")
    ]
    (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def words(world, *more):
    return ["--target", str(world / "target"), "--problems", str(world / "problems.jsonl"), "--out", str(world / "out"),
            "--layers", "q_proj", "down_proj", "--max-new-tokens", "4", "--quick", *more]  # fmt: skip


def test_quick_run_compares_all_arms_with_the_start(world, monkeypatch, capsys):
    quick = words(world, "--arms", "lora", "afa-lora")
    assert reinforcement.main(quick) == 0
    results = read_json(world / "out" / "reinforcement.json")
    (cell,) = results["cells"]
    assert {arm: each["seeds"] for arm, each in cell["arms"].items()} == dict.fromkeys(("lora", "afa-lora"), [0, 1])
    annealed = cell["arms"]["afa-lora"]["first_seed"]
    assert annealed["beta"] == 0 and annealed["merged_differences"]["float32"] < 1e-5
    found = cell["measures"]["accuracy"]["all"]["differences"]["afa-lora"]
    assert found["low"] <= found["value"] <= found["high"] and 0 < found["p_holm"] <= 1
    assert set(results["before"]["gains"]) == {"lora", "afa-lora"}
    assert all([len(seed) for seed in seeds] == [2, 2] for seeds in results["curves"].values())
    text = (world / "out" / "reinforcement.md").read_text()
    assert "Before: " in text and "After minus before: LoRA" in text
    for name in ("reinforcement.png", "reinforcement_rewards.png"):
        assert (world / "out" / name).stat().st_size > 5_000
    monkeypatch.setattr(Reinforcement, "perform", None)  # nothing is left to do
    capsys.readouterr()
    assert reinforcement.main(quick) == 0
    assert reinforcement.main(words(world, "--start-limit", "40")) == 2
    assert "problems leave none for train" in capsys.readouterr().err


def test_beta_follows_the_steps_of_grpo_and_rollouts_come_from_the_annealed_model(world, tmp_path, monkeypatch):
    """Each generation and each loss sees the β of its own optimiser step."""
    arguments = reinforcement.parse(words(world, "--steps", str(STEPS), "--completions", "4"))
    target = reinforcement.load_target(str(world / "target"), "float32")
    options = (("alpha", 4), ("decay_ratio", 0.75), ("rank", 2))
    run = Run(Setup("problems", "afa-lora", options), 1e-2, 0, "test")
    problems = read_problems(arguments.problems)
    trainer = make_trainer(language_models.copy_of(target), target.tokenizer, problems, run, tmp_path, arguments)
    layer = trainer.model.get_base_model().model.layers[3].self_attn.q_proj
    seen, generating = [], []

    def record(module, inputs):
        if not module.disable_adapters and not module.merged and module.active_adapters == ["default"]:
            kind = "rollout" if generating else "loss"
            seen.append((kind, trainer.state.global_step, float(module.annealed["default"].beta_on(inputs[0].device))))

    layer.register_forward_pre_hook(record)
    generate = type(target.model).generate

    def generating_now(*given, **settings):
        generating.append(1)
        try:
            return generate(*given, **settings)
        finally:
            generating.clear()

    monkeypatch.setattr(type(target.model), "generate", generating_now)
    trainer.train()
    expected = {beta_at(step, STEPS, 0.75) for step in range(STEPS)}
    for kind in ("rollout", "loss"):
        found = {(step, beta) for each, step, beta in seen if each == kind}
        assert found == {(step, beta_at(step, STEPS, 0.75)) for step in range(STEPS)}, kind
    assert len(expected) == STEPS and 0.0 in expected  # from 1, through the middle, to 0
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["beta"] for line in log] == [beta_at(step + 1, STEPS, 0.75) for step in range(STEPS)]
    assert all("reward" in line for line in log)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:  # where nothing was rewarded it is still 0, and merging changes nothing
            torch.nn.init.normal_(weight.data, std=0.1)
    found = language_models.logits_differences(trainer.model, [5, 6, 7])
    assert 0 < found["float32"] < 1e-5 and 0 < found["bfloat16"] < 0.1


def test_a_run_that_ends_within_annealing_is_refused(world, tmp_path):
    class StopAfterOne(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = True

    arguments = reinforcement.parse(words(world, "--steps", "10", "--completions", "2"))
    target = reinforcement.load_target(str(world / "target"), "float32")
    run = Run(Setup("problems", "afa-lora", (("alpha", 4), ("rank", 2))), 1e-3, 0, "test")
    problems = read_problems(arguments.problems)
    trainer = make_trainer(language_models.copy_of(target), target.tokenizer, problems, run, tmp_path, arguments)
    trainer.add_callback(StopAfterOne())
    trainer.train()
    with pytest.raises(UserError, match="at step 1 of 10; train on to step 3"):
        merge_adapter(trainer.model)


def test_the_last_number_decides():
    right = [("The answer is 12.", 12), ("3 + 4 = 7", 7), ("it is -2", -2), ("1,234.50 dollars", 1234.5), ("5-3", 3)]
    assert all(is_right(text, answer) for text, answer in right)
    wrong = [("12 or 13", 12), ("none", 0), ("", 0), ("1.21", 1.2), ("12-", -12)]
    assert not any(is_right(text, answer) for text, answer in wrong)
    assert reinforcement.reward(["it is 4", "4 or 5"], answer=[4.0, 4.0]) == [1.0, 0.0]


def test_problems_that_differ_in_numbers_only_are_in_one_part():
    texts = [
        f"{name} has {n} {what}." for name in "abcdefgh" for what in ("cups", "hats") for n in ("3", "1,000", "2.5")
    ]
    parts = divided([Problem(text, 1.0) for text in texts], {"test": 7, "train": 20})
    assert {name: len(part) for name, part in parts.items()} == {"test": 7, "train": 20}
    masked = [{re.sub(r"[\d.,]+", "", problem.question) for problem in part} for part in parts.values()]
    assert not masked[0] & masked[1]
    assert not divided([Problem("1 cup", 1.0), Problem("2 cup", 1.0)], {"test": 1, "train": 1})["train"]


@pytest.mark.parametrize(
    ("question", "answer", "solution"),
    [
        ("Ann has 3 cups and buys 4.", 7, "3 + 4 = 7"),
        ("She had 1,200 and gave 200 away.", 1000, "1200 - 200 = 1000"),
        ("He ate 9 of 50.", 41, "50 - 9 = 41"),  # the larger comes first, since nobody has -41
        ("2.5 hours at 4 an hour, shared by 20.", 0.5, "2.5 * 4 = 10, 10 / 20 = 0.5"),
        ("1 of 3.", 0.3333333333, "The answer is 0.3333333333."),  # as a quotient it has no end
        ("How many?", 5, "The answer is 5."),
        ("7 of 0.", 0, "7 * 0 = 0"),
    ],
)
def test_the_start_teaches_the_operations(question, answer, solution):
    assert Problem(question, float(answer)).solution == solution
    assert is_right(solution, answer)


def test_problems_are_read_once_and_wrong_ones_named(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(
        '{"question": "a", "answer": 1}\n{"question": " a", "answer": 2}\n{"question": "b", "answer": 2.5}\n'
    )
    assert [(problem.question, problem.solution) for problem in read_problems(str(file))] == [
        ("a", "The answer is 1."),
        ("b", "The answer is 2.5."),
    ]
    file.write_text("".join(f'{{"question": "3 {sign} 4?", "answer": 1}}\n' for sign in "+*-"))
    assert len(read_problems(str(file))) == 3
    for wrong in ('{"question": "a"}', '{"question": "a", "answer": "1"}', '{"question": "a", "answer": NaN}', "[]"):
        file.write_text(wrong + "\n")
        with pytest.raises(UserError, match="line 1"):
            read_problems(str(file))
