"""Tiny models that several benchmarks are run on."""

from pathlib import Path

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target, save_target

from draft.heads.checkpoint import save_head
from draft.target import Target


def save_models(folder: Path, target: Target) -> Path:
    """Write `target`, head `first`, its copy `copy`, and `other`, of another architecture; returns the folder."""
    save_target(folder / "target", target)
    for name, seed, architecture in (("first", 0, "eagle3"), ("copy", 0, "eagle3"), ("other", 1, "medusa")):
        head = make_tiny_head(target, seed, architecture=architecture)
        save_head(head, folder / name, dtype=target.dtype, about={})
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder of models in float64."""
    return save_models(tmp_path_factory.mktemp("models"), make_tiny_target())


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Options that name a target and a head in float32."""
    folder = save_models(tmp_path_factory.mktemp("small"), make_tiny_target(dtype=torch.float32))
    return f"--target {folder}/target --head {folder}/first --dtype float32"


@pytest.fixture(scope="session")
def two_prompts(tmp_path_factory):
    """An option that names a file of two prompts."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text('{"prompt": "Hi"}\n{"prompt": "Count to three"}\n')
    return f"--prompts {file}"
