"""A float32 tiny target as a user has it: in a folder, and loaded from there."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import save_tiny_target

from draft.target import Target, load_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny") / "target"
    save_tiny_target(root)
    return root


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return load_target(str(folder), "float32")
