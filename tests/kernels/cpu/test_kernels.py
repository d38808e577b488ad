"""The CPU kernels: threads, schemas of operators, building; packed linear layers against the product in float64."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import gguf
import pytest
import torch
from conftest import ended, make_tiny_target, python
from cpu_cases import FLOAT, HALF, attend, random_case, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cpu_kernels import KernelsUnavailable, arithmetics, build, set_arithmetic, set_threads
from cpu_kernels.ops import choices, pack, pack_linears, packed_linear, threads
from serving.engine.noise import Purpose, gumbel, position_keys, signed


def test_threads_do_not_change_bits():
    packed, x = pack(torch.randn(1000, 300).to(HALF)), torch.randn(20, 300)
    case = random_case(seed=3, count=12)
    results = []
    for count in (1, 2, 5):
        set_threads(count)
        assert threads() == count
        for _ in range(20):  # workers that sleep, spin and start
            results.append((packed_linear(x, packed, 1000), attend(case)))
    for a, b in pairwise(results):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(("requested", "expected"), [("1", 1), ("4096", None), ("many", None), ("", None)])
def test_the_variable_of_openmp_limits_the_threads(requested, expected):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    program = "from cpu_kernels.ops import load_kernels, threads; from draft.files import cache_folder; "
    program += "load_kernels(cache_folder()); print(threads())"
    status, shown = ended(python("-c", program, OMP_NUM_THREADS=requested))
    assert status == 0 and int(shown.splitlines()[-1]) == (expected or cores)


def test_operators_say_truly_what_they_change_and_return():
    case = random_case(seed=8, count=3)
    operators, packed = torch.ops.draftsmith, pack(torch.randn(20, 10))
    for operator, arguments in (
        (operators.slot_attention.default, tuple(case.values())),
        (operators.packed_linear.default, (torch.randn(3, 10), packed, 20, torch.randn(20))),
        (operators.pack.default, (torch.randn(20, 10),)),
    ):
        torch.library.opcheck(operator, arguments, test_utils="test_schema")


def test_two_python_threads_may_call_at_once():
    set_threads(3)
    packed, x = pack(torch.randn(2000, 200)), torch.randn(4, 200)
    expected = packed_linear(x, packed, 2000)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(packed_linear, x, packed, 2000) for _ in range(300)]
    assert all(torch.equal(call.result(), expected) for call in calls)


def test_a_process_ends_and_forks_while_workers_exist():
    code = """
