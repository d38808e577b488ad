"""The choice of an implementation, the memory of the fastest blocks, and the kernels as Triton interprets them."""

import pytest
import torch
from conftest import ended, python
from kernel_cases import INTERPRETING, make_case

from afa_kernels import KernelsError, afa_lora_linear, ops, reference

pytestmark = pytest.mark.skipif(INTERPRETING or torch.cuda.is_available(), reason="about machines without kernels")


def arguments(**replaced: object) -> dict[str, object]:
    case = make_case(3, 5, 4, 2)
    names = ("x", "weight", "bias", "lora_a", "lora_b", "beta", "scaling", "activation")
    return {name: getattr(case, name) for name in names} | replaced


def test_a_cpu_takes_pytorch_without_a_word(monkeypatch, caplog):
    expected = reference.afa_lora_linear(**arguments())
    monkeypatch.delenv("AFA_KERNELS", raising=False)
    assert torch.equal(afa_lora_linear(**arguments()), expected)
    for choice in ("", "auto", "reference"):
        monkeypatch.setenv("AFA_KERNELS", choice)
        assert torch.equal(afa_lora_linear(**arguments()), expected)
    ops.fall_back("LoRA dropout is 0.1", "cpu")
    assert not caplog.records


def test_beta_gets_no_gradient():
    case = arguments(beta=torch.tensor(0.5, requires_grad=True), lora_a=torch.ones(2, 5, requires_grad=True))
    afa_lora_linear(**case).sum().backward()
    assert case["beta"].grad is None and case["lora_a"].grad is not None


def test_an_impossible_force_says_why(monkeypatch):
    monkeypatch.setenv("AFA_KERNELS", "cuda")
    with pytest.raises(KernelsError, match="AFA_KERNELS is 'cuda': set it to one of auto, reference, triton"):
        afa_lora_linear(**arguments())
    monkeypatch.setenv("AFA_KERNELS", "triton")
    with pytest.raises(KernelsError, match="x is on 'cpu' and not on a CUDA device, and TRITON_INTERPRET is not 1"):
        afa_lora_linear(**arguments())
    with pytest.raises(KernelsError, match="dropout"):
        ops.fall_back("LoRA dropout is 0.1", "cpu")
    pytest.importorskip("triton")
    assert ops._no_triton("cuda") is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelsError, match="Triton was imported before TRITON_INTERPRET=1"):
        afa_lora_linear(**arguments())


def test_without_triton(monkeypatch):
    code = """
import sys, torch
sys.modules["triton"] = None
from afa_kernels import KernelsError, afa_lora_linear
t = torch.ones(2, 2)
def call(): return afa_lora_linear(t, t, None, t, t, beta=torch.tensor(0.0), scaling=1.0, activation="relu")
assert call()[0, 0] == 6
import os
os.environ.update(AFA_KERNELS="triton", TRITON_INTERPRET="1")
try: call()
except KernelsError as error: assert "Triton can't be imported" in str(error)
else: raise SystemExit(1)
"""
    status, shown = ended(python("-c", code, AFA_KERNELS=""))
    assert status == 0, shown


@pytest.mark.parametrize(
    ("replaced", "error", "word"),
    [
        ({"beta": 0.5}, TypeError, "beta is 0.5: give a 0-dim tensor"),
        ({"beta": torch.ones(1)}, ValueError, "0-dim tensor on cpu"),
        ({"activation": "swish"}, ValueError, "'swish'.*silu"),
        ({"x": torch.ones(3, 6)}, ValueError, r"x \(3, 6\)"),
        ({"x": torch.tensor(1.0)}, ValueError, "at least one dimension"),
        ({"lora_a": torch.ones(2, 4)}, ValueError, r"lora_a \(2, 4\)"),
        ({"lora_b": torch.ones(5, 2)}, ValueError, r"lora_b \(5, 2\)"),
        ({"bias": torch.ones(5)}, ValueError, r"bias \(5,\)"),
        ({"weight": torch.ones(4, 5, device="meta")}, ValueError, "x is on cpu"),
    ],
)
def test_what_does_not_fit_is_named(replaced, error, word):
    with pytest.raises(error, match=word):
        afa_lora_linear(**arguments(**replaced))


# ---- the measured choice ----


def test_the_fastest_is_measured_once_and_remembered(tmp_path, monkeypatch):
    tuning = pytest.importorskip("afa_kernels.tuning")
    candidates = [tuning.Blocks(*[n] * 5) for n in (1, 2, 3)]
    took = {1: 0.5, 3: 0.2}
    runs: list[int] = []

    def run(blocks):
        runs.append(blocks.tokens)
        if blocks.tokens == 2:
            raise tuning.triton.OutOfResources(300_000, 200_000, "shared memory")

    def milliseconds(measured):
        measured()
        return took[runs[-1]]

    file = tmp_path / "deep" / "choices.json"
    monkeypatch.setattr(tuning, "_cache_file", lambda device: file)
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def choose(key=0):
        return tuning.choose("product", (torch.bfloat16, key), candidates, run).tokens

    assert choose() == 1 and not runs  # without a card, the first
    monkeypatch.setattr(tuning, "_can_measure", lambda: True)
    for restart in (False, False, True):
        if restart:
            tuning._remembered.cache_clear()
        assert choose() == 3
    assert runs == [1, 2, 3] and "bfloat16 0" in file.read_text()
    assert choose(key=1) == 3 and len(runs) == 6
    file.write_text("{")  # a damaged file is measured again
    tuning._remembered.cache_clear()
    assert choose() == 3 and len(runs) == 9
    took.clear()
    candidates[:] = [candidates[1], candidates[1]]
    with pytest.raises(RuntimeError, match="AFA_KERNELS=reference"):
        choose(key=2)
    tuning._remembered.cache_clear()


def test_shape_classes():
    tuning = pytest.importorskip("afa_kernels.tuning")
    assert tuning.shape_class(1000, 4096, 8192, 12) == (1024, 4096, 8192, 16)
    with pytest.raises(ValueError, match="'cublas'"), tuning.only("cublas"):
        pass
    with tuning.only("update"), tuning.only("fused"):
        assert tuning.product_variants() == ("fused",)
    assert tuning.product_variants() == ("fused", "update")


# ---- the kernels, in a process that interprets Triton ----


def test_the_kernels_as_triton_interprets_them():
    pytest.importorskip("triton")
    # the cache is not the caller's, since two pytests would write it
    options = "-q -p no:cacheprovider -W ignore::RuntimeWarning tests/kernels/on_triton"
    status, shown = ended(python("-m", "pytest", *options.split(), TRITON_INTERPRET="1", AFA_KERNELS=""))
    assert status == 0 and " passed" in shown, shown[-8000:]
