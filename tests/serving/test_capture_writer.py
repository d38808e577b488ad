"""The writer of captured traffic: whole shards, bounds, permissions, and a disk that is full."""

import errno
import os
import random
import resource
import stat
import threading
import time

import pyarrow.parquet as pq
import pytest
from http_testing import eventually

from draft.data.capture import Captured, CapturedTarget, open_capture, shard_name, shard_time, shards_of
from draft.errors import UserError
from serving import capture
from serving.capture import LEAST_LIMIT, CaptureWriter

TARGET = CapturedTarget("tiny", "abc", 300, "float32")


def request(number: int = 0, *, tokens: int = 4, temperature: float = 0.0, **fields) -> Captured:
    ids = [number % 256] * tokens
    return Captured(time.time(), [1, number % 256], ids, temperature, False, False, "length", **fields)


@pytest.fixture
def make_writer(tmp_path):
    """Return a maker of writers of one folder, which are closed at the end."""
    writers = []

    def make(*, target: CapturedTarget = TARGET, limit: int = 10**7, **options) -> CaptureWriter:
        writer = CaptureWriter(tmp_path / "captured", limit=limit, **options)
        writers.append(writer)
        writer.start(target)
        return writer

    yield make
    for writer in writers:
        writer.close()


def test_rows_come_back_as_they_were_and_belong_to_the_owner(make_writer, tmp_path):
    writer, folder = make_writer(), tmp_path / "captured"
    rows = [
        request(1, head="mine", head_fingerprint="f1", drafted=5, accepted=3, emitted=4, verifications=2),
        request(2, temperature=1.0, tokens=1),
        request(3, temperature=0.7, retokenised=True),
    ]
    for row in rows:
        writer.add(row)
    writer.close()
    (shard,) = shards_of(folder)
    found = open_capture(folder)
    back = list(found.rows())[::-1]
    assert [row.kind for row in back] == ["greedy", "temperature 1", "other"]
    assert back[:2] == rows[:2] and back[2].temperature == pytest.approx(0.7) and back[2].retokenised
    assert found.target == TARGET and list(found.rows(since=shard_time(shard))) == []
    assert all(row.time < shard_time(shard) for row in back)
    assert stat.S_IMODE(shard.stat().st_mode) == 0o600 and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == [shard.name]
    assert writer.figures()["rows"] == {"written": 3, "queue_full": 0, "not_written": 0}
    assert writer.figures()["bytes"] == shard.stat().st_size


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"temperature": 0.0, "truncated": True}, "greedy"),  # which truncation leaves as it is
        ({"temperature": 0.0, "altered": True}, "other"),
        ({"temperature": 1.0}, "temperature 1"),
        ({"temperature": 1.0, "truncated": True}, "other"),
        ({"temperature": 0.9}, "other"),
    ],
)
def test_kinds_of_sampling(fields, kind):
    plain = {"truncated": False, "altered": False}
    assert Captured(0.0, [1], [2], finish_reason="length", **{**plain, **fields}).kind == kind


def test_a_shard_is_written_by_age_and_by_number_of_rows(make_writer, monkeypatch):
    writer = make_writer(shard_seconds=0.01)
    writer.add(request())
    eventually(lambda: writer.rows["written"] == 1)
    monkeypatch.setattr(capture, "_SHARD_ROWS", 3)
    slow = make_writer(shard_seconds=3600)
    for number in range(3):
        slow.add(request(number))
    eventually(lambda: slow.rows["written"] == 3)


def test_the_oldest_shards_are_dropped_beyond_the_limit(make_writer, tmp_path, monkeypatch):
    pick = random.Random(0)
    monkeypatch.setattr(capture, "_SHARD_ROWS", 1)
    writer = make_writer(limit=LEAST_LIMIT)
    for number in range(8):  # of a quarter of the limit each, which nothing compresses
        noise = [pick.randrange(256) for _ in range(250_000)]
        writer.add(Captured(float(number), [1], noise, 0.0, False, False, "length"))
        eventually(lambda number=number: writer.rows["written"] == number + 1)
    kept = sorted(row.time for row in open_capture(tmp_path / "captured").rows())
    sizes = [shard.stat().st_size for shard in shards_of(tmp_path / "captured")]
    assert kept == list(range(8 - len(kept), 8)) and len(kept) < 8
    assert LEAST_LIMIT / 2 < sum(sizes) <= LEAST_LIMIT and writer.bytes == sum(sizes)
    monkeypatch.setattr(capture, "_MOST_SHARDS", 2)
    writer.add(request())
    eventually(lambda: writer.rows["written"] == 9)
    assert len(shards_of(tmp_path / "captured")) == 2


