"""The count of new requests: those that a data set would be made of, and no others."""

from dataclasses import replace

import pyarrow.parquet as pq

from draft.data.capture import Captured, CapturedTarget, open_capture, shard_name, to_table
from draft.learning.new_rows import NewRows


def test_requests_that_training_cannot_use_are_not_counted(tmp_path):
    first = Captured(1.0, [1, 2], [3, 4], 0.0, False, False, "stop")
    shards = (
        [first, replace(first, time=2.0, answer_ids=[4])],
        [
            replace(first, time=3.0),  # a repeat
            replace(first, time=4.0, prompt_ids=[1, 2, 3], answer_ids=[4]),  # the same tokens, and none
            replace(first, time=5.0, temperature=1.0, prompt_ids=[7]),
            replace(first, time=6.0, temperature=0.5, prompt_ids=[8]),  # other sampling
            replace(first, time=7.0, prompt_ids=[1] * 7),  # 9 tokens
            replace(first, time=7.5, altered=True, prompt_ids=[9]),
        ],
    )

    def write(rows):
        table = to_table(rows, CapturedTarget("tiny", "f", 10))
        pq.write_table(table, tmp_path / shard_name(rows[-1].time, "a"))

    new_rows = NewRows(8)
    write(shards[0])
    assert new_rows.count(open_capture(tmp_path), 0.0) == (2, 2.0)
    write(shards[1])
    assert new_rows.count(open_capture(tmp_path), 0.0) == (4, 5.0)
    assert new_rows.count(open_capture(tmp_path), 1.0) == (4, 5.0)  # the repeat is new then
    assert new_rows.count(open_capture(tmp_path), 3.0) == (2, 5.0)
    assert new_rows.count(open_capture(tmp_path), 5.0) == (0, 5.0)
    assert NewRows(9).count(open_capture(tmp_path), 5.0) == (1, 7.0)


def test_a_shard_is_read_once(tmp_path, monkeypatch):
    row = Captured(1.0, [1], [2], 0.0, False, False, "stop")
    read = []
    monkeypatch.setattr(NewRows, "_read", lambda self, capture, shard, of=NewRows._read: read.append(shard) or of(
        self, capture, shard))  # fmt: skip
    new_rows = NewRows(1)  # even one of which nothing is used
    for time in (1.0, 2.0):
        pq.write_table(to_table([row], CapturedTarget("tiny", "f", 10)), tmp_path / shard_name(time, "a"))
        for _ in range(2):
            assert new_rows.count(open_capture(tmp_path), 0.0) == (0, 0.0)
    assert len(read) == 2
    (tmp_path / shard_name(1.0, "a")).unlink()  # as the server does where there is no more room
    assert NewRows(8).count(open_capture(tmp_path), 0.0) == (1, 1.0)
