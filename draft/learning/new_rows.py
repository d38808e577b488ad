"""The number of new captured requests that training can use."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc

from draft.data.capture import OTHER, Capture, shard_time

_IDS = ("prompt_ids", "answer_ids")


class NewRows:
    """Counts requests as `prepare_capture` takes them; a shard never changes, so each is read once."""

    def __init__(self, longest: int) -> None:
        """longest: tokens of the longest request that is used, prompt and answer."""
        self.longest = longest
        self._usable: dict[Path, list[tuple[float, int]]] = {}  # of each shard, see `_read`

    def count(self, capture: Capture, since: float) -> tuple[int, float]:
        """Return the number of usable requests after `since`, repeats counted once, and the time of the newest."""
        shards = [shard for shard in capture.shards if shard_time(shard) > since]
        known = self._usable
        self._usable = {shard: known[shard] if shard in known else self._read(capture, shard) for shard in shards}
        new = [row for rows in self._usable.values() for row in rows if row[0] > since]
        return len({content for _, content in new}), max((time for time, _ in new), default=since)

    def _read(self, capture: Capture, shard: Path) -> list[tuple[float, int]]:
        """The time of each usable request in a shard, and the hash of its content."""
        found: list[tuple[float, int]] = []
        for table in Capture(capture.folder, [shard], capture.target).tables(("time", "kind", *_IDS)):
            tokens = pc.add(*(pc.list_value_length(table[name]) for name in _IDS))
            usable = table.filter(pc.and_(pc.not_equal(table["kind"], OTHER), pc.less_equal(tokens, self.longest)))
            for time, *ids in zip(*(usable[name] for name in ("time", *_IDS)), strict=True):
                content = tuple(each.values.to_numpy(zero_copy_only=False).tobytes() for each in ids)
                found.append((time.as_py(), hash(content)))
        return found
