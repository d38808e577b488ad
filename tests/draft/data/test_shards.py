"""Several processes write one data set: the result is that of one process, whoever is interrupted or comes last."""

import json
import logging
from typing import Any

import pytest
from conftest import make_writing_target
from http_testing import eventually
from training_runs import start_prepare
from written_data import rows_of, served

from draft.data.dataset import Dataset, Shard, open_dataset
from draft.data.generate import Endpoint
from draft.data.prepare import parse_shard, prepare
from draft.errors import UserError

SHAPE = {"max_new_tokens": 8, "progress": False, "held_out_share": 0.25, "max_length": 150}
COMMAND = ["--max-new-tokens", "8", "--held-out-share", "0.25", "--max-length", "150"]


@pytest.fixture
def questions(tmp_path):
    """Some with two turns, one too long, one twice."""
    path = tmp_path / "questions.jsonl"
    turns = [[f"number {n}", f"and {n}"][: 1 + n % 2] for n in range(10)] + [["long" * 50], ["number 0"]]
    path.write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    return path


def contents(dataset: Dataset | None) -> tuple[Any, ...]:
    assert dataset is not None
    return rows_of(dataset), dataset.manifest


def test_two_processes_write_what_one_does(target, folder, server, questions, tmp_path):
    expected = contents(prepare(target, tmp_path / "one", prompts=[questions], server=server, **SHAPE))
    out = tmp_path / "two"
    each = ["--prompts", str(questions), "--endpoint", server.endpoint]
    first = start_prepare(folder, out, *COMMAND, *each, "--shard", "0/2")
    second = start_prepare(folder, out, *COMMAND, *each, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert any("rows to train on" in " ".join(run.succeed().output().split()) for run in (second, first))
    first.succeed()
    assert contents(open_dataset(out)) == expected
    assert not (out / "parts").exists()
    counts = expected[1]["counts"]
    assert counts["too_long"] == 1 and counts["duplicates"] == 1 and counts["train"]["rows"] == 8


def test_a_killed_shard_goes_on_and_a_missing_one_is_named(target, folder, server, questions, tmp_path, monkeypatch):
    out, options = tmp_path / "data", {**SHAPE, "server": server, "prompts": [questions]}
    hang = (
        "import time, draft.data.dataset as d\nd._ROWS_PER_PART = 1\nadd = d.Parts.add\n"
        "def slow(self, stage, index, response):\n"
        "    add(self, stage, index, response)\n"
        "    time.sleep(600 if stage == 'responses-1' else 0)\n"
        "d.Parts.add = slow"
    )
    each = ["--prompts", str(questions), "--endpoint", server.endpoint, "--concurrency", "1"]
    killed = start_prepare(folder, out, *COMMAND, *each, "--shard", "2/3", script=hang)
    try:
        own = out / "parts" / "shard-2-of-3"
        eventually(lambda: any(own.glob("responses-1.*.parquet")), every=0.1)
        with pytest.raises(UserError, match=r"being written by another process with --shard 2/3"):
            prepare(target, out, **options, shard=Shard(2, 3))
    finally:
        killed.process.kill()
        killed.wait()
    assert prepare(target, out, **options, shard=Shard(0, 3)) is None
    with pytest.raises(UserError, match=r"unfinished \(missing: shard 1/3, 2/3\); repeat .* --shard 1/3 to continue"):
        open_dataset(out)
    with pytest.raises(UserError, match="begun with shards = 3, and this call has 2"):
        prepare(target, out, **options, shard=Shard(0, 2))
    written: list[str] = []
    answer = Endpoint.answer

    def counting(endpoint, questions):
        written.extend(question.key for question in questions)
        return answer(endpoint, questions)

    monkeypatch.setattr(Endpoint, "answer", counting)
    assert prepare(target, out, **options, shard=Shard(2, 3)) is None
    assert len(written) == 1 and written[0].startswith("responses-1:")  # what was stored is not written again
    done = contents(prepare(target, out, **options, shard=Shard(1, 3)))
    again = contents(prepare(target, out, **options, shard=Shard(0, 3)))
    assert done == again == contents(prepare(target, tmp_path / "one", **options))


def test_shards_share_the_prompts_that_the_target_writes(tmp_path):
    words = make_writing_target()
    options = {**SHAPE, "num_prompts": 6}
    with served(words) as server:
        expected = contents(prepare(words, tmp_path / "one", **options, server=server))
        for index in (2, 0, 1):
            part = prepare(words, tmp_path / "three", **options, server=server, shard=Shard(index, 3))
            assert part is None if index != 1 else contents(part) == expected


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "a/b", "0/0", "1/2/3"])
def test_what_is_no_shard(text):
    with pytest.raises(UserError, match=f"--shard '{text}' is not of the form 0/4"):
        parse_shard(text)


def test_where_a_shard_comes_from(monkeypatch, caplog):
    """A launcher's variables that were left over are no silent reason to write one half of the data."""
    assert parse_shard("3/4") == Shard(3, 4) and parse_shard(None) is None and not caplog.records
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse_shard("0/3") == Shard(0, 3) and parse_shard("0/1") is None and not caplog.records
    with caplog.at_level(logging.WARNING):
        assert parse_shard(None) == Shard(1, 2)
    assert "RANK=1 and WORLD_SIZE=2 are set" in caplog.text and "shard 1/2 of the conversations only" in caplog.text
    assert "--shard 0/1" in caplog.text
