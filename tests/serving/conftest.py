"""Folders that the tests of draft-serve share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target

from draft.heads import Eagle3Head
from draft.heads.checkpoint import save_head
from draft.target import Target


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_target: Target, tiny_head: Eagle3Head) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_target.model.save_pretrained(folder / "my-target")
    tiny_target.tokenizer.save_pretrained(folder / "my-target")
    about = {"target_fingerprint": tiny_target.fingerprint}
    save_head(tiny_head, folder / "my-head", dtype=torch.float64, about=about)
    other = make_tiny_target(seed=1)
    save_head(
        make_tiny_head(other),
        folder / "other-head",
        dtype=torch.float64,
        about={"target_fingerprint": other.fingerprint},
    )
    return folder
