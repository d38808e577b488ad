"""benchmarks.afa_lora.supervised on a tiny target and questions: reading, likelihoods, and the whole comparison."""

import gzip
import json

import pytest
import torch
from conftest import save_tiny_target
from peft import get_peft_model

from benchmarks.afa_lora import language_models, supervised
from benchmarks.afa_lora.experiment import Setup
from benchmarks.afa_lora.supervised import Question, Supervised, log_likelihoods, read_questions, taking_turns
from draft.afa import set_annealing_step
from draft.errors import UserError
from draft.files import read_json

OPTIONS = {"truth": ["true", "false"], "choice": ["answer1", "answer2", "answer3"]}


def line(number, task, **changes):
    options = OPTIONS[task]
    answer = options[number % len(options)]
    row = {"task": task, "instruction": f"Is {number} it?\n\nAnswer format: {'/'.join(options)}", "answer": answer}
    return json.dumps(row | {"output": f"it is {answer}", **changes}) + "\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("supervised")
    save_tiny_target(root / "target")
    lines = "".join(line(number, task) for number in range(10) for task in OPTIONS)
    with gzip.open(root / "train.jsonl.gz", "wt") as file:
        file.write(lines)
    rows = [json.loads(line(number, task)) for number in range(10, 16) for task in OPTIONS]
    (root / "test.json").write_text(json.dumps(rows))
    return root


def words(world, *more):
    files = ["--train", str(world / "train.jsonl.gz"), "--test", str(world / "test.json")]
    return ["--target", str(world / "target"), *files, "--out", str(world / "out"), "--layers", "q_proj", *more]


@pytest.fixture(scope="module")
def study(world):
    return Supervised(supervised.parse(words(world, "--train-limit", "8", "--validation-limit", "4")))


def test_quick_run_reports_each_task_and_the_mean(world, monkeypatch, capsys):
    quick = words(world, "--quick", "--ranks", "2", "--arms", "lora", "afa-lora", "--rates", "lora=1e-3,2e-3,1e30")
    quick += ["--train-limit", "8", "--batch-size", "2"]
    assert supervised.main(quick) == 0
    results = read_json(world / "out" / "supervised.json")
    assert (results["data"]["train"], results["data"]["validation"], results["data"]["test"]) == (8, 4, 8)
    (cell,) = results["cells"]
    assert cell["arms"]["lora"]["seeds"] == [0, 1] and cell["arms"]["lora"]["grid"][-1] == [1e30, None]  # diverged
    assert set(results["before"]) == {"accuracy", "likelihood", "chance", "majority", "tasks"}
    assert results["before"]["tasks"]["truth"]["chance"] == 1 / 2 and set(results["before"]["tasks"]) == set(OPTIONS)
    for arm in ("lora", "afa-lora"):
        gain, after = cell["gains"]["likelihood"][arm], cell["measures"]["likelihood"]["all"]["scores"][arm]["value"]
        assert gain["value"] == pytest.approx(after - results["before"]["likelihood"]) and gain["low"] < gain["high"]
    assert results["before"]["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert 0 < results["before"]["likelihood"] < 1 and results["before"]["majority"] >= results["before"]["chance"]
    assert all(0 < value < 1 for _, value in cell["arms"]["lora"]["grid"][:2])  # tuned by likelihood
    parts = cell["measures"]["accuracy"]
    assert len(parts["truth"]["by_seed"]["lora"]) == 2
    assert {name: each["units"] for name, each in parts.items()} == {"all": 8, "truth": 4, "choice": 4}
    for arm in ("lora", "afa-lora"):
        scores = [parts[name]["scores"][arm]["value"] for name in ("all", "truth", "choice")]
        assert scores[0] == pytest.approx((scores[1] + scores[2]) / 2) and 0 <= scores[0] <= 1
    annealed = cell["arms"]["afa-lora"]["first_seed"]
    assert annealed["beta"] == 0 and annealed["merged_differences"]["float32"] < 1e-5
    assert annealed["merged_differences"]["bfloat16"] < 0.1
    (log,) = (world / "out" / "runs" / "questions" / "afa-lora-alpha-4-rank-2").glob("rate-*-seed-0/metrics.jsonl")
    betas = [json.loads(each)["beta"] for each in log.read_text().splitlines()]
    assert betas == [pytest.approx(1 / 6), 0, 0, 0]  # 4 steps, annealed over the first 1.2
    assert "| rank 2, choice | accuracy (4) |" in (world / "out" / "supervised.md").read_text()
    monkeypatch.setattr(Supervised, "perform", None)  # nothing is left to do
    capsys.readouterr()
    assert supervised.main(quick) == 0
    assert supervised.main([*quick, "--epochs", "2"]) == 2
    assert "holds runs of another experiment (epochs was 1.0 there and is 2.0 now)" in capsys.readouterr().err


def test_bf16_trains_every_weight_under_autocast(study, tmp_path):
    """The casts of weights that change must not be kept: two steps differ from one that is taken twice."""
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}] * 4
    losses = []
    for bf16 in (False, True):
        arguments = supervised.parse(words(tmp_path, "--batch-size", "1", *(["--bf16"] if bf16 else [])))
        run = supervised.Run(Setup("questions", "full", ()), 1e-2, 0, "test")
        folder = tmp_path / str(bf16)
        supervised.train(language_models.copy_of(study.target), rows, run, folder, arguments, 2)
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[0][-1] < losses[0][0] - 0.5 and losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_run_that_ends_within_annealing_is_refused(study):
    config = language_models.adapter_config("afa-lora", {"rank": 2, "alpha": 4}, ["q_proj"])
    model = get_peft_model(language_models.copy_of(study.target), config)
    set_annealing_step(model, 1, 10)
    with pytest.raises(UserError, match="is not a matrix yet"):
        language_models.logits_differences(model, [5, 6, 7])


