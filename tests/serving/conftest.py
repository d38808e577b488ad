"""Folders that the tests of draft-serve share."""

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target, save_target

from draft.heads.checkpoint import save_head


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_target, tiny_head):
    folder = tmp_path_factory.mktemp("models")
    save_target(folder / "my-target", tiny_target)
    other = make_tiny_target(seed=1)
    for name, target, head in (("my-head", tiny_target, tiny_head), ("other-head", other, make_tiny_head(other))):
        about = {"target_fingerprint": target.fingerprint}
        save_head(head, folder / name, dtype=torch.float64, about=about)
    return folder
