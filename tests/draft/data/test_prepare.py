"""`prepare` from end to end on a tiny target: what is stored, resumed, split, refused and shown."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_target, make_writing_target
from rich.console import Console
from trained_heads import responses_of
from written_data import prepared, rows_of

import draft.data.dataset
import draft.data.prompts
from draft.data.dataset import Row, Shard, assign_splits, open_dataset
from draft.data.generate import Endpoint
from draft.data.inspect import coloured, inspect
from draft.data.prepare import prepare
from draft.data.settings import EndpointSettings, LocalServer
from draft.errors import UserError

SELF_PROMPTED = {"num_prompts": 8}
QUESTIONS = [f"Question number {number}?" for number in range(20)]


@pytest.fixture(scope="module")
def target():
    return make_writing_target()


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"question": question}) for question in QUESTIONS))
    return path


@pytest.fixture
def run(target, server):
    """`prepare` through the server of the module's target."""

    def run(out, target=target, **arguments):
        writing = {} if arguments.get("keep_responses") else {"max_new_tokens": 12, "server": server}
        return prepare(target, out, **{**writing, "progress": False, **arguments})

    return run


def test_answers_to_a_file(run, target, questions, tmp_path):
    dataset = run(tmp_path / "data", prompts=[questions], greedy_share=0.25, held_out_share=0.2)
    rows = rows_of(dataset)
    assert len(rows) == 20 and len(dataset.rows("held-out")) == 4
    assert sum(row.temperature == 0 for row in rows) == 5 and {row.temperature for row in rows} == {0.0, 1.0}
    for row in rows:
        text = target.tokenizer.decode(row.ids[: row.prompt_length])
        assert text.startswith("<|im_start|>user\nQuestion") and text.endswith("<|im_start|>assistant\n")
        assert row.mask == [False] * row.prompt_length + [True] * row.trained
        assert row.trained == 12 or row.ids[-1] == 2
        assert row.top_p == 1.0 and row.source == "questions.jsonl"
    greedy = next(row for row in rows if row.temperature == 0)
    prompt, answer = greedy.ids[: greedy.prompt_length], greedy.ids[greedy.prompt_length :]
    assert responses_of(target, [prompt], 12) == [answer]

    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["target_fingerprint"] == target.fingerprint and manifest["template_hash"] == target.template_hash
    assert manifest["seed"] == 0 and manifest["counts"]["train"]["rows"] == 16
    tokens = sum(manifest["counts"][split]["tokens"] for split in ("train", "held-out"))
    assert tokens == sum(len(row.ids) for row in rows)
    assert not (tmp_path / "data" / "parts").exists()
    assert pq.read_schema(tmp_path / "data" / "train.parquet").names[:3] == ["id", "input_ids", "loss_mask"]

    out = io.StringIO()
    inspect(dataset.folder, examples=2, console=Console(file=out, width=120))
    assert target.fingerprint in out.getvalue() and "questions.jsonl: 16" in out.getvalue()
    assert out.getvalue().count("<|im_start|>user") == 2
    text = coloured(rows[0], target.tokenizer)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert green == target.tokenizer.decode(rows[0].ids[rows[0].prompt_length :])


def test_self_prompting(run, target, server, uninterrupted, tmp_path):
    dataset = run(tmp_path / "data", **SELF_PROMPTED, server=server.model_copy(update={"concurrency": 3}))
    rows = rows_of(dataset)
    prompts = {target.decode(row.ids[: row.prompt_length]) for row in rows}
    assert len(rows) == len(prompts) == 8 and {row.source for row in rows} == {"self-prompted"}
    assert all(len(prompt.split()) >= 3 for prompt in prompts)
    assert rows_of(dataset) == uninterrupted[0]  # fewer at once, the same data
    other = run(tmp_path / "other", **SELF_PROMPTED, seed=1)
    assert {row.id for row in other.rows("train")}.isdisjoint(row.id for row in rows)


def test_a_target_without_usable_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(draft.data.prompts, "_SELF_PROMPT_ROUNDS", 2)
    with pytest.raises(UserError, match="wrote no usable prompts.*--prompts"):
        prepared(make_tiny_target(seed=3), tmp_path / "data", num_prompts=1)  # bytes, not text
    assert not (tmp_path / "data").exists()


@contextmanager
def counted(stop_at: int | None = None) -> Iterator[list[Any]]:
    """The responses as a server finishes them, with a power cut at one of them."""
    answer, written = Endpoint.answer, []

    def counting(endpoint: Endpoint, questions: Any) -> Iterator[Any]:
        for result in answer(endpoint, questions):
            if len(written) + 1 == stop_at:
                raise RuntimeError("power cut")
            written.append(result)
            yield result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Endpoint, "answer", counting)
        yield written


