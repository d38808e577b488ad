"""A float32 tiny target as a user has it: in a folder, and loaded from there."""

import pytest
from conftest import save_tiny_target

from draft.target import load_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny") / "target"
    save_tiny_target(root)
    return root


@pytest.fixture(scope="module")
def target(folder):
    return load_target(str(folder), "float32")
