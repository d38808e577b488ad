"""y, dx, dA and dB of the kernels against the reference in float64, for any shape, stride and value; the benchmark."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    DTYPES,
    INTERPRETING,
    OUTPUTS,
    assert_exact,
    exact,
    guard_new_empty,
    make_case,
    relative_error,
    run,
)
from torch import Tensor

import afa_kernels
from afa_kernels import ACTIVATIONS, afa_lora_linear, ops, reference, triton_kernels, tuning
from benchmarks import kernels

# On a card, and where the frozen product is rounded before the LoRA term is added, the terms of a single number
# may cancel; the norm of a few dozen can't.
SMALLEST = 1 if INTERPRETING else 8


@settings(max_examples=10)
@given(
    sizes=st.tuples(*[st.integers(SMALLEST, 50)] * 3, st.integers(1, 40)),
    dtypes=st.sampled_from(list(DTYPES)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    beta=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(sizes, dtypes, activation, beta, bias, seed):
    case = make_case(*sizes, dtypes=dtypes, activation=activation, beta=beta, bias=bias, seed=seed)
    with tuning.only("fused"):
        assert_exact(case)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_nan_and_infinity_pass_as_in_the_reference(activation, beta):
    case = make_case(40, 18, 11, 3, activation=activation, beta=beta)
    assert_exact(case)
    case.x[1, 2], case.x[3, 17], case.x[35, 0] = float("nan"), float("inf"), -float("inf")
    case.dy[5, 1], case.dy[38, 10] = float("inf"), float("nan")
    got, expected = run(case), run(case, reference.afa_lora_linear)
    for name in OUTPUTS:
        for what in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(what(got[name]), what(expected[name])), (name, what)
    assert torch.isfinite(got["y"]).sum() == 37 * 11  # rows of their own stay clean


@pytest.mark.parametrize("dtypes", DTYPES)
def test_the_update_in_place(dtypes):
    with tuning.only("update"):
        assert_exact(make_case(33, 17, 35, 9, dtypes=dtypes))


@pytest.mark.parametrize("rank", [64, 100, 129, 256])
def test_ranks_of_several_blocks(rank):
    assert_exact(make_case(19, 34, 37, rank))


@pytest.mark.skipif(not INTERPRETING, reason="a card uses these blocks in every test")
@pytest.mark.parametrize("dtypes", ["bf16+fp32", "fp32"])
def test_the_blocks_of_a_card(dtypes, monkeypatch):
    size = DTYPES[dtypes][0].itemsize
    first = {"thin": tuning.thin_blocks(size, 8)[0], "linear": tuning.LINEAR[size][0], "outer": tuning.OUTER[size][0]}
    monkeypatch.setattr(tuning, "INTERPRETED", first)
    shape = (130, 65, 131) if size == 2 else (65, 33, 66)
    assert_exact(make_case(*shape, 8, dtypes=dtypes))


def test_sums_over_tokens_in_parts(monkeypatch):
    monkeypatch.setattr(triton_kernels, "_processors", lambda device: 3)
    monkeypatch.setitem(tuning.INTERPRETED, "outer", tuning.Blocks(16, 32, 0, 1, 1))
    splits, share = triton_kernels._splits(90, 40, tuning.INTERPRETED["outer"], torch.device(DEVICE))
    assert splits > 2 and (splits - 1) * share < 90 <= splits * share
    assert_exact(make_case(90, 40, 20, 6))


@pytest.mark.parametrize("variant", ["fused", "update"])
def test_no_tokens(variant):
    case = make_case(0, 5, 7, 3, dtypes="bf16+fp32")
    with tuning.only(variant):
        got = run(case)
    assert got["y"].shape == (0, 7) and got["dx"].shape == (0, 5)
    assert not got["dA"].any() and not got["dB"].any() and got["dA"].shape == (3, 5) and got["dB"].shape == (7, 3)


def strided(t: Tensor, kind: str) -> Tensor:
    """The same values as a view that is not contiguous."""
    if kind == "transposed":
        return t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], 1)[:, 0]
    wide = t.new_full([2 * n for n in t.shape], float("nan"))
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


@pytest.mark.parametrize("kind", ["transposed", "every second"])
@pytest.mark.parametrize("variant", ["fused", "update"])
def test_inputs_that_are_not_contiguous(variant, kind):
    case = make_case(20, 37, 33, 5)
    tensors = {k: strided(v, kind) for k, v in vars(case).items() if isinstance(v, Tensor) and v.dim()}
    assert not any(t.is_contiguous() for t in tensors.values())
    with tuning.only(variant):
        assert_exact(replace(case, **tensors))


def test_an_expanded_gradient_and_more_dimensions():
    case = make_case(24, 10, 12, 4)
    x = case.x.reshape(2, 3, 4, 10).transpose(0, 2).detach().requires_grad_()
    rest = (case.weight, case.bias, case.lora_a, case.lora_b)
    options = {"beta": case.beta, "scaling": 0.5, "activation": "tanh"}
    for function in (afa_lora_linear, reference.afa_lora_linear):
        y = function(x, *rest, **options)
        assert y.shape == (4, 3, 2, 12)
        y.sum().backward()  # a gradient of stride 0
    (first,) = torch.autograd.grad(afa_lora_linear(x, *rest, **options).sum(), x)
    torch.testing.assert_close(first * 2, x.grad)
    row = afa_lora_linear(case.x[3], *rest, **options)
    torch.testing.assert_close(row, reference.afa_lora_linear(case.x[3], *rest, **options))
    assert row.shape == (12,)


@pytest.mark.parametrize("variant", ["fused", "update"])
def test_every_output_element_is_written_and_nothing_else(variant, monkeypatch):
    monkeypatch.setattr(triton_kernels, "_processors", lambda device: 2)
    case = make_case(41, 35, 67, 5)
    expected = exact(case)
    made = guard_new_empty(monkeypatch)
    with tuning.only(variant):
        got = run(case)
    assert len(made) > 5
    assert all(guarded.intact() and not guarded.tensor.isnan().any() for guarded in made)
    assert all(relative_error(got[name], expected[name]) < 1e-5 for name in OUTPUTS)


def test_the_backward_keeps_and_writes_nothing_of_the_outputs_size(monkeypatch):
    case = make_case(48, 20, 30, 4)
    x, a, b = (t.detach().requires_grad_() for t in (case.x, case.lora_a, case.lora_b))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = afa_lora_linear(x, case.weight, case.bias, a, b, beta=case.beta, scaling=1.0, activation="gelu")
    assert saved and all(t.numel() != y.numel() for t in saved)
    made = guard_new_empty(monkeypatch)
    with tuning.only("fused"):
        y.backward(case.dy)
    sizes = [guarded.size for guarded in made]
    assert 48 * 20 in sizes and max(sizes) == 48 * 20  # dx


@pytest.mark.parametrize(("activation", "dtypes"), [*((name, "bf16+fp32") for name in ACTIVATIONS), ("silu", "fp32")])
def test_beta_zero_is_bitwise_the_kernels_without_an_activation(activation, dtypes):
    case = make_case(33, 20, 18, 6, dtypes=dtypes, beta=0.0)
    case.x[0] = 0
    x, weight, bias = case.x, case.weight, case.bias
    a, b = (t.to(triton_kernels.operand_dtype(x)) for t in (case.lora_a, case.lora_b))
    results = []
    for name in (activation, "identity"):
        y, z = ops.forward_op(x, weight, bias, a, b, case.beta, 1.3, name)
        wanted = [True] * 3, torch.float32, torch.float32
        results.append((y, z, *ops.backward_op(case.dy, x, weight, a, b, z, case.beta, 1.3, name, *wanted)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# ---- broken kernels fail: each line below is changed in a copy of the sources, and the copy is run ----

MUTABLE = pytest.mark.skipif(not INTERPRETING, reason="on a card it would read and write other memory")
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
    "the mask of a left side": ("silu", "(p_ptrs, mask=(ks < width - start)[None, :], other=0.0)", "(p_ptrs)"),
    "the mask of a right side": ("silu", "(q_ptrs, mask=(ks < width - start)[:, None], other=0.0)", "(q_ptrs)"),
    "the mask of the rank": ("silu", "mask=(r < rank)[None, :], other=0.0", "mask=None"),
    "the mask of the tokens": ("silu", "mask=inside, other=0.0)\n        q", "mask=None)\n        q"),
    "the mask of y": ("silu", TOKEN_MASK, TOKEN_MASK.replace("rows < tokens", "rows > -1")),
    "the bias": ("silu", "acc += tl.load(bias_ptr", "acc += 0 * tl.load(bias_ptr"),
    "beta in dB": ("silu", "beta = tl.load(beta_ptr).to(tl.float32)\n    safe", "beta = 1.0\n    safe"),
}


def noticed(activation: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Test that a ragged case differs from the reference, or that memory beside an output was written."""
    case = make_case(33, 35, 17, 5, activation=activation)
    made = guard_new_empty(monkeypatch)
    try:
        assert_exact(case)
    except AssertionError:
        return True
    return not all(guards.intact() for guards in made)


