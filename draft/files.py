"""Atomic files and folders, JSON, hashes, the cache folder and the provenance of a run."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draft.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def atomic_folder(folder: Path, files: frozenset[str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when it doesn't.

    The folder that is replaced is kept as `.NAME.old` until the new one is in its place, and comes back when that
    fails. A process that is killed in between leaves it there; the next call, or `finish_folders`, brings it back.

    Raises:
        UserError: when `folder` exists and holds anything but `files`: only what this wrote before is replaced.
    """
    _finish(folder)
    if folder.exists():
        others = sorted({path.name for path in folder.iterdir()} - files) if folder.is_dir() else [folder.name]
        if others:
            raise UserError(f"{str(folder)!r} holds something else ({others[0]}); choose another folder to write to.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):  # a rename may reach the disk before the data does
            sync(path)
        try:
            if folder.exists():
                os.replace(folder, _saved(folder))
            os.replace(temporary, folder)
            sync(folder.parent)
        finally:
            _finish(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finish_folders(parent: Path, pattern: str) -> None:
    """Complete what killed processes left of the folders in `parent` whose names match `pattern`.

    A folder that was moved aside and not replaced comes back; half-written new ones are removed.
    """
    for saved in parent.glob(f".{pattern}.old"):
        _finish(parent / saved.name.removeprefix(".").removesuffix(".old"))
    for left in parent.glob(f".{pattern}.new-*"):
        shutil.rmtree(left, ignore_errors=True)


def _saved(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _finish(folder: Path) -> None:
    """Bring the saved folder back where nothing is in its place; remove it where the new one is."""
    saved = _saved(folder)
    if not saved.is_dir():
        return
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        os.replace(saved, folder)
    else:  # under another name first: half of it must not come back when this process is killed
        discarded = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
        os.replace(saved, discarded)
        shutil.rmtree(discarded, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's data, or a folder's entries, are on the disk; where folders can't be opened, they wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # Windows
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block ends well, and vanishes when it doesn't.

    replace: False keeps a file that is there, for instance one that another process has written in the meantime.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(number)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        sync(temporary)
        if not replace:
            try:
                os.link(temporary, path)
                return
            except FileExistsError:
                return
            except OSError:  # a file system without links
                pass
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, replace: bool = True) -> None:
    """Write JSON as an `atomic_file`."""
    with atomic_file(path, replace=replace) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write each row as a line of JSON, as an `atomic_file`."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(path: Path) -> dict[str, Any]:
    """A file's keys and values; UserError when it can't be read, or holds something else."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not readable JSON ({error}); restore the file.") from error
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} holds a {type(values).__name__} where keys and values belong; restore it.")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError when it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{str(path)!r} is missing; weights must be one safetensors file of that name.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file ({error}); write or copy it again.") from error


def file_sha256(*paths: Path) -> str:
    """The hash of the files' bytes, one file after the other; OSError where one is missing."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """The folder of unpacked models: $DRAFTSMITH_CACHE, default ~/.cache/draftsmith."""
    return Path(os.environ.get("DRAFTSMITH_CACHE") or Path.home() / ".cache" / "draftsmith").expanduser()


def provenance() -> dict[str, str]:
    """The command line of a run and the commit of this program, with `-dirty` where its files differ from it."""
    file, commit = Path(__file__), "unknown"

    def git(words: str) -> str:
        run = subprocess.run(["git", *words.split()], cwd=file.parent, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):  # no git on this machine
        git(f"ls-files --error-unmatch {file.name}")  # an installed copy may lie in somebody else's repository
        commit = git("describe --always --dirty --abbrev=40 --exclude=*")
    return {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit}
