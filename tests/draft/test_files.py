"""Folders are replaced as a whole or not at all, whatever ends the process; file errors are told from others."""

import errno
import hashlib
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest
import requests
from safetensors import SafetensorError

from draft.errors import UserError, file_trouble
from draft.files import atomic_folder, file_sha256, finish_folders

FILES = frozenset({"one", "two"})


def write(folder: Path, text: str) -> None:
    with atomic_folder(folder, FILES) as temporary:
        for name in FILES:
            (temporary / name).write_text(text)


def read(folder: Path) -> set[str]:
    """The texts of the files, which belong together: one text in a whole folder."""
    assert {path.name for path in folder.iterdir()} == FILES
    return {path.read_text() for path in folder.iterdir()}


class Killed(BaseException):
    """Raised by each change to the disk from some point on: what follows in a killed process never happens."""


def kill_after(changes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [changes]

    def counted(function):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **options)

        return call

    for module, name in ((os, "replace"), (shutil, "rmtree"), (tempfile, "mkdtemp")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))


@pytest.mark.parametrize("start", ["writes again", "cleans up"])
@pytest.mark.parametrize("changes", range(7))
def test_a_killed_process_leaves_a_whole_folder_to_the_next(changes, start, tmp_path, monkeypatch):
    folder = tmp_path / "head"
    write(folder, "old")
    with monkeypatch.context() as patched:
        kill_after(changes, patched)
        try:
            write(folder, "new")
        except Killed:
            pass
        else:
            assert changes == 6  # the last case is a process that was not killed
    assert not folder.exists() or read(folder) in ({"old"}, {"new"})
    if start == "cleans up":
        finish_folders(tmp_path, "he*")
        assert [path.name for path in tmp_path.iterdir()] == ["head"]
    else:
        with pytest.raises(RuntimeError), atomic_folder(folder, FILES):
            raise RuntimeError
    assert read(folder) == ({"old"} if changes < 3 else {"new"})


def test_a_failed_rename_is_rolled_back(tmp_path, monkeypatch):
    folder, replace = tmp_path / "head", os.replace
    write(folder, "old")

    def fail(source, destination):
        if ".new-" in Path(source).name:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        write(folder, "new")
    assert read(folder) == {"old"} and [path.name for path in tmp_path.iterdir()] == ["head"]


def test_an_empty_folder_does_not_count_as_the_new_one(tmp_path):
    folder = tmp_path / "head"
    write(folder, "old")
    folder.rename(tmp_path / ".head.old")
    folder.mkdir()
    finish_folders(tmp_path, "head")
    assert read(folder) == {"old"}


def test_only_what_was_written_before_is_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("precious")
    for precious in (tmp_path / "run", tmp_path / "run" / "config.yaml", tmp_path):
        with pytest.raises(UserError, match="holds something else"):
            write(precious, "new")
    assert (tmp_path / "run" / "config.yaml").read_text() == "precious"


def test_a_hash_is_of_bytes_that_are_there(tmp_path):
    (tmp_path / "a").write_bytes(b"one"), (tmp_path / "b").write_bytes(b"two")
    assert file_sha256(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"onetwo").hexdigest()
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "a", tmp_path / "missing")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/y"), "'/x/y' could not be read or written"),
        (OSError(errno.ENOSPC, "No space left on device"), "a file could not be read or written (No space left"),
        (OSError("Couldn't deserialize thrift"), "(Couldn't deserialize thrift)"),  # as pyarrow raises it
        (Exception("File too large (os error 27)"), "a file could not be read or written (File too large (os error"),
        (SafetensorError("header too large"), "a safetensors file could not be read or written (header too large)"),
        (requests.exceptions.ConnectionError("no route"), None),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),
        (TimeoutError("timed out"), None),
        (socket.gaierror(-2, "Name or service not known"), None),
        (ValueError("x"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_errors_of_files_are_told_as_such(error, told):
    sentence = file_trouble(error)
    assert sentence is None if told is None else sentence and told in sentence
