"""benchmarks.weight_formats on a tiny target: what its figures mean, and a whole run as a user has it."""

import json
import math

import pytest
import torch
from conftest import make_tiny_target

from benchmarks import weight_formats
from benchmarks.accuracy import (
    Question,
    last_number,
    limited,
    mcnemar,
    option_scores,
    read_problems,
    read_questions,
    summarise_answers,
)
from benchmarks.weight_formats import compare_texts, divergence, log_probabilities, summarise_texts
from draft.errors import UserError
from serving.engine import Engine

PROMPTS = [[1, 75, 104, 2], [1, 90, 33, 41, 7, 2]]


def engine(weights: str = "float") -> Engine:
    target = make_tiny_target(dtype=torch.float32, max_length=128)
    return Engine(target, None, speculation="off", mode="compiled", weights=weights)


def figures(first: Engine, second: Engine) -> dict[str, float]:
    """KL and agreement of two engines, over texts that the first one writes."""
    rows = compare_texts({"bfloat16": first, "int8": second}, PROMPTS, 24)
    assert all(row["positions"] > 4 for row in rows)
    (summary,) = summarise_texts(rows)
    assert summary["kl"]["low"] <= summary["kl"]["value"] <= summary["kl"]["high"]
    return {name: summary[name]["value"] for name in ("kl", "agreement")}


def test_fewer_bits_change_more():
    rows = compare_texts({"float32": engine(), "int8": engine("int8"), "int4": engine("int4")}, PROMPTS, 24)
    kl = {(row["from"], row["to"]): row["kl"]["value"] for row in summarise_texts(rows)}
    assert list(kl) == [("float32", "int8"), ("float32", "int4")]
    assert 0 < kl["float32", "int8"] < kl["float32", "int4"] / 4


def test_equal_weights_differ_in_nothing_and_broken_ones_in_much():
    plain, rounded, broken = engine(), engine("int8"), engine("int8")
    assert figures(plain, engine()) == {"kl": 0, "agreement": 1}
    assert figures(rounded, engine("int8")) == {"kl": 0, "agreement": 1}
    broken.models.runner.target.decoder.layers[3].mlp.down_proj.packed.zero_()
    right, wrong = figures(plain, rounded), figures(plain, broken)
    assert 0 < right["kl"] < wrong["kl"] / 4
    assert wrong["agreement"] < right["agreement"] <= 1


def test_divergence_is_that_of_the_distributions():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.1, 0.7]])
    found = divergence(p.double().log(), q.double().log())
    expected = 0.5 * math.log(2) - 0.25 * math.log(2) - 0.1 * math.log(2) + 0.2 * math.log(2)
    assert found["kl"] == pytest.approx(expected, rel=1e-6)
    assert found["agreeing"] == 1


