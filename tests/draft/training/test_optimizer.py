"""Muon's steps, and the precision in which they are computed."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import draft.training.optimizer as optimizer
from draft.training.optimizer import Muon, orthogonalised

SHAPES = [(96, 64), (64, 96), (64, 64)]


def stepped(make, steps: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in SHAPES]
    before = [parameter.detach().clone() for parameter in parameters]
    stepping = make([{"params": [parameter]} for parameter in parameters])
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        stepping.step()
    return [parameter.detach() - old for parameter, old in zip(parameters, before, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_steps_as_pytorchs(monkeypatch, dtype):
    monkeypatch.setattr(optimizer, "fastest_cpu_dtype", lambda: dtype)
    ours = stepped(lambda groups: Muon(groups, 2e-3))
    reference = stepped(lambda groups: torch.optim.Muon(groups, 2e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    for one, other in zip(ours, reference, strict=True):
        assert (one - other).norm() < (1e-3 if dtype == torch.bfloat16 else 0.03) * other.norm()


@pytest.mark.parametrize("shape", SHAPES[:2])  # a square one may have values too small for five steps
def test_orthogonalised_has_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
    assert values.min() > 0.6 and values.max() < 1.25


def test_a_cpu_without_bfloat16_products_makes_none(monkeypatch):
    """Emulated ones are ten times slower, and took most of a step."""
    dtypes = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                dtypes.update(each.dtype for each in arguments if isinstance(each, torch.Tensor))
            return function(*arguments, **(options or {}))

    monkeypatch.setattr(optimizer, "fastest_cpu_dtype", lambda: torch.float32)
    with Products():
        stepped(lambda groups: Muon(groups, 2e-3), steps=1)
    assert dtypes == {torch.float32}
