"""Atomic files and folders, JSON, and the cache folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draft.errors import UserError


@contextmanager
def atomic_folder(folder: Path, files: frozenset[str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes when it doesn't.

    Raises:
        UserError: when `folder` exists and holds anything but `files`: only what this wrote before is replaced.
    """
    if folder.exists():
        others = sorted({path.name for path in folder.iterdir()} - files) if folder.is_dir() else [folder.name]
        if others:
            raise UserError(f"{str(folder)!r} holds something else ({others[0]}); choose another folder to write to.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):  # a rename may reach the disk before the data does
            sync(path)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old / "folder")
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def write_json(path: Path, value: Any, *, replace: bool = True) -> None:
    """Write JSON through a temporary name and a rename.

    replace: False keeps a file that is there, for instance one that another process has written in the meantime.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(number, "w") as file:
            file.write(json.dumps(value, indent=2) + "\n")
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


def read_json(path: Path) -> dict[str, Any]:
    """A file's keys and values; UserError when it can't be read, or holds something else."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not readable JSON ({error}); restore the file.") from error
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} holds a {type(values).__name__} where keys and values belong; restore it.")
    return values


def cache_folder() -> Path:
    """Where unpacked models are kept: $DRAFTSMITH_CACHE, default ~/.cache/draftsmith."""
    return Path(os.environ.get("DRAFTSMITH_CACHE") or Path.home() / ".cache" / "draftsmith").expanduser()


def provenance() -> dict[str, str]:
    """The command line of a run and the commit of this program, with `-dirty` where its files differ from it."""
    return {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": _commit() or "unknown"}


def _commit() -> str:
    """Empty where this file is in no repository: an installed copy may lie in somebody else's."""
    file = Path(__file__)
    told = ""
    for words in (f"ls-files --error-unmatch {file.name}", "describe --always --dirty --abbrev=40 --exclude=*"):
        try:
            told = subprocess.run(
                ["git", *words.split()], cwd=file.parent, capture_output=True, text=True, check=True
            ).stdout
        except (OSError, subprocess.CalledProcessError):  # no git on this machine, or not its file
            return ""
    return told.strip()
