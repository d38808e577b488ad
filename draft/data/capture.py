"""Captured traffic on disk: shards of finished requests, which draft-serve writes and `prepare` and `inspect` read.

capture-TIME-ID.parquet   finished requests in the order of their ends; named after the time at which it was written

Each shard appears whole or not at all, and names the target that wrote the answers in its metadata. A row has token ids
and figures, and no text, address or key; but ids are text to whoever has the tokenizer, so that folder and files are
the owner's only.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from draft.errors import UserError
from draft.target import Target

log = logging.getLogger(__name__)

VERSION = 1
GREEDY, TEMPERATURE_1, OTHER = KINDS = ("greedy", "temperature 1", "other")
_KEY = b"draftsmith"  # of the target in a shard's metadata
_NAME = re.compile(r"capture-(\d{8}T\d{6}\.\d{3})-\w+\.parquet")
_TIME = "%Y%m%dT%H%M%S.%f"
_SCHEMA = pa.schema(
    {
        "time": pa.float64(),
        "prompt_ids": pa.list_(pa.int32()),
        "answer_ids": pa.list_(pa.int32()),
        "kind": pa.string(),
        "temperature": pa.float32(),
        "truncated": pa.bool_(),
        "altered": pa.bool_(),
        "finish_reason": pa.string(),
        "head": pa.string(),
        "head_fingerprint": pa.string(),
        "drafted": pa.int32(),
        "accepted": pa.int32(),
        "emitted": pa.int32(),
        "verifications": pa.int32(),
        "retokenised": pa.bool_(),
    }
)
_OPTIONAL = {"head", "head_fingerprint"}


@dataclass(frozen=True)
class CapturedTarget:
    """Identity of the target whose answers a shard holds."""

    name: str
    fingerprint: str  # empty where a server upstream has the weights
    vocab_size: int
    weights: str = ""  # the format of the matrices that computed the answers, such as bfloat16 or int8

    @property
    def metadata(self) -> dict[bytes, bytes]:
        return {_KEY: json.dumps({"version": VERSION, **asdict(self)}).encode()}


@dataclass(frozen=True)
class Captured:
    """One finished request."""

    time: float  # of its end, in seconds since the epoch
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]  # with the EOS token that ended it, without what a stop string took back
    temperature: float
    truncated: bool  # by top-p, top-k or min-p
    altered: bool  # by penalties, a bias of logits, or a ban of the answer's end
    finish_reason: str
    head: str | None = None
    head_fingerprint: str | None = None
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0  # by verifications; see `SpeculationStats`
    verifications: int = 0
    retokenised: bool = False  # the server gave text, and these are its tokens: maybe not those that were drawn

    @property
    def kind(self) -> str:
        """The kind of sampling: GREEDY and TEMPERATURE_1 are for training and replay, OTHER is for neither.

        Truncation leaves greedy answers as they are.
        """
        if self.altered:
            return OTHER
        if self.temperature == 0:
            return GREEDY
        return TEMPERATURE_1 if self.temperature == 1 and not self.truncated else OTHER


def shard_name(time: float, unique: str) -> str:
    """The name of a shard that is written at this time (seconds since the epoch); names sort by it."""
    return f"capture-{datetime.fromtimestamp(time, UTC).strftime(_TIME)[:-3]}-{unique}.parquet"


def shard_time(shard: Path) -> float:
    """The time at which a shard was written; its rows ended before. Milliseconds are cut off its name: one is added."""
    found = _NAME.fullmatch(shard.name)
    assert found is not None
    return datetime.strptime(found[1] + "000", _TIME).replace(tzinfo=UTC).timestamp() + 0.001


def shards_of(folder: Path) -> list[Path]:
    """The shards of a folder, oldest first."""
    return sorted(path for path in folder.glob("capture-*.parquet") if _NAME.fullmatch(path.name))


def to_table(rows: Sequence[Captured], target: CapturedTarget) -> pa.Table:
    """Rows as the table of a shard; their ids may be lists or arrays."""
    columns: dict[str, pa.Array] = {}
    for field in _SCHEMA:
        values = [getattr(row, field.name) for row in rows]
        if pa.types.is_list(field.type):
            ends = [0]
            for ids in values:
                ends.append(ends[-1] + len(ids))
            flat = pa.concat_arrays([pa.array(ids, pa.int32()) for ids in values])
            columns[field.name] = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat)
        else:
            columns[field.name] = pa.array(values, field.type)
    return pa.table(columns, schema=_SCHEMA.with_metadata(target.metadata))


class Capture:
    """The shards of a folder as they were when it was opened; a server may add and drop some meanwhile."""

    def __init__(self, folder: Path, shards: Sequence[Path], target: CapturedTarget) -> None:
        """target: of the newest shard."""
        self.folder, self.shards, self.target = folder, shards, target

    def check_target(self, target: Target) -> None:
        """Refuse a target that did not write these answers: UserError naming both fingerprints.

        Of a server upstream the weights are not known: there the vocabulary must fit, and the rest is up to the user.
        """
        if not self.target.fingerprint and self.target.vocab_size == target.vocab_size:
            log.warning(
                "%s holds answers of a server upstream: make sure that its target %r has the weights of %s",
                *(self.folder, self.target.name, target.title),
            )
        elif self.target.fingerprint != target.fingerprint:
            raise UserError(
                f"{str(self.folder)!r} holds answers of target {self.target.name!r} with fingerprint "
                f"{self.target.fingerprint}, and target {target.title} has {target.fingerprint}; give that target, or "
                "a folder that was captured from this one."
            )

    def tables(self, columns: Sequence[str] | None = None, *, since: float = -math.inf) -> Iterator[pa.Table]:
        """Yield the shards written after `since`, newest first; columns: None reads and checks all.

        Left out are those that have been dropped, and, with a warning, damaged ones and those of another target.
        """
        names = _SCHEMA.names if columns is None else list(columns)
        schema = pa.schema([_SCHEMA.field(name) for name in names])
        for shard in reversed(self.shards):
            if shard_time(shard) <= since:
                return
            try:
                with pq.ParquetFile(shard) as file:
                    written_by = _target_of(file.schema_arrow)
                    table = file.read(names).select(names).cast(schema)
            except FileNotFoundError:
                continue
            except (OSError, pa.ArrowException, KeyError, ValueError) as error:
                log.warning("%s is left out: it cannot be read (%s)", shard, " ".join(str(error).split())[:200])
                continue
            if written_by is None or written_by.fingerprint != self.target.fingerprint:
                log.warning("%s is left out: its answers are those of another target", shard)
            elif columns is None and not _whole(table, self.target.vocab_size):
                log.warning("%s is left out: it has rows that no capture has", shard)
            else:
                yield table

    def rows(self, *, since: float = -math.inf) -> Iterator[Captured]:
        """Yield the rows, newest first, of the shards written after `since`."""
        for table in self.tables(since=since):
            for row in reversed(table.to_pylist()):
                del row["kind"]
                yield Captured(**row)


def open_capture(folder: str | Path) -> Capture:
    """Open a folder of captured traffic.

    Raises:
        UserError: where there is none.
    """
    folder = Path(folder)
    shards = shards_of(folder)
    for shard in reversed(shards):
        target = captured_target(shard)
        if target is not None:
            return Capture(folder, shards, target)
    raise UserError(
        f"{str(folder)!r} holds no captured requests{' that can be read' if shards else ''}; capture some with "
        f"`draft-serve --capture {folder}`."
    )


def captured_target(shard: Path) -> CapturedTarget | None:
    """The target in a shard's metadata; None for a file that is gone, damaged, or of another version."""
    try:
        return _target_of(pq.read_schema(shard))
    except (OSError, pa.ArrowException):
        return None


def _target_of(schema: pa.Schema) -> CapturedTarget | None:
    try:
        values: dict[str, Any] = json.loads((schema.metadata or {})[_KEY])
        return CapturedTarget(**values) if values.pop("version") == VERSION else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _whole(table: pa.Table, vocab_size: int) -> bool:
    """True where every row has a value in every column, and all ids are of the vocabulary."""
    if any(table[name].null_count for name in _SCHEMA.names if name not in _OPTIONAL):
        return False
    for name in ("prompt_ids", "answer_ids"):
        bounds = pc.min_max(pc.list_flatten(table[name])).as_py()
        lengths = pc.min(pc.list_value_length(table[name])).as_py()
        if table.num_rows and not (lengths > 0 and bounds["min"] >= 0 and bounds["max"] < vocab_size):
            return False
    return True
