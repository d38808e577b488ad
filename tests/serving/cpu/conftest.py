"""What all tests of the CPU kernels need."""

from __future__ import annotations

import pytest

from cpu_kernels import load_kernels, set_threads, threads


@pytest.fixture(autouse=True)
def _kernels():
    load_kernels()
    before = threads()
    yield
    set_threads(before)
