"""A float32 tiny target as a user has it: in a folder, loaded from there, and served."""

import pytest
from conftest import save_tiny_target
from written_data import served

from draft.target import load_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny") / "target"
    save_tiny_target(root)
    return root


@pytest.fixture(scope="module")
def target(folder):
    return load_target(str(folder), "float32")


@pytest.fixture(scope="module")
def server(target):
    with served(target) as settings:
        yield settings
