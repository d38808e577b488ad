"""The kernels, compiled, for all of their tests."""

import pytest

from cpu_kernels import arithmetic, load_kernels, set_arithmetic, set_threads
from cpu_kernels.ops import threads
from draft.files import cache_folder


@pytest.fixture(autouse=True)
def _kernels():
    load_kernels(cache_folder())
    before, products = threads(), arithmetic()
    yield
    set_threads(before)
    set_arithmetic(products)
