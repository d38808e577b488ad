"""A server that loads a head or a target imports nothing of training, data, evaluation or other formats."""

from __future__ import annotations

import subprocess
import sys

ABOVE = ("draft.training", "draft.data", "draft.interop", "draft.evaluation", "draft.cli")


def test_lower_modules_import_none_above() -> None:
    code = "import sys, draft.heads, draft.heads.checkpoint, draft.target, draft.afa; "
    code += f"print(*(name for name in sys.modules if name.startswith({ABOVE!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