def test_a_full_queue_drops_rows_and_counts_them(make_writer, monkeypatch):
    at_work, go_on = threading.Event(), threading.Event()

    def stuck(self, rows):
        at_work.set()
        go_on.wait(60)
        return real(self, rows)

    real = CaptureWriter._write
    monkeypatch.setattr(CaptureWriter, "_write", stuck)
    monkeypatch.setattr(capture, "_QUEUE_ROWS", 3)
    writer = make_writer(shard_seconds=0.0)
    writer.add(request())
    assert at_work.wait(60)  # the thread is in the middle of a write, as on a slow disk
    for number in range(5):
        writer.add(request(number))
    monkeypatch.setattr(capture, "_QUEUE_TOKENS", 20)
    assert writer.rows["queue_full"] == 2
    go_on.set()
    eventually(lambda: writer.rows["written"] == 4)
    writer.add(request(tokens=1000))  # larger than the queue
    assert writer.rows["queue_full"] == 3


def test_a_full_disk_costs_rows_and_one_warning_until_there_is_room(make_writer, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "serving")
    room = threading.Event()
    real = pq.write_table

    def full(table, file, **options):
        if not room.is_set():
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(table, file, **options)

    monkeypatch.setattr(capture.pq, "write_table", full)
    monkeypatch.setattr(capture, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(capture, "_QUEUE_ROWS", 3)
    writer = make_writer(shard_seconds=0.0)
    for number in range(6):
        writer.add(request(number))
        eventually(lambda: not writer._queue)
    eventually(lambda: writer.rows["not_written"] == 3)
    assert writer.failing and list((tmp_path / "captured").glob("capture-*")) == []
    room.set()
    eventually(lambda: writer.rows["written"] == 3)
    assert sorted(row.prompt_ids[1] for row in open_capture(tmp_path / "captured").rows()) == [3, 4, 5]
    assert not writer.failing and not list((tmp_path / "captured").glob(".*"))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "No space left" in warnings[0]
    assert any("written again" in record.getMessage() for record in caplog.records)


def test_files_that_may_not_grow_leave_nothing_half_written(make_writer, tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = make_writer(shard_seconds=0.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        writer.add(request())
        eventually(lambda: writer.failing)
        assert list((tmp_path / "captured").iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.close()  # a last try
    assert writer.rows["written"] == 1


def test_what_is_left_of_a_killed_server_goes_and_what_cannot_be_read_is_left_out(make_writer, tmp_path, caplog):
    folder = tmp_path / "captured"
    folder.mkdir()
    stale, fresh = folder / ".capture-1.parquet.tmp", folder / ".capture-2.parquet.tmp"
    for path, age in ((stale, 3600), (fresh, 0)):
        path.write_bytes(b"half of it")
        os.utime(path, (time.time() - age,) * 2)
    writer = make_writer()
    assert not stale.exists() and fresh.exists()  # another server of this folder may be writing it
    writer.add(request(7))
    writer.close()
    (folder / shard_name(time.time() + 60, "damaged")).write_bytes(b"PAR1")
    beyond = Captured(0.0, [1, 300], [2], 0.0, False, False, "length")  # the vocabulary
    pq.write_table(capture.to_table([beyond], TARGET), folder / shard_name(time.time() + 30, "wrong"))
    other = capture.to_table([request(1)], CapturedTarget("other", "def", 300))
    pq.write_table(other, folder / shard_name(1.0, "other"))
    assert [row.prompt_ids for row in open_capture(folder).rows()] == [[1, 7]]
    assert sum("is left out" in record.getMessage() for record in caplog.records) == 3


def test_mistakes_are_one_sentence(make_writer, tmp_path):
    make_writer().add(request())
    make_writer().close()
    for options, message in (
        ({"limit": 1000}, "--capture-limit is 1000 bytes; give at least 1MB."),
        ({"share": 0.0}, "--capture-share 0 must be above 0"),
        ({"share": 1.5}, "--capture-share 1.5 must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            make_writer(**options)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        CaptureWriter(tmp_path / "file", limit=10**7)
    with pytest.raises(UserError, match="holds no captured requests; capture some"):
        open_capture(tmp_path)
