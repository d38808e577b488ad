"""Capture of finished requests: a bounded queue, and a thread that writes it to shards. It knows of no engine.

What is captured never delays an answer: a row that finds the queue full is dropped and counted, and a disk that is full
costs rows and one warning. The format is `draft.data.capture`'s.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from draft.data.capture import Captured, CapturedTarget, captured_target, shard_name, shards_of, to_table
from draft.errors import UserError
from draft.files import sync

log = logging.getLogger(__name__)

OUTCOMES = ("written", "queue_full", "not_written")  # of a row: in a shard, or dropped for one of two reasons
LEAST_LIMIT = 1_000_000  # bytes of a folder
_SHARD_ROWS = 1024
_SHARD_TOKENS = 2_000_000
_SHARD_SECONDS = 30.0  # what a crash may lose, and what a learner waits for
_RETRY_SECONDS = 30.0  # after a shard could not be written
_MOST_SHARDS = 10_000  # a trickle of requests makes small files
_QUEUE_ROWS, _QUEUE_TOKENS = 4096, 8_000_000  # that wait for the thread, and as many for a disk with room
_STALE_SECONDS = 600.0  # a temporary file so old is of a process that was killed
_CLOSE_SECONDS = 10.0


class CaptureWriter:
    """Writes finished requests to a folder, from `start` to `close`; any thread may `add` one."""

    def __init__(
        self, folder: str | Path, *, limit: int, share: float = 1.0, shard_seconds: float = _SHARD_SECONDS
    ) -> None:
        """limit: bytes of all shards, beyond which the oldest are dropped. share: of the requests that is captured.

        Raises:
            UserError: for a limit or share out of range, or a folder that cannot be made or written to.
        """
        if limit < LEAST_LIMIT:
            raise UserError(f"--capture-limit is {limit} bytes; give at least {LEAST_LIMIT // 10**6}MB.")
        if not 0 < share <= 1:
            raise UserError(f"--capture-share {share:g} must be above 0 and at most 1; leave --capture out for none.")
        self.folder, self.limit, self.share = Path(folder), limit, share
        self.rows = Counter(dict.fromkeys(OUTCOMES, 0))
        self.bytes = 0  # of all shards in the folder
        self.failing = False  # the last shard could not be written
        self._target: CapturedTarget | None = None
        self._shard_seconds = shard_seconds
        self._shard_tokens = min(_SHARD_TOKENS, limit // 32)  # a shard is a small part of the folder
        self._queue: deque[Captured] = deque()
        self._queued_tokens = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for temporary in self.folder.glob(".capture-*.tmp"):
                with suppress(FileNotFoundError):
                    if time.time() - temporary.stat().st_mtime > _STALE_SECONDS:
                        temporary.unlink()
            probe = self.folder / f".capture-{secrets.token_hex(4)}.tmp"
            os.close(os.open(probe, os.O_CREAT | os.O_EXCL, 0o600))
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--capture {str(folder)!r} cannot be written to ({error.strerror}); choose another folder."
            ) from error

    def start(self, target: CapturedTarget) -> None:
        """Begin to write, once it is known who answers.

        Raises:
            UserError: where the folder holds answers of another target.
        """
        before = next(filter(None, map(captured_target, reversed(shards_of(self.folder)))), None)
        if before is not None and before.fingerprint != target.fingerprint:
            raise UserError(
                f"--capture {str(self.folder)!r} holds answers of target {before.name!r} with fingerprint "
                f"{before.fingerprint}, and this target has {target.fingerprint}; choose another folder."
            )
        self._target = target
        self.bytes = sum(size for _, size in self._sizes())
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()
        log.info("capturing %s", self)

    def __str__(self) -> str:
        return f"{100 * self.share:.3g} % of the requests to {self.folder}, at most {self.limit / 1e6:,.0f} MB"

    def chosen(self) -> bool:
        """Draw whether a request is captured."""
        return self.share == 1 or random.random() < self.share

    def add(self, row: Captured) -> None:
        """Hand a row to the thread, or drop and count it; never blocks."""
        tokens = len(row.prompt_ids) + len(row.answer_ids)
        with self._changed:
            if self._closed or len(self._queue) >= _QUEUE_ROWS or self._queued_tokens + tokens > _QUEUE_TOKENS:
                self.rows["queue_full"] += 1
                return
            self._queue.append(row)
            self._queued_tokens += tokens
            self._changed.notify()

    def close(self) -> None:
        """Write what waits, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def figures(self) -> dict[str, Any]:
        """Return the state for /info; JSON-able, and without the folder."""
        return {
            "share": self.share,
            "limit_bytes": self.limit,
            "bytes": self.bytes,
            "rows": dict(self.rows),
            "failing": self.failing,
        }

    # the thread

    def _run(self) -> None:
        waiting: deque[Captured] = deque()
        tokens, due = 0, float("inf")  # of what waits; the time of the next shard
        while True:
            with self._changed:
                seconds = None if due == float("inf") else max(0.0, due - time.monotonic())
                self._changed.wait_for(lambda: self._queue or self._closed, seconds)
                taken, self._queue, self._queued_tokens = self._queue, deque(), 0
                closed = self._closed
            for row in taken:  # here, a few microseconds each, and not all together when the shard is written
                prompt: Any = np.array(row.prompt_ids, dtype=np.int32)
                answer: Any = np.array(row.answer_ids, dtype=np.int32)
                waiting.append(replace(row, prompt_ids=prompt, answer_ids=answer))
                tokens += _tokens([waiting[-1]])
            if waiting and due == float("inf"):
                due = time.monotonic() + self._shard_seconds
            full = not self.failing and (len(waiting) >= _SHARD_ROWS or tokens >= self._shard_tokens)
            if waiting and (full or closed or time.monotonic() >= due):
                if self._write(waiting):
                    waiting, due = deque(), float("inf")
                else:
                    due = time.monotonic() + _RETRY_SECONDS
                tokens = _tokens(waiting)
            while len(waiting) > _QUEUE_ROWS or tokens > _QUEUE_TOKENS:  # the disk has been full for long
                tokens -= _tokens([waiting.popleft()])
                self.rows["not_written"] += 1
            if closed:
                self.rows["not_written"] += len(waiting)
                return

    def _write(self, rows: Iterable[Captured]) -> bool:
        """Write a shard; False, and a warning if the one before could be written, where that fails."""
        assert self._target is not None
        table = to_table(list(rows), self._target)
        path = self.folder / shard_name(time.time(), secrets.token_hex(4))
        temporary = self.folder / f".{path.name}.tmp"
        try:
            try:
                with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    pq.write_table(table, file, compression="zstd")
                    file.flush()
                    os.fsync(file.fileno())
                self._make_room(temporary.stat().st_size)
                os.replace(temporary, path)
                sync(self.folder)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, pa.ArrowException) as error:
            if not self.failing:
                log.warning("captured requests cannot be written (%s); serving goes on, and it is tried again", error)
            self.failing = True
            return False
        if self.failing:
            log.info("captured requests are written again")
        self.failing = False
        self.rows["written"] += table.num_rows
        return True

    def _make_room(self, size: int) -> None:
        """Drop the oldest shards that a new one of `size` bytes leaves no room for."""
        kept = list(self._sizes())
        total = sum(each for _, each in kept) + size
        for count, (shard, each) in enumerate(kept):
            if total <= self.limit and len(kept) - count < _MOST_SHARDS:
                break
            shard.unlink(missing_ok=True)
            total -= each
        self.bytes = total

    def _sizes(self) -> Iterator[tuple[Path, int]]:
        """Yield shards, the oldest first, with their bytes."""
        for shard in shards_of(self.folder):
            with suppress(FileNotFoundError):  # another server of the folder dropped it
                yield shard, shard.stat().st_size


class CaptureCollector:
    """Counters of a writer for a registry of Prometheus metrics."""

    def __init__(self, writer: CaptureWriter, prefix: str) -> None:
        self.writer, self.prefix = writer, prefix

    def collect(self) -> Iterator[Metric]:
        rows = CounterMetricFamily(
            f"{self.prefix}:capture_rows", "Captured requests by what became of them", labels=["outcome"]
        )
        for outcome in OUTCOMES:
            rows.add_metric([outcome], self.writer.rows[outcome])
        yield rows
        yield GaugeMetricFamily(f"{self.prefix}:capture_bytes", "Bytes of all shards", value=self.writer.bytes)


def _tokens(rows: Iterable[Captured]) -> int:
    return sum(len(row.prompt_ids) + len(row.answer_ids) for row in rows)
