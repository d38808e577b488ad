"""Tiny models that several benchmarks are run on."""

from pathlib import Path

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target

from draft.heads.checkpoint import save_head


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `target`, head `first`, its copy `copy`, and `other`, of another architecture."""
    folder = tmp_path_factory.mktemp("models")
    target = make_tiny_target()
    target.model.save_pretrained(folder / "target")
    target.tokenizer.save_pretrained(folder / "target")
    for name, seed, architecture in (("first", 0, "eagle3"), ("copy", 0, "eagle3"), ("other", 1, "medusa")):
        head = make_tiny_head(target, seed, architecture=architecture)
        save_head(head, folder / name, dtype=torch.float64, about={})
    return folder
