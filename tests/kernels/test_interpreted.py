"""Runs tests/kernels/on_triton in a process that interprets Triton, where this one doesn't."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_cases import INTERPRETING

FOLDER = Path(__file__).with_name("on_triton")


@pytest.mark.skipif(INTERPRETING, reason="this process interprets Triton itself")
def test_the_kernels_as_triton_interprets_them() -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AFA_KERNELS")} | {"TRITON_INTERPRET": "1"}
    # Core and thread counts are the caller's; the cache is not, since two pytests would write it.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", FOLDER]
    root = FOLDER.parents[2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
