"""Reading prompts: every column and file kind, and what is said about those that are wrong."""

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from draft.data.prompts import fit, load_prompts, user_turn, written_prompt
from draft.errors import UserError

USER = {"role": "user", "content": "Hello there"}
ANSWER = {"role": "assistant", "content": "General"}
BAD_GZIP = gzip.compress(b"", mtime=0)[:10] + b"\xff" * 40  # no kind of block that there is
JSON = ("jsonl", "json")


def jsonl(folder: Path, *rows: Any, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "contents"),
    [
        ({"prompt": "one"}, ["one"]),
        ({"id": 3, "question": "one", "answer": "two"}, ["one"]),
        ({"text": "one", "code": "two"}, ["one"]),
        ({"turns": ["one", "two"], "category": "x"}, ["one", "two"]),
        ({"turns": "one", "category": "x"}, ["one"]),
        ({"instruction": "one", "input": "two", "output": "three"}, ["one\n\ntwo"]),
        ({"messages": [USER, ANSWER, {"role": "user", "content": "And?"}]}, ["Hello there", "And?"]),
        ({"conversations": [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "one"}]}, ["one"]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "one"}]}]}, ["one"]),
        ({"messages": [{"role": "system", "content": "Be kind."}, USER]}, ["Be kind.", "Hello there"]),
    ],
)
def test_columns_are_found(tmp_path, row, contents):
    (prompt,) = load_prompts(jsonl(tmp_path, row))
    assert [message["content"] for message in prompt.messages] == contents
    assert all(message["role"] in ("system", "user") for message in prompt.messages)
    assert prompt.source == "data.jsonl"


def test_a_column_can_be_named(tmp_path):
    path = jsonl(tmp_path, {"prompt": "wrong", "body": "right"})
    assert load_prompts(path, column="body")[0].messages[0]["content"] == "right"
    with pytest.raises(UserError, match=r"data.jsonl, line 1: no column 'bodi' \(it has prompt, body\)"):
        load_prompts(path, column="bodi")


def test_every_kind_of_file(tmp_path):
    rows = [{"question": "one, two"}, {"question": "three\nfour"}]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    for name in ("a.csv", "a.parquet", "a.json", "b.json", "lines.json", "a.jsonl", "a.jsonl.gz"):
        read = [prompt.messages[0]["content"] for prompt in load_prompts(str(tmp_path / name))]
        assert read == ["one, two", "three\nfour"], name


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"prompt": "cut', r"line 2: not JSON \(Unterminated string"),
        ("[1, 2]", "line 2: the row is a list"),
        ({"prompt": [{"role": ["user"], "content": "hi"}]}, r"line 2: turn 1 has the role \['user'\]"),
        ({"other": "x"}, "line 2: column 'prompt' is missing"),
        ({"prompt": 7}, "line 2: column 'prompt' is a int"),
        ({"prompt": "  "}, "line 2: column 'prompt' is empty"),
        ('{"prompt": "half \\ud83d"}', "line 2: column 'prompt' holds half a surrogate"),
        ({"prompt": [ANSWER]}, "line 2: there is no user turn"),
        ({"prompt": [{"role": "bing", "content": "x"}]}, "line 2: turn 1 has the role 'bing'"),
        ({"prompt": []}, "line 2: column 'prompt' is empty"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "line 2: turn 1 has parts that are not text"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, what):
    with pytest.raises(UserError, match=f"data.jsonl, {what}"):
        load_prompts(jsonl(tmp_path, {"prompt": "fine"}, row))


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "turns"])
def test_conversations_written_as_json_text(tmp_path, column):
    def kept(text):
        with (tmp_path / "data.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[column], [text]])
        return load_prompts(str(tmp_path / "data.csv"), keep_responses=True)[0].messages

    assert kept(json.dumps([USER, ANSWER])) == [USER, ANSWER]
    for text, what in {
        "[{'role': 'user'}]": "holds text that is not JSON",
        "[" * 100_000: "holds text that is not JSON",
        "[]": "is empty",
        " ": "is empty",
    }.items():
        with pytest.raises(UserError, match=f"data.csv, line 2: column '{column}' {what}"):
            kept(text)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("latin.jsonl", b'{"prompt": "fine"}\n{"prompt": "caf\xe9"}\n', "line 2: not UTF-8"),
        ("a.csv", b"prompt,kind\nfine,x\nshort\n", "line 3: fewer values than the header"),
        ("a.json", b'[\n{"prompt": "fine"},\n{"prompt" "x"}]', "line 3: not JSON"),
        ("a.parquet", b"PAR1 and no more", "not a whole Parquet file"),
        ("a.jsonl.gz", b"not gzip", "line 1: cannot be read"),
        *((f"b.{kind}.gz", BAD_GZIP, r"(cannot be read|not CSV).*Error -3") for kind in ("jsonl", "json", "csv")),
        *((f"a.{kind}", b'{"n": %s}' % (b"1" * 5000), "cannot be read .*4300 digits.*; mend") for kind in JSON),
        *((f"b.{kind}", b"[" * 100_000, "nested too deeply.*; mend") for kind in JSON),
        ("a.txt", b"hello", "unknown kind of file"),
        ("empty.jsonl", b"\n\n", "holds no rows"),
        ("scalar.json", b"7", "line 1: a int"),
        ("absent.jsonl", None, "no such file"),
        ("", None, "is a folder"),
    ],
)
def test_malformed_files(tmp_path, name, content, what):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=what) as refusal:
        load_prompts(str(tmp_path / name))
    assert name in str(refusal.value)