def test_the_answer_is_the_option_of_the_largest_likelihood(study):
    """Options of one and of several tokens, against one whole pass for each option."""
    ids = torch.randint(3, 259, (6, 3, 6), generator=torch.Generator().manual_seed(0)).tolist()
    questions = [Question("t", [7, 8, 9 + n], [row[: 2 + (n + k) % 3] for k, row in enumerate(rows)], 0)
                 for n, rows in enumerate(ids)]  # fmt: skip
    questions += [Question("t", [4] * 20, [[5, 6, token] for token in (7, 8, 9)], 0)]  # only the last token differs
    questions += [Question("t", [4, 5], [[6, 7], [6, 7, 8, 9], [6, 7, 8]], 0)]  # each begins with another
    model, expected = study.target.model, []
    for question in questions:
        totals = []
        for output in question.outputs:
            log_p = model(torch.tensor([question.prompt + output])).logits[0].log_softmax(-1)
            start = len(question.prompt) - 1
            totals.append(sum(float(log_p[start + place, token]) for place, token in enumerate(output)))
        expected.append(totals)
    found = log_likelihoods(model, questions, tokens_per_batch=32)
    assert [len(totals) for totals in found] == [len(totals) for totals in expected]
    for totals, wanted in zip(found, expected, strict=True):
        assert totals == pytest.approx(wanted, abs=1e-4)
    assert len({totals.index(max(totals)) for totals in expected}) > 1


def test_texts_of_options_are_asked_for_without_the_others(tmp_path, study):
    """Rows in the ways of LLM-Adapters' files; true and false have no texts."""
    listed = "Choose: What is red?\n\nAnswer1: a sky at 9: 30 Answer2: Option2: blood\n\nAnswer format: answer1/answer2"
    rows = [
        {"instruction": listed, "output": "the correct answer is answer2", "answer": "answer2"},
        {"instruction": "Is it?\n\nAnswer format: true/false", "output": "it is true", "answer": "true"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = study.target.tokenizer
    (red, plain), unclear = read_questions(str(file), tokenizer, 1, "texts")
    assert tokenizer.decode(red.prompt, skip_special_tokens=True) == "Choose: What is red?\n\n"
    assert all(output[-1] == 1 for output in red.outputs) and not unclear
    written = [tokenizer.decode(output[:-1]) for output in red.outputs]
    assert (
        written == ["the correct answer is a sky at 9: 30", "the correct answer is Option2: blood"] and red.right == 1
    )
    (named, plain_named), _ = read_questions(str(file), tokenizer, 1)
    assert plain == plain_named and len(named.prompt) > len(red.prompt)


@pytest.mark.parametrize(
    "options",
    [
        "Answer2: a Answer1: b",
        "Answer1: a",
        "Answer1: see answer2: a Answer2: b",
        "Answer1: a Answer2:",
        "Answer1: a Answer2: a",
    ],
)
def test_questions_whose_texts_are_not_clear_are_left_out(tmp_path, study, options):
    row = {
        "instruction": f"What?\n\n{options}\n\nAnswer format: answer1/answer2",
        "output": "answer1",
        "answer": "answer1",
    }
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    assert read_questions(str(file), study.target.tokenizer, 1, "texts") == ([], 1)
    assert len(read_questions(str(file), study.target.tokenizer, 1)[0]) == 1


def test_parts_do_not_overlap_and_tasks_take_turns(study, world):
    texts = [{tuple(q.prompt) for q in part} for part in (study.training, *study.questions.values())]
    assert sum(map(len, texts)) == len(set().union(*texts)) == 8 + 4 + 12
    assert [q.task for q in taking_turns(study.training, 4, seed=0)].count("truth") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "maybe"}, r"line 2: the answer 'maybe' is none of the options \['true', 'false'\]"),
        ({"instruction": "Is it?"}, "none of the options"),
        ({"output": "it is so"}, "line 2: `output` holds the answer 'false' 0 times"),
        ({"output": "false: it is false"}, "holds the answer 'false' 2 times"),  # all options would begin with it
        ({"output": "falsehood"}, "0 times"),
        ({"answer": 3}, "line 2: `answer` is 3"),
    ],
)
def test_wrong_rows_are_named(tmp_path, study, changes, message):
    file = tmp_path / "wrong.jsonl"
    file.write_text(line(0, "truth") + line(1, "truth", **changes))
    with pytest.raises(UserError, match=message):
        read_questions(str(file), study.target.tokenizer, 1)