@pytest.fixture(scope="module")
def uninterrupted(target, server, tmp_path_factory):
    options = {"max_new_tokens": 12, "server": server, "progress": False}
    with counted() as written:
        dataset = prepare(target, tmp_path_factory.mktemp("whole") / "data", **SELF_PROMPTED, **options)
    return rows_of(dataset), len(written)


@pytest.mark.parametrize("stop_at", [7, -3])  # among the prompts, and among the responses
def test_an_interrupted_run_goes_on(run, uninterrupted, tmp_path, monkeypatch, stop_at):
    whole, total = uninterrupted
    monkeypatch.setattr(draft.data.dataset, "_ROWS_PER_PART", 4)
    out = tmp_path / "data"
    with counted(stop_at % total) as first, pytest.raises(RuntimeError, match="power cut"):
        run(out, **SELF_PROMPTED)
    with pytest.raises(UserError, match="unfinished; repeat"):
        open_dataset(out)
    with pytest.raises(UserError, match=r"begun with max_new_tokens = 12, and this call has 13; choose another"):
        run(out, **SELF_PROMPTED, max_new_tokens=13)
    with counted() as second:
        assert rows_of(run(out, **SELF_PROMPTED)) == whole
    assert len(first) + len(second) == total  # nothing is written twice


def test_a_finished_data_set_is_left_alone(run, questions, tmp_path, capsys, monkeypatch):
    first = rows_of(run(tmp_path / "data", prompts=[questions]))
    monkeypatch.setattr(Endpoint, "answer", None)
    assert rows_of(run(tmp_path / "data", prompts=[questions], progress=True)) == first
    assert "complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="begun with target_fingerprint"):
        run(tmp_path / "data", make_tiny_target(seed=9), prompts=[questions])
    questions.write_text(questions.read_text().replace("number 3", "number 33"))
    with pytest.raises(UserError, match="begun with prompts_hash"):
        run(tmp_path / "data", prompts=[questions])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is no data set"):
        run(tmp_path / "mine", prompts=[questions])


def test_the_same_prompt_is_never_in_both_splits(run, tmp_path):
    path = tmp_path / "pairs.jsonl"  # each question begins two different conversations
    turns = [[question, f"and {again}"] for question in QUESTIONS for again in range(2)]
    path.write_text("\n".join(json.dumps({"turns": pair}) for pair in turns + turns[:5]))
    dataset = run(tmp_path / "data", prompts=[path], held_out_share=0.5, max_new_tokens=3)
    train, held_out = ({row.id for row in dataset.rows(split)} for split in ("train", "held-out"))
    assert len(train) == len(held_out) == 10 and train.isdisjoint(held_out)
    assert dataset.manifest["counts"]["duplicates"] == 5
    assert len(dataset.rows("train")) + len(dataset.rows("held-out")) == 40


def test_the_split_depends_on_the_seed_and_counts_prompts():
    def held_out(share, seed, ids):
        rows = [Row(id, [1], [True], 0, 0.0, 1.0, "test") for id in ids]
        return [row.id for row in assign_splits(rows, share, seed) if row.split == "held-out"]

    ids = [f"{number:03d}" for number in range(100)]
    first = held_out(0.3, 0, ids)
    assert len(first) == 30 and first == held_out(0.3, 0, ids) and first != held_out(0.3, 1, ids)
    assert held_out(0.3, 0, ids[::-1]) == first[::-1]
    assert set(held_out(0.3, 0, ids + first[:1] * 40)) == set(first)  # more rows of a prompt change nothing
    for share, count in ((0.0, 0), (0.01, 1), (0.99, 2), (1.0, 3)):
        assert len(held_out(share, 0, ids[:3])) == count


def test_turns_are_answered_one_after_the_other(run, target, tmp_path):
    path = tmp_path / "turns.json"
    path.write_text(json.dumps([{"turns": ["First thing?", "Second thing?"]}, {"turns": ["Only thing?"]}]))
    dataset = run(tmp_path / "data", prompts=[path], greedy_share=1.0, held_out_share=0.0)
    row = max(dataset.rows("train"), key=lambda row: len(row.ids))
    parts = target.tokenizer.decode(row.ids).split("<|im_start|>")
    assert [part.split("\n")[0] for part in parts[1:]] == ["user", "assistant", "user", "assistant"]
    second = len(row.mask) - row.mask[::-1].index(False)  # where the last response begins
    assert responses_of(target, [row.ids[:second]], 12) == [row.ids[second:]]
    assert row.mask[row.prompt_length] and not row.mask[second - 1] and sum(row.mask) > len(row.ids) - second
    assert dataset.rows("held-out") == []


