"""Rows of JSONL, JSON, CSV and Parquet files and of hub data sets, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from draft.errors import UserError

_DAMAGE = (OSError, EOFError, zlib.error)  # the last two: of a .gz that is cut off, or not what it was


def records(source: str) -> Iterator[tuple[str, Any]]:
    """(file and line, row) of a file or hub data set."""
    path = Path(source).expanduser()
    name = path.name.lower()
    reader = _READERS.get(Path(name.removesuffix(".gz")).suffix)
    if path.is_file():
        if reader is None or (name.endswith(".gz") and reader is _parquet):
            raise UserError(f"{source}: unknown kind of file; give .jsonl, .json, .csv (each also .gz) or .parquet.")
        return reader(path, source)
    if reader is not None or path.exists() or source.startswith((".", "/", "~")):
        raise UserError(
            f"{source}: {'is a folder' if path.is_dir() else 'no such file'}; give an existing file of prompts."
        )
    return _hub(source)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _parse(text: bytes, name: str, number: int | None) -> Any:
    """The value of JSON text; number: of its line, None where it is a whole file.

    Raises:
        UserError: naming the line; a JSONDecodeError where several values follow each other.
    """
    where, remedy = (name, "mend the file") if number is None else (f"{name}, line {number}", "mend or remove it")
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        if number is None and error.msg == "Extra data":
            raise
        where = f"{name}, line {number or error.lineno}"
        reason = f"not JSON ({error.msg}, column {error.colno})"
    except UnicodeDecodeError:
        reason, remedy = "not UTF-8 text", "save the file as UTF-8"
    except RecursionError:
        reason = "JSON that cannot be read (nested too deeply)"
    except ValueError as error:  # numbers of thousands of digits; without Python's advice on them
        reason = f"JSON that cannot be read ({str(error).partition(';')[0]})"
    raise UserError(f"{where}: {reason}; {remedy}.")


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{name}, line {number}", _parse(line, name, number)
    except _DAMAGE as error:
        raise UserError(f"{name}, line {number + 1}: cannot be read ({error}); restore the file.") from error


def _json(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    try:
        with _open(path) as file:
            content = _parse(file.read(), name, None)
    except json.JSONDecodeError:  # one object a line, under the wrong name
        yield from _jsonl(path, name)
        return
    except _DAMAGE as error:
        raise UserError(f"{name}: cannot be read ({error}); restore the file.") from error
    if isinstance(content, dict):  # {"data": [...]}, or a single conversation
        content = content["data"] if isinstance(content.get("data"), list) else [content]
    if not isinstance(content, list):
        raise UserError(f"{name}, line 1: a {type(content).__name__}, not a list of conversations; mend the file.")
    for number, record in enumerate(content, 1):
        yield f"{name}, row {number}", record


def _csv(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 30)
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                if None in record or None in record.values():
                    amount = "more" if None in record else "fewer"
                    raise UserError(
                        f"{name}, line {reader.line_num}: {amount} values than the header has names; mend or remove it."
                    )
                number = reader.line_num
                yield f"{name}, line {number}", record
    except (csv.Error, *_DAMAGE, UnicodeDecodeError) as error:
        raise UserError(f"{name}, after line {number}: not CSV in UTF-8 ({error}); mend the file.") from error


def _parquet(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", record
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}, row {number + 1}: not a whole Parquet file ({error}); restore it.") from error


def _hub(source: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset  # slow to import, and not installed with a server alone
    except ImportError as error:
        raise UserError(
            f"{source}: no file here, and reading data sets of the hub needs the package datasets; install it with "
            "`pip install 'draftsmith[train]'`, or give a file."
        ) from error

    name, _, split = source.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # the hub's client raises of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{source}: neither a file here nor a data set that can be had from the hub ({reason}); check the name, or "
            "give a file."
        ) from error
    for number, record in enumerate(rows, 1):
        yield f"{source}, row {number}", record


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