def test_options_are_scored_as_texts_of_their_own():
    own, prompt = engine(), [1, 80, 81, 82]
    options = [[5, 6, 7, 2], [5, 6, 9, 10, 2], [5, 6, 7, 8, 2], [5, 6, 2]]
    scores = option_scores(own, prompt, options)
    for option, score in zip(options, scores, strict=True):
        log_p = log_probabilities(own, prompt + option, len(prompt) + 2)
        assert score == pytest.approx(float(log_p[range(len(option) - 2), option[2:]].sum()), abs=1e-4)
    assert own.models.runner.cache.lengths == [0] * own.max_batch


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 1,234.50.", 1234.5),
        ("3 apples and -2", -2.0),
        ("$.5", 0.5),
        ("8", 8.0),
        ("10 - 3 = 7.", 7.0),
        ("no", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_mcnemar():
    assert mcnemar(0, 0) == 1 and mcnemar(7, 7) == 1
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_each_rounded_format_is_compared_with_the_plain_one():
    right = {"plain": (1, 1, 1, 0), "int8": (1, 1, 0, 1), "int4": (0, 0, 0, 0)}
    rows = [
        {"kind": "problem", "task": "sums"} | {name: bool(values[at]) for name, values in right.items()}
        for at in range(4)
    ]
    (row,) = summarise_answers(rows, list(right))
    assert [row[name]["value"] for name in right] == [0.75, 0.75, 0.0]
    assert [row["against"][name]["difference"]["value"] for name in ("int8", "int4")] == [0, -0.75]
    assert row["against"]["int8"]["only"] == {"plain": 1, "int8": 1}
    assert row["against"]["int4"]["only"] == {"plain": 3, "int4": 0} and row["against"]["int4"]["p"] == mcnemar(3, 0)


def test_questions_of_each_task_are_taken_at_equal_distances():
    rows = [Question(task, str(n), ("a", "b"), 0) for task in "xy" for n in range(10)]
    assert [(row.task, row.text) for row in limited(rows, 3)] == [(task, n) for task in "xy" for n in "036"]


@pytest.mark.parametrize(
    ("read", "row", "words"),
    [
        (read_questions, {"instruction": "Say. Answer format: a/b", "answer": "c"}, "must end with .* 'c'"),
        (read_questions, {"instruction": "Say yes", "answer": "yes"}, "must end with"),
        (read_questions, {"question": "Say", "answer": "yes"}, "needs `instruction`"),
        (lambda file: read_problems(file, 5), {"question": "Add", "answer": "many"}, "no number: 'many'"),
        (lambda file: read_problems(file, 5), {"question": "Add"}, "needs `question`.* and `answer`"),
        (lambda file: read_problems(file, 5), ["Add"], "needs `question`"),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path, read, row, words):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"line 1: .*{words}"):
        read(str(file))


def test_a_whole_run(small, two_prompts, tmp_path, capsys):
    choice = "Which?\n\nAnswer format: true/false"
    questions = [{"task": task, "instruction": choice, "answer": "true"} for task in ("one", "two")]
    problems = [{"question": "One and one?", "answer": "so\n#### 2"}, {"question": "Two and two?", "answer": 4.0}]
    for name, rows in (("choices", questions), ("sums", problems)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = small.partition(" --head")[0]
    options = f"--questions {tmp_path}/choices.jsonl --problems {tmp_path}/sums.jsonl --repeats 2 --threads 1"
    command = (
        f"{target} {two_prompts} {options} --max-new-tokens 8 --problem-tokens 8 --dtype bfloat16 --out {tmp_path}"
    )
    assert weight_formats.main(command.split()) == 0
    results = json.loads((tmp_path / "weight_formats.json").read_text())
    assert list(results["formats"]) == ["bfloat16", "int8", "int4", "float32"]
    pairs = [(row["from"], row["to"]) for row in results["distributions"]]
    rounded = ("int8", "int4")
    assert pairs == [*(("bfloat16", to) for to in rounded), *(("float32", to) for to in ("bfloat16", *rounded))]
    assert [(row["task"], row["count"], row["chance"]) for row in results["accuracy"]] == [
        ("one", 1, 0.5),
        ("two", 1, 0.5),
        ("sums", 2, None),
        ("all questions", 2, 0.5),
    ]
    assert results["speed"]["tokens_per_second"].keys() == {"bfloat16", *rounded}
    assert results["speed"]["over_plain"].keys() == set(rounded)
    read = {name: about["bytes_read_a_step"] for name, about in results["formats"].items()}
    assert read["int4"] < read["int8"] < 0.7 * read["bfloat16"]
    assert (tmp_path / "weight_formats.png").stat().st_size > 0
    assert capsys.readouterr().out.count("Accuracy in percent") == 2
    assert weight_formats.main([*command.split(), "--weights", "int4", "--skip-float32"]) == 0
    results = json.loads((tmp_path / "weight_formats.json").read_text())
    assert list(results["formats"]) == ["bfloat16", "int4"] and results["accuracy"][0]["against"].keys() == {"int4"}