def test_over_long_conversations_are_dropped_and_counted(run, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "word " * count}) for count in (1, 2, 3, 10, 30, 40)))
    # ten words make a prompt of 69 tokens: its response would go on beyond the 70th
    dataset = run(tmp_path / "data", prompts=[path], max_length=70)
    rows = rows_of(dataset)
    assert len(rows) == 3 and max(len(row.ids) for row in rows) <= 70
    assert dataset.manifest["counts"]["too_long"] == 3
    with pytest.raises(UserError, match=r"no conversation is left \(.*too_long: 6.*\); raise --max-length, now 20"):
        run(tmp_path / "none", prompts=[path], max_length=20)
    assert not (tmp_path / "none").exists()


def test_kept_responses(run, target, tmp_path):
    path = tmp_path / "kept.jsonl"
    path.write_text("\n".join(json.dumps({"question": q, "answer": f"Answer to {q}"}) for q in QUESTIONS))
    dataset = run(tmp_path / "data", prompts=[path], keep_responses=True, num_prompts=8)
    rows = rows_of(dataset)
    assert len(rows) == 8 and {row.temperature for row in rows} == {None}
    for row in rows:
        spoken = target.tokenizer.decode([token for token, wanted in zip(row.ids, row.mask, strict=True) if wanted])
        assert spoken.startswith("Answer to Question number") and spoken.endswith("?<|im_end|>")
    out = io.StringIO()
    inspect(dataset.folder, examples=0, console=Console(file=out, width=120))
    counts = {split: str(len(dataset.rows(split))) for split in ("train", "held-out")}
    (ended,) = (line for line in out.getvalue().splitlines() if "ended by the target" in line)
    assert re.findall(r"\d+", ended) == list(counts.values())  # though the template's newline comes last
    answered = run(tmp_path / "answered", prompts=[path])
    assert {row.id for row in rows} <= {row.id for row in rows_of(answered)}
    again = run(tmp_path / "copy", prompts=[answered.folder / "train.parquet"], keep_responses=True)
    copied = sorted((r.id, r.ids, r.temperature) for r in rows_of(again))
    assert copied == sorted((row.id, row.ids, row.temperature) for row in answered.rows("train"))
    path.write_text(json.dumps({"prompt_ids": [1, 5], "response_ids": [300]}))
    with pytest.raises(UserError, match="line 1: token 300 is beyond the target's vocabulary of 259"):
        run(tmp_path / "beyond", prompts=[path], keep_responses=True)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"greedy_share": 1.5}, "--greedy-share is 1.5"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"keep_responses": True}, "give --prompts FILE"),
        ({"keep_responses": True, "prompts": ["x"], "max_new_tokens": 5}, "--max-new-tokens 5 is about writing"),
        ({"keep_responses": True, "prompts": ["x"], "greedy_share": 0.3}, "--greedy-share 0.3 is about writing"),
        ({"keep_responses": True, "prompts": ["x"], "shard": Shard(0, 2)}, "--keep-responses writes none"),
        ({"keep_responses": True, "prompts": ["x"], "server": EndpointSettings(endpoint="x")}, "writes none"),
        ({"keep_responses": True, "prompts": ["x"], "server": LocalServer(weights="int8")}, "--weights int8 is about"),
    ],
)
def test_bad_arguments(run, tmp_path, arguments, what):
    with pytest.raises(UserError, match=what):
        run(tmp_path / "data", **arguments)
    assert not (tmp_path / "data").exists()


def test_damaged_data_sets_and_another_target_are_named(run, target, questions, tmp_path):
    with pytest.raises(UserError, match="holds no data set"):
        open_dataset(tmp_path / "absent")
    dataset = run(tmp_path / "data", prompts=[questions], max_new_tokens=2)
    dataset.check_target(target)
    other = make_tiny_target(seed=9)
    with pytest.raises(UserError, match=f"{target.fingerprint}.*{other.fingerprint}"):
        dataset.check_target(other)
    with pytest.raises(UserError, match="split 'test' is unknown"):
        dataset.rows("test")
    (dataset.folder / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        dataset.rows("train")
    (dataset.folder / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="version 99"):
        open_dataset(dataset.folder)
    whole = dataset.manifest
    without_split = {**whole, "counts": {"train": whole["counts"]["train"]}}
    for damaged in ([], {"version": 1}, {**whole, "sources": "x.jsonl"}, without_split):
        (dataset.folder / "manifest.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="damaged.*; prepare it again|holds a list .*; restore it"):
            open_dataset(dataset.folder)
