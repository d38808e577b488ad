"""Tests of the Triton kernels, on a card or with TRITON_INTERPRET=1, which must be set before Triton is imported.

Without either there is nothing here to collect; `tests/kernels/test_ops.py` then runs this folder in a
process of its own.
"""

import pytest
from kernel_cases import HAS_TRITON

collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]


@pytest.fixture(autouse=True)
def _kernels_only(monkeypatch):
    """No silent way round the kernels; on a card no measuring for every drawn shape, but the first candidate."""
    from afa_kernels import tuning

    monkeypatch.setenv("AFA_KERNELS", "triton")
    monkeypatch.setattr(tuning, "_can_measure", lambda: False)
    yield
