"""Broken kernels fail the tests: each line below is changed in a copy of the sources, and the copy is run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from kernel_cases import INTERPRETING, assert_exact, guard_new_empty, make_case

import afa_kernels
from afa_kernels import triton_kernels

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="on a card it would read and write other memory")

TOKEN_MASK = "mask = (rows < tokens)[:, None] & (cols < columns)[None, :]"
# What is broken: the activation of the case that must notice, the text as it is, and as it would be.
MUTATIONS = {
    "silu's derivative": ("silu", "(1 + z * (1 - logistic))", "(1 - z * (1 - logistic))"),
    "gelu's derivative": ("gelu", "+ z * density", "- z * density"),
    "tanh's derivative": ("tanh", "curved *= 1 - value * value", "curved *= 1 - value"),
    "relu's derivative": ("relu", "tl.where(z <= 0, 0.0, curved)", "curved"),
    "the derivative's linear part": ("silu", "return curved + dh * (1 - beta)", "return curved"),
    "scaling of y": ("silu", "acc *= scaling", "acc *= 1.0"),
    "scaling of dz": ("silu", "dh = scaling * _times_factor", "dh = _times_factor"),
    "scaling of dB": ("silu", "_cast(acc * scaling, out_ptr", "_cast(acc, out_ptr"),
    "the mask of a product's left side": (
        "silu",
        "(p_ptrs, mask=(ks < width - start)[None, :], other=0.0)",
        "(p_ptrs)",
    ),
    "the mask of its right side": ("silu", "(q_ptrs, mask=(ks < width - start)[:, None], other=0.0)", "(q_ptrs)"),
    "the mask of the rank": ("silu", "mask=(r < rank)[None, :], other=0.0", "mask=None"),
    "the mask of the tokens": ("silu", "mask=inside, other=0.0)\n        q", "mask=None)\n        q"),
    "the mask of y": ("silu", TOKEN_MASK, TOKEN_MASK.replace("rows < tokens", "rows > -1")),
    "the bias": ("silu", "acc += tl.load(bias_ptr", "acc += 0 * tl.load(bias_ptr"),
    "beta in dB": ("silu", "beta = tl.load(beta_ptr).to(tl.float32)\n    safe", "beta = 1.0\n    safe"),
}


def noticed(activation: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Test that a ragged case differs from the reference, or that memory beside an output was written."""
    case = make_case(37, 35, 34, 5, activation=activation)
    made = guard_new_empty(monkeypatch)
    try:
        assert_exact(case)
    except AssertionError:
        return True
    return not all(guards.intact() for guards in made)


def test_the_kernels_as_they_are_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not noticed("silu", monkeypatch)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    activation, old, new = MUTATIONS[name]
    source = Path(triton_kernels.__file__).read_text()
    assert source.count(old) == 1
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(afa_kernels, "triton_kernels", mutant)  # where the operators import it from
    assert noticed(activation, monkeypatch)
