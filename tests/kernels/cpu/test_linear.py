"""Packed linear layers against the matrix product in float64, and bit for bit against themselves in another batch."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_target
from cpu_cases import FLOAT, HALF, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cpu_kernels.ops import pack, pack_linears, packed_linear


@settings(max_examples=80)
@given(
    rows=st.integers(0, 40),
    size_in=st.integers(1, 200),
    size_out=st.integers(1, 200),
    stored=st.sampled_from([FLOAT, HALF]),
    given_in=st.sampled_from([FLOAT, HALF]),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_packed_linear_is_the_matrix_product(rows, size_in, size_out, stored, given_in, biased, seed):
    torch.manual_seed(seed)
    weight = torch.randn(size_out, size_in).to(stored)
    bias = torch.randn(size_out) if biased else None
    x = torch.randn(rows, size_in).to(given_in)
    got = packed_linear(x, pack(weight), size_out, bias)
    expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.shape == expected.shape and got.dtype == given_in
    if rows:
        # beside the sums of magnitudes: what a sum leaves after its terms cancel says nothing about rounding
        size = functional.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
        error = (got.double() - expected).norm() / size.norm()
        assert error < (1e-6 if given_in == FLOAT else 1e-2)


@pytest.mark.parametrize("stored", [FLOAT, HALF])
@pytest.mark.parametrize(("size_in", "size_out"), [(576, 1100), (1700, 130)])  # 1700: several blocks of inputs
def test_a_row_has_the_same_bits_in_any_batch(stored, size_in, size_out):
    packed = pack(torch.randn(size_out, size_in).to(stored))
    x = torch.randn(230, size_in)
    whole = packed_linear(x, packed, size_out)
    assert relative(whole[:, :16], x.double() @ packed_columns(packed, size_in)) < 1e-5
    for rows in (*range(1, 27), 97, 200):
        assert torch.equal(packed_linear(x[:rows], packed, size_out), whole[:rows]), rows
    assert torch.equal(packed_linear(x[113:114], packed, size_out), whole[113:114])


def packed_columns(packed: Tensor, size_in: int) -> Tensor:
    """The first 16 features [in, 16] of a packed weight, by the product with the identity."""
    return packed_linear(torch.eye(size_in), packed, packed.shape[0] * packed.shape[2])[:, :16].double()


def test_packed_linear_takes_any_shape_and_strides():
    weight = torch.randn(33, 24)
    x = torch.randn(24, 5, 2).permute(2, 1, 0)  # [2, 5, 24], transposed in memory
    assert relative(packed_linear(x, pack(weight.T.contiguous().T), 33), x.double() @ weight.double().T) < 1e-5
    assert packed_linear(torch.randn(3, 0, 24), pack(weight), 33).shape == (3, 0, 33)
    with pytest.raises(RuntimeError, match="ends in 23 features"):
        packed_linear(torch.randn(2, 23), pack(weight), 33)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        packed_linear(torch.randn(2, 24).double(), pack(weight), 33)


def test_nan_and_infinity_stay_in_their_row():
    packed = pack(torch.randn(40, 30).to(HALF))
    x = torch.randn(4, 30)
    clean = packed_linear(x, packed, 40)
    x[1, 7], x[2, 3] = float("nan"), float("inf")
    for kind in (FLOAT, HALF):
        got = packed_linear(x.to(kind), packed, 40)
        assert got[1].isnan().all() and got[2].isinf().all()
        assert torch.equal(got[[0, 3]], packed_linear(x[[0, 3]].to(kind), packed, 40))
    assert torch.equal(packed_linear(x, packed, 40)[[0, 3]], clean[[0, 3]])


def test_pack_linears_replaces_all_and_leaves_a_tied_embedding():
    model = make_tiny_target(dtype=torch.float32).model  # its own: it is packed in place
    ids = torch.arange(1, 12)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        assert model.lm_head.weight is model.get_input_embeddings().weight
        pack_linears(model, FLOAT)
        assert not any(type(m) is nn.Linear for m in model.modules())
        assert isinstance(model.get_input_embeddings().weight, nn.Parameter)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
