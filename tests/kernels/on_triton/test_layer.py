"""The PEFT layer of draft.afa: what goes through the kernels, what does not, and that both give the same."""

import logging

import afa_models
import pytest
import torch
from kernel_cases import DEVICE, limit, relative_error
from torch import Tensor, nn

from afa_kernels import ops, triton_kernels
from draft.afa import AfaLoraConfig, add_adapter, set_annealing_step
from draft.errors import UserError


def adapted(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    options = {"r": 3, "target_modules": ["fc"], "beta": 0.4} | options
    return afa_models.adapted(dtype, **options).train().to(DEVICE)


X = afa_models.X.float().to(DEVICE)


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model.get_base_model().fc(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def compare(monkeypatch):
    """compare(model, x): how often the kernels ran; both ways gave the same."""
    calls: list[int] = []
    down = triton_kernels.down
    monkeypatch.setattr(triton_kernels, "down", lambda *args: calls.append(1) or down(*args))

    def compare(model, x=X):
        calls.clear()
        monkeypatch.setenv("AFA_KERNELS", "auto")
        got = trained(model, x)
        count = len(calls)
        monkeypatch.setenv("AFA_KERNELS", "reference")
        expected = trained(model, x)
        assert len(calls) == count and len(got) == len(expected) > 2
        assert all(relative_error(*pair) < limit(x.dtype) for pair in zip(got, expected, strict=True))
        return count

    return compare


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [("silu", torch.float32), ("silu", torch.bfloat16), ("gelu", torch.float32), ("tanh", torch.float32)],
    ids=str,
)
def test_one_adapter_is_fused(activation, dtype, compare):
    model = adapted(dtype, activation=activation)
    for step in (0, 3):
        set_annealing_step(model, step, 10)
        assert compare(model, X.to(dtype)) == 1


def test_other_placements_and_a_hooked_base_layer_are_not(compare):
    for placement in ("s-A-B", "s-A-B-s", "s-A-s-B", "s-A-s-B-s"):
        assert compare(adapted(placement=placement)) == 0
    model = adapted()
    seen: list[int] = []
    model.get_base_model().fc.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert compare(model) == 0 and len(seen) == 2


def test_two_adapters_are_not(compare):
    model = adapted()
    add_adapter(model, AfaLoraConfig(r=2, lora_alpha=6, target_modules=["fc"], beta=0.7), "two")
    afa_models.randomise(model)
    model.to(DEVICE)
    assert compare(model) == 1  # "two" is there and not active
    model.base_model.set_adapter(["default", "two"])
    assert compare(model) == 0
    model.set_adapter("two")
    assert compare(model) == 1


def test_disabled_and_merged_adapters_are_not(compare, monkeypatch):
    model = adapted(beta=0.0)
    assert compare(model) == 1
    calls: list[int] = []
    monkeypatch.setattr(triton_kernels, "down", lambda *args: calls.append(1))
    monkeypatch.setenv("AFA_KERNELS", "auto")
    with torch.no_grad():
        head = model.get_base_model()
        base = head.lm_head(torch.tanh(head.fc.base_layer(X)))
        with model.disable_adapter():
            torch.testing.assert_close(model(X), base)
        model.merge_adapter()
        assert not torch.allclose(model(X), base)
    assert not calls


def test_dropout_takes_pytorch_and_says_so_once(compare, monkeypatch, caplog):
    model = adapted(lora_dropout=0.25)
    assert compare(model.eval()) == 1
    model.train()
    ops._log_once.cache_clear()
    monkeypatch.setenv("AFA_KERNELS", "auto")
    monkeypatch.setattr(triton_kernels, "down", lambda *args: pytest.fail("the kernels ran"))
    with caplog.at_level(logging.WARNING, logger="afa_kernels"):
        model(X), model(X)
    assert len(caplog.records) == 1 and "LoRA dropout is 0.25" in caplog.text
    monkeypatch.setenv("AFA_KERNELS", "triton")
    with pytest.raises(UserError, match="LoRA dropout is 0.25"):
        model(X)
    with pytest.raises(UserError, match="rank 257 is above 256"):
        adapted(r=257)(X)


def test_compiling_a_model_with_adapted_layers():
    model = adapted()
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    for step in (0, 2):
        set_annealing_step(model, step, 10)
        assert torch.equal(compiled(X), model(X))
