"""`prepare --from-capture` and `inspect` of captured traffic."""

import json
import random

import pyarrow.parquet as pq
import pytest
from conftest import byte_tokenizer, save_tiny_target
from rich.console import Console
from written_data import rows_of

from draft.data.capture import Captured, CapturedTarget, open_capture, shard_name, to_table
from draft.data.dataset import conversation_id, open_dataset
from draft.data.from_capture import as_rows, first_turns, hold_out_newest, near_duplicates, prepare_capture
from draft.errors import UserError
from draft.evaluation.captured import inspect_capture
from draft.target import load_target

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captured")
    save_tiny_target(folder / "target")
    return folder


@pytest.fixture(scope="module")
def target(root):
    return load_target(str(root / "target"), "float32")


def row(time: float, prompt: str, answer: str, temperature: float = 0.0, **fields) -> Captured:
    """A request with a token for each letter; an answer that ends with a dot ends its turn (id 2)."""
    ids = [TOKENIZER(text, add_special_tokens=False).input_ids for text in (prompt, answer.removesuffix("."))]
    ids[1] += [2] * answer.endswith(".")
    figures = {"head": "mine", "head_fingerprint": "f1", "drafted": 4, "accepted": 2, "emitted": 3, "verifications": 2}
    rest = {"truncated": False, "altered": False, "finish_reason": "length", **figures, **fields}
    return Captured(time, *ids, temperature, **rest)


def write(folder, rows, target, unique="a"):
    folder.mkdir(exist_ok=True)
    about = CapturedTarget("tiny", target.fingerprint, target.vocab_size, "float32")
    path = folder / shard_name(max(each.time for each in rows), unique)
    pq.write_table(to_table(rows, about), path)
    return open_capture(folder)


def test_the_data_set_has_the_usable_rows_once_and_the_newest_held_out(target, tmp_path):
    rows = [row(float(n), f"question {n}", f"answer {n * n}.", temperature=float(n % 2)) for n in range(1, 11)]
    rows += [
        row(20.0, "question 3", "answer 9.", 1.0),  # again: as old as it was first
        row(21.0, "question 2", "another answer"),  # in the conversation of its prompt
        row(22.0, "at 0.7", "x", 0.7),
        row(23.0, "penalised", "x", altered=True),
        row(24.0, "q" * 90, "long"),
    ]
    capture = write(tmp_path / "captured", rows[:5], target)
    capture = write(tmp_path / "captured", rows[5:], target, "b")
    dataset = prepare_capture(target, capture, tmp_path / "data", held_out_share=0.2, max_length=64)
    counts = dataset.manifest["counts"]
    found = {name: counts[name] for name in ("requests", "duplicates", "other_sampling", "too_long")}
    assert found == {"requests": 11, "duplicates": 1, "other_sampling": 2, "too_long": 1}
    texts = {split: [target.decode(each.ids) for each in dataset.rows(split)] for split in ("train", "held-out")}
    assert texts["held-out"] == ["question 9answer 81", "question 10answer 100"]
    assert texts["train"][-1] == "question 2another answer" and len(texts["train"]) == 9
    first, last = dataset.rows("train")[0], dataset.rows("held-out")[-1]
    assert (first.temperature, first.greedy, last.greedy, last.source) == (1.0, False, True, "captured")
    assert first.id == conversation_id(rows[0].prompt_ids) and first.prompt_length == len("question 1")
    assert [each for each, wanted in zip(first.ids, first.mask, strict=True) if wanted] == rows[0].answer_ids
    assert dataset.manifest["mix"]["greedy"] == pytest.approx(6 / 11)
    assert dataset.manifest["captured"] == {"from": 1.0, "until": 21.0}
    fewer = prepare_capture(target, capture, tmp_path / "fewer", num_prompts=3, until=10.0, held_out_share=0.4)
    assert [target.decode(each.ids)[:11] for each in rows_of(fewer)] == ["question 8a", "question 9a", "question 10"]


def test_what_a_head_was_trained_on_is_not_held_out(target, tmp_path):
    rows = [row(float(n), f"question {n}", "answer") for n in range(6)]
    capture = write(tmp_path / "captured", rows, target)
    seen = {conversation_id(rows[5].prompt_ids)[:12]}
    dataset = prepare_capture(target, capture, tmp_path / "data", held_out_share=0.3, trained=seen)
    assert [target.decode(each.ids) for each in dataset.rows("held-out")] == ["question 3answer", "question 4answer"]