@MUTABLE
def test_the_kernels_as_they_are_pass(monkeypatch):
    assert not noticed("silu", monkeypatch)


@MUTABLE
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
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


# ---- the benchmark of kernels, on a tiny layer ----


@pytest.mark.skipif(not INTERPRETING, reason="a card is measured by the benchmark itself")
def test_a_whole_run(tmp_path, capsys):
    options = "--device cpu --shapes 24x40 --tokens 20 --ranks 4 --repeats 1 --check"
    assert kernels.main([*options.split(), "--out", str(tmp_path)]) == 1  # the interpreter is slow: the bars are missed
    printed = capsys.readouterr().out
    assert "MISSED" in printed and "interpreted on the CPU" in printed and "40" in printed
    results = json.loads((tmp_path / "kernels-cpu.json").read_text())
    phases = [(row["in"], row["out"], row["phase"]) for row in results["rows"]]
    assert phases == [(24, 40, phase) for phase in ("forward", "backward", "both")]
    for row in results["rows"]:
        assert set(row["ms"]) == set(row["peak_mib"]) == set(kernels.CONTENDERS) and all(row["ms"].values())
        assert set(row["errors"]) == {"y", "dx", "dA", "dB"} and max(row["errors"].values()) < 1e-2
        assert row["floor_ms"] > 0
    assert results["device"] == "cpu" and results["ceilings"]["flops"] > 0 and "--tokens 20" in results["command"]
    assert (tmp_path / "kernels-cpu.png").read_bytes()[:4] == b"\x89PNG"
