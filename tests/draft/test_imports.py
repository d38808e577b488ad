"""A server that loads a head or a target imports nothing of training, data, evaluation or other formats."""

from __future__ import annotations

import subprocess
import sys

import pytest

ABOVE = ("draft.training", "draft.data", "draft.interop", "draft.evaluation", "draft.cli")


@pytest.mark.parametrize("module", ["draft.heads", "draft.heads.checkpoint", "draft.target", "draft.afa"])
def test_lower_modules_import_none_above(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in sys.modules if name.startswith({ABOVE!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