def test_turns_of_a_conversation_are_known_by_the_tokens_that_they_repeat():
    prompts = [
        "<u>hi<a>",
        "<u>hi<a>hello<u>and<a>",
        "<u>hi<a>hello<u>and<a>so<u>on<a>",
        "<u>hi<a>",
        "<",
        "<u>hi<a>other",
    ]
    answers = ["hello.", "so.", "x.", "hm.", "b", "y."]

    def ids(texts):
        return [[ord(letter) for letter in text] for text in texts]

    assert first_turns(ids(prompts), ids(answers)) == [0, 0, 0, 0, 4, 5]
    assert first_turns(ids(prompts[1:]), ids(answers[1:])) == [0, 0, 2, 3, 4]  # the first turn was not captured
    assert first_turns(ids(prompts[::-1]), ids(answers[::-1]))[2:] == [2, 2, 2, 2]


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (0.01, 1), (0.5, 3), (0.99, 5), (1.0, 6)])
def test_shares_of_conversations(share, held_out, target, tmp_path):
    rows = hold_out_newest(as_rows([row(float(n), f"question {n}", "answer") for n in range(6)]), share)
    assert [each.split for each in rows] == ["train"] * (6 - held_out) + ["held-out"] * held_out


def test_near_duplicates_are_estimated():
    pick = random.Random(0)
    base = [pick.randrange(1000) for _ in range(200)]
    close, far = [*base[:190], *range(10)], [*base[:100], *range(100)]
    assert near_duplicates([base, base, close, far, [1, 2], [1, 2], [3]]) == 3


def test_another_target_or_nothing_to_use_is_one_sentence(target, tmp_path):
    capture = write(tmp_path / "captured", [row(1.0, "a", "b", 0.7), row(2.0, "c" * 90, "d")], target)
    with pytest.raises(UserError, match=r"can be used \(too long 1, other sampling 1\); raise --max-length, now 50"):
        prepare_capture(target, capture, tmp_path / "data", max_length=50)
    other = write(tmp_path / "other", [row(1.0, "a", "b")], target)
    other.target = CapturedTarget("another", "0123", 259)
    with pytest.raises(UserError, match=f"'another' with fingerprint 0123, and target .* has {target.fingerprint}"):
        prepare_capture(target, other, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_template_that_writes_the_date_is_told(target, tmp_path, caplog, monkeypatch):
    capture = write(tmp_path / "captured", [row(float(n), f"q{n}", f"a{n}.") for n in range(4)], target)
    prepare_capture(target, capture, tmp_path / "plain")
    assert "two days" not in caplog.text
    monkeypatch.setattr(target.tokenizer, "chat_template", "{{ strftime_now('%d') }}{{ messages[0].content }}")
    prepare_capture(target, capture, tmp_path / "dated")
    assert "a prompt that came on two days counts as two conversations" in caplog.text


def test_the_command_line(root, target, draft_train, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "150")
    captured, out = tmp_path / "captured", tmp_path / "data"
    write(captured, [row(float(n), f"question {n}", f"answer {n}.", float(n > 7)) for n in range(10)], target)
    command = ("prepare", "--target", root / "target", "--from-capture", captured, "--out", out)
    status, shown = draft_train(*command, "--held-out-share", 0.3)
    assert status == 0 and "7 rows to train on, 3 held out (requests 10" in " ".join(shown.split())
    assert len(open_dataset(out).rows("train")) == 7
    status, shown = draft_train("inspect", out, "--examples", 1)
    assert status == 0 and "question 0" in shown
    status, shown = draft_train(*command)
    assert status == 2 and "is a data set already" in shown
    for wrong in (
        ("--prompts", "x.jsonl"),
        ("--max-new-tokens", 9),
        ("--endpoint", "http://localhost:1"),
        ("--seed", 3),
    ):
        status, shown = draft_train(*command, *wrong)
        assert status == 2 and f"{wrong[0]} is about prompts and answers that are yet to be written" in shown
    status, shown = draft_train("inspect", captured)
    assert status == 0 and "10 requests in 1 shards" in shown and "greedy 8, temperature 1 2, other 0" in shown
    status, shown = draft_train(*command[:-4], "--from-capture", tmp_path / "none", "--out", tmp_path / "more")
    assert status == 2 and "holds no captured requests" in shown


def test_inspection_gives_each_head_its_acceptance_length(target, tmp_path):
    rows = [row(1.0, "a", "b"), row(2.0, "a", "b", emitted=6, head_fingerprint="f2"), row(3.0, "c", "d", head=None)]
    console = Console(record=True, width=150)
    inspect_capture(write(tmp_path / "captured", rows, target), console=console)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    cells = [line for line in lines if line]
    assert [[line[0], line[1], line[-1]] for line in cells] == [
        ["mine", "f1", "1.500"],
        ["mine", "f2", "3.000"],
        ["none", "f1", "1.500"],
    ]


def test_settings_of_the_manifest_are_json(target, tmp_path):
    capture = write(tmp_path / "captured", [row(float(n), f"question {n}", "answer") for n in range(3)], target)
    prepare_capture(target, capture, tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["answered_with_weights"] == "float32" and manifest["sources"] == ["captured"]