def test_kept_responses(tmp_path):
    def kept(row, **options):
        return load_prompts(jsonl(tmp_path, row), keep_responses=True, **options)[0]

    answered = kept({"question": "one", "answer": "two"}).messages
    assert [(message["role"], message["content"]) for message in answered] == [("user", "one"), ("assistant", "two")]
    assert kept({"messages": [USER, ANSWER, USER]}).messages == [USER, ANSWER]  # the unanswered end is cut
    assert kept({"text": "A story."}).text == "A story."
    assert kept({"prompt": "one", "reply": "two"}, column="prompt").text == "one"  # the user names it
    row = kept({"prompt_ids": [1, 5], "response_ids": [6, 2], "temperature": 0.8, "top_p": 0.95}).row
    assert (row.ids, row.mask, row.prompt_length) == ([1, 5, 6, 2], [False, False, True, True], 2)
    assert (row.temperature, row.top_p) == (0.8, 0.95)
    row = kept({"input_ids": [1, 5, 6], "loss_mask": [0, 0, 1]}).row
    assert row.mask == [False, False, True] and row.temperature is None


@pytest.mark.parametrize(
    ("row", "keep", "what"),
    [
        ({"body": "x", "kind": "y"}, False, r", line 1: none of the columns messages.*\(it has body, kind\).*--column"),
        ({"messages": "Human: hi"}, False, ", line 1: column 'messages' is a plain text where a list of turns belongs"),
        ({"conversation": "Hi"}, False, ".* call it 'prompt' or 'text'"),
        ({"messages": [USER]}, True, ", line 1: there is no response to keep"),
        ({"prompt": "one", "reply": "two"}, True, r": column .* prompts, and .*\(response, answer, .*\) among prompt"),
        ({"prompt_ids": [1], "response_ids": [2]}, False, ": the rows are token ids .* pass --keep-responses"),
        ({"input_ids": [1, 5, 6], "loss_mask": [0, 1]}, True, ", line 1: column 'loss_mask' is not a list of as many"),
        ({"prompt_ids": [1], "response_ids": ["x"]}, True, ", line 1: column 'response_ids' is not a list of token"),
    ],
)
def test_a_file_without_usable_rows(tmp_path, row, keep, what):
    with pytest.raises(UserError, match=f"data.jsonl{what}"):
        load_prompts(jsonl(tmp_path, row), keep_responses=keep)


def test_hub_data_sets_that_cannot_be_had(monkeypatch):
    import datasets

    def offline(name, split):
        raise ConnectionError(f"cannot reach {name} {split}")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match="someone/data:test: neither a file.*cannot reach someone/data test"):
        load_prompts("someone/data:test")
    rows = [{"prompt": "one"}, {"prompt": "two"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert len(load_prompts("someone/data")) == 2
    monkeypatch.setitem(sys.modules, "datasets", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"someone/data: no file here, .* `pip install 'draftsmith\[train\]'`"):
        load_prompts("someone/data")


def test_the_user_turn_of_the_template(tiny_target):
    before, after = user_turn(tiny_target)
    assert tiny_target.tokenizer.decode(before) == "<|im_start|>user\n"
    assert after == "<|im_end|>\n"

    def ids(text):
        return tiny_target.tokenizer(text, add_special_tokens=False).input_ids

    assert written_prompt(tiny_target, ids(" How are you today? <|im_end|>"), after) == "How are you today?"
    assert written_prompt(tiny_target, ids("How are you today, my"), after) is None  # cut by the length
    assert written_prompt(tiny_target, ids("How are you?[/INST] Fine"), "[/INST]") == "How are you?"


def test_unfit_prompts():
    assert fit("What is the capital of France?")
    for text in ("Hi", "one two", "the cat " * 20, "no " + "x" * 30 + " yes or no", "bro\ufffdken text is here"):
        assert not fit(text), text
