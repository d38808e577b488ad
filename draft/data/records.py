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

_HUB_REASON = 600  # characters of the hub's message, which lists what there is to choose from
_DAMAGE = (OSError, EOFError, zlib.error)  # the last two: of a .gz that is cut off, or not what it was


class BadRow(UserError):
    """A row that cannot be used: what is wrong with it, what to do, and a reason without values, to count rows by."""

    def __init__(self, reason: str, what: str, remedy: str = "mend or remove that row") -> None:
        super().__init__(f"{what}; {remedy}.")
        self.reason, self.what, self.remedy = reason, what, remedy

    def at(self, where: str) -> UserError:
        """The sentence that names the row."""
        return UserError(f"{where}: {self.what}; {self.remedy}, or leave such rows out with --skip-invalid.")


def records(source: str) -> Iterator[tuple[str, Any]]:
    """(file and line, row) of a file or hub data set; a BadRow in the place of a row that cannot be read."""
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


def _parse(text: bytes) -> Any:
    """The value of JSON text; BadRow, or a JSONDecodeError, which knows the place."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError:
        raise BadRow("not UTF-8 text", "not UTF-8 text", "save the file as UTF-8") from None
    except RecursionError:
        raise BadRow("not JSON", "JSON that cannot be read (nested too deeply)") from None
    except ValueError as error:  # numbers of thousands of digits; without Python's advice on them
        raise BadRow("not JSON", f"JSON that cannot be read ({str(error).partition(';')[0]})") from None


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record: Any
                try:
                    record = _parse(line)
                except json.JSONDecodeError as error:
                    record = BadRow("not JSON", f"not JSON ({error.msg}, column {error.colno})")
                except BadRow as error:
                    record = error
                yield f"{name}, line {number}", record
    except _DAMAGE as error:
        raise UserError(f"{name}, line {number + 1}: cannot be read ({error}); restore the file.") from error


def _json(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    try:
        with _open(path) as file:
            content = _parse(file.read())
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, under the wrong name
            yield from _jsonl(path, name)
            return
        where = f"{name}, line {error.lineno}"
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); mend the file.") from error
    except BadRow as error:
        remedy = error.remedy if "save" in error.remedy else "mend the file"
        raise UserError(f"{name}: {error.what}; {remedy}.") from error
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
                number = reader.line_num
                if None in record or None in record.values():
                    amount = "more" if None in record else "fewer"
                    what = f"{amount} values than the header has names"
                    yield f"{name}, line {number}", BadRow(what, what)
                else:
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
                    yield f"{name}, row {number}", _without_nulls(record)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}, row {number + 1}: not a whole Parquet file ({reason}); restore it.") from error


def _without_nulls(value: Any, top: bool = True) -> Any:
    """The value without the fields that a columnar format gives to every object once any object has them."""
    if isinstance(value, dict):
        return {name: _without_nulls(each, False) for name, each in value.items() if top or each is not None}
    return [_without_nulls(each, False) for each in value] if isinstance(value, list) else value


def _hub(source: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset  # slow to import, and not installed with a server alone
    except ImportError as error:
        raise UserError(
            f"{source}: no file here, and reading data sets of the hub needs the package datasets; install it with "
            "`pip install 'draftsmith[train]'`, or give a file."
        ) from error

    name, *rest = source.split(":")
    if len(rest) > 2 or not name:
        raise UserError(
            f"{source}: no name of a data set; give owner/name, owner/name:split or owner/name:config:split."
        )
    config, split = [*[""] * (2 - len(rest)), *rest]
    try:
        rows = load_dataset(name, *([config] if config else []), split=split or "train")
    except Exception as error:  # the hub's client raises of many kinds
        reason = " ".join(str(error).split())[:_HUB_REASON] or type(error).__name__
        raise UserError(
            f"{source}: neither a file here nor a data set that can be had from the hub ({reason}); check the name, "
            "choose a configuration and a split as owner/name:config:split, or give a file."
        ) from error
    number = 0
    try:
        for number, record in enumerate(rows, 1):
            yield f"{source}, row {number}", _without_nulls(record)
    except Exception as error:  # columns of pictures and sounds are decoded by other packages
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{source}, row {number + 1}: cannot be read ({reason}); give the texts as a file.") from error


_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