import os, torch
from cpu_kernels.ops import load_kernels, pack, packed_linear, set_threads
from draft.files import cache_folder
load_kernels(cache_folder())
set_threads(3)
packed, x = pack(torch.randn(2000, 200)), torch.randn(4, 200)
expected = packed_linear(x, packed, 2000)
child = os.fork()
assert torch.equal(packed_linear(x, packed, 2000), expected)
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("both")
"""
    status, shown = ended(python("-c", code))
    assert status == 0 and "both" in shown, shown


def test_a_missing_or_failing_compiler_is_one_sentence(monkeypatch, tmp_path):
    failing = tmp_path / "g++"
    failing.write_text("#!/bin/sh\necho 'some note' >&2; echo 'kernels.cpp:1: error: no such thing' >&2; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(KernelsUnavailable, match="could not compile.*error: no such thing.*set "):
        build.built_library(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["g++"]
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(KernelsUnavailable, match="install g"):
        build.built_library(tmp_path)


# ---- packed linear layers ----


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
    packed = pack(weight)
    for products in arithmetics():
        set_arithmetic(products)
        got = packed_linear(x, packed, size_out, bias)
        read = x if stored == FLOAT or products == "float32" else x.to(HALF)
        expected = functional.linear(read.double(), weight.double(), None if bias is None else bias.double())
        assert got.shape == expected.shape and got.dtype == given_in
        if rows:
            # beside the sums of magnitudes: what a sum leaves after its terms cancel says nothing about rounding
            magnitudes = (read.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
            error = (got.double() - expected).norm() / functional.linear(*magnitudes).norm()
            assert error < (1e-6 if given_in == FLOAT else 1e-2), products


def on_this_machine(name: str) -> None:
    """Choose an arithmetic, or skip the test where the CPU lacks it."""
    if name not in arithmetics():
        pytest.skip(f"this CPU has no {name} products")
    set_arithmetic(name)


@pytest.mark.parametrize(("stored", "products"), [(FLOAT, "float32"), (HALF, "float32"), (HALF, "bf16"), (HALF, "amx")])
@pytest.mark.parametrize(("size_in", "size_out"), [(576, 1100), (1700, 130)])  # 1700: several blocks of inputs
def test_a_row_has_the_same_bits_in_any_batch(stored, products, size_in, size_out):
    on_this_machine(products)
    packed = pack(torch.randn(size_out, size_in).to(stored))
    x = torch.randn(230, size_in).to(HALF).float()  # which no arithmetic rounds
    whole = packed_linear(x, packed, size_out)
    assert relative(whole[:, :16], x.double() @ packed_columns(packed, size_in)) < 1e-5
    for rows in (*range(1, 65), 97, 200):
        assert torch.equal(packed_linear(x[:rows], packed, size_out), whole[:rows]), rows
    assert torch.equal(packed_linear(x[113:114], packed, size_out), whole[113:114])


def packed_columns(packed: Tensor, size_in: int) -> Tensor:
    """The first 16 features [in, 16] of a packed weight, by the product with the identity."""
    return packed_linear(torch.eye(size_in), packed, packed.shape[0] * torch.ops.draftsmith.panel_width())[
        :, :16
    ].double()


def test_packed_linear_takes_any_shape_and_strides():
    weight = torch.randn(33, 24)
    x = torch.randn(24, 5, 2).permute(2, 1, 0)  # [2, 5, 24], transposed in memory
    assert relative(packed_linear(x, pack(weight.T.contiguous().T), 33), x.double() @ weight.double().T) < 1e-5
    assert packed_linear(torch.randn(3, 0, 24), pack(weight), 33).shape == (3, 0, 33)
    with pytest.raises(RuntimeError, match="ends in 23 features"):
        packed_linear(torch.randn(2, 23), pack(weight), 33)
    with pytest.raises(RuntimeError, match="this machine does not have bf8"):
        set_arithmetic("bf8")
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        packed_linear(torch.randn(2, 24).double(), pack(weight), 33)


# integers


def stored_in(packed: Tensor, size_in: int, size_out: int) -> Tensor:
    """The weight [out, in] that a packed one of integers stands for; rounding leaves 127 times a unit as it is."""
    return packed_linear(torch.eye(size_in) * 127, packed, size_out).T.double() / 127


@settings(max_examples=60)
@given(
    rows=st.integers(0, 30),
    size_in=st.integers(1, 200),
    size_out=st.integers(1, 200),
    stored=st.sampled_from([FLOAT, HALF]),
    bits=st.sampled_from([4, 8]),
    power=st.integers(-20, 10),
    seed=st.integers(0, 1000),
)
def test_products_of_integers_are_those_of_rounded_factors(rows, size_in, size_out, stored, bits, power, seed):
    torch.manual_seed(seed)
    weight, bias = torch.randn(size_out, size_in).mul(0.1).to(stored), torch.randn(size_out)
    weight[0], weight[-1, 0] = 0, 3.0
    levels = torch.randint(-127, 128, (rows, size_in)).float()
    levels[:, ::32] = 127  # of each block, so that rounding changes nothing
    packed = pack(weight, bits)
    exact = stored_in(packed, size_in, size_out)
    for block, close in zip(weight.double().split(32, dim=1), exact.split(32, dim=1), strict=True):
        step = (block.amax(1) - block.amin(1)) / 15 if bits == 4 else block.abs().amax(1) / 127
        assert ((close - block).abs().mean(1) <= 0.51 * step + 2e-3 * block.abs().amax(1)).all()  # float16 scales
    expected = functional.linear(levels.double() * 2.0**power, exact, bias.double())
    magnitudes = functional.linear(levels.abs().double() * 2.0**power, exact.abs(), bias.abs().double())
    got = packed_linear(levels * 2.0**power, packed, size_out, bias)
    assert ((got.double() - expected).abs() <= 1e-6 * magnitudes).all()
    other = torch.randn(rows, size_in) * 2.0**power  # is rounded by half a level at most
    expected = functional.linear(other.double(), exact)
    steps = functional.pad(other, (0, -size_in % 32)).unflatten(1, (-1, 32)).abs().amax(-1) / 127
    halves = functional.linear(steps.repeat_interleave(32, 1)[:, :size_in].double() / 2, exact.abs())
    assert ((packed_linear(other, packed, size_out).double() - expected).abs() <= 1.001 * halves + 1e-12).all()


@pytest.mark.parametrize(("size_in", "size_out"), [(576, 1100), (1700, 130)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_has_the_same_bits_in_any_batch_of_integers(size_in, size_out, bits):
    packed, x = pack(torch.randn(size_out, size_in), bits), torch.randn(230, size_in)
    whole = packed_linear(x, packed, size_out)
    for rows in (*range(1, 65), 97, 200):
        assert torch.equal(packed_linear(x[:rows], packed, size_out), whole[:rows]), rows
    assert torch.equal(packed_linear(x[113:114], packed, size_out), whole[113:114])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_of_a_gguf_file_are_taken_as_they_are(kind):
    torch.manual_seed(4)
    written = torch.randn(40, 192).mul(10 ** torch.randint(-3, 2, (40, 1)).double()).float().numpy()
    quantised = gguf.quants.quantize(written, getattr(gguf.GGMLQuantizationType, kind))
    weight = torch.from_numpy(gguf.quants.dequantize(quantised, getattr(gguf.GGMLQuantizationType, kind)))
    got = stored_in(pack(weight, 8 if kind == "Q8_0" else 4), 192, 40).float()
    torch.testing.assert_close(got, weight, rtol=1e-6, atol=1e-6 * float(weight.abs().max()))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_products_of_integers_do_not_saturate(bits):
    signs = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1, -1, -1, -1], [1, -1, 1, -1], [1, 1, -1, -1]]).repeat(1, 24)
    weight = signs.clone() if bits == 8 else 15 * (signs > 0).float()
    weight[:, ::32] = 0  # a block's minimum
    packed = pack(weight, bits)
    exact, x = stored_in(packed, 96, 4), 127 * signs
    assert (exact.float() - weight).abs().max() <= 1e-3 * weight.abs().max()
    expected = functional.linear(x.double(), exact)
    assert ((packed_linear(x, packed, 4).double() - expected).abs() <= 1e-6 * 127 * 96 * weight.abs().max()).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_nan_and_infinity_stay_in_their_row_of_integers(bits):
    packed, x = pack(torch.randn(40, 70), bits), torch.randn(4, 70)
    clean = packed_linear(x, packed, 40)
    x[1, 7], x[2, 69] = float("nan"), float("-inf")
    got = packed_linear(x, packed, 40)
    assert got[1:3].isnan().all() and torch.equal(got[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("products", ["float32", "bf16", "amx"])
def test_nan_and_infinity_stay_in_their_row(products):
    on_this_machine(products)
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


# choices


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("vocab", [1, 7, 300, 5000])
def test_choices_are_the_first_of_the_largest(dtype, vocab):
    torch.manual_seed(vocab)
    logits = torch.randn(9, vocab).mul(3).to(dtype)
    logits[3] = 1.5
    logits[4, vocab // 2 :] = 50.0
    logits[5, 0] = -torch.inf
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert choices(logits).tolist() == expected


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("vocab", [1, 40, 300, 5000])
@pytest.mark.parametrize("temperature", [1e-20, 0.3, 1.0, 2.0])
def test_noisy_choices_are_those_of_the_noise_in_full(dtype, vocab, temperature):
    torch.manual_seed(vocab)
    logits, positions = torch.randn(40, vocab).mul(2).to(dtype), list(range(100, 140))
    logits[:, vocab // 2 :: 7] = -torch.inf
    logits[:, 0] = 0
    keys = torch.tensor([[signed(one), signed(other)] for one, other in position_keys(11, Purpose.CHOICE, positions)])
    noise = gumbel(11, Purpose.CHOICE, positions, torch.arange(vocab))
    highest = logits.double().amax(dim=1, keepdim=True)
    expected = ((logits.double() - highest) / temperature + noise).argmax(dim=1)
    assert choices(logits, keys, 1 / temperature).tolist() == expected.tolist()
