"""The world that runs of training start from."""

import pytest
from training_runs import Run, command, make_world


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A tiny target on disk, data that it wrote, and a head that was trained on them for two steps."""
    root = make_world(tmp_path_factory.mktemp("world"))
    Run(command(root, "pretrain", root / "base", "--max-steps", "2")).succeed()
    return root
