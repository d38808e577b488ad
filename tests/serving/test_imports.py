"""Packages that the server must not need: it installs without the extras of training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVER = "import sys, serving.cli, serving.server, serving.api.app, serving.engine; print(*sys.modules)"
UNWANTED = ("matplotlib", "datasets", "tensorboardX", "wandb", "draft.training", "draft.interop", "draft.data")


def test_the_server_imports_nothing_of_training() -> None:
    run = subprocess.run([sys.executable, "-c", SERVER], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "torch" in loaded
    assert [name for name in loaded if name.startswith(UNWANTED)] == []
