"""Annealed LoRA layers of random numbers, run by the kernels and by the reference; for tests/kernels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from afa_kernels import afa_lora_linear, reference

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING or not torch.cuda.is_available() else "cuda"
HAS_TRITON = INTERPRETING or torch.cuda.is_available()
# x, weight and bias; A and B. The first is the main case.
DTYPES = {
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16+fp32": (torch.float16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
OUTPUTS = ("y", "dx", "dA", "dB")


def limit(dtype: torch.dtype) -> float:
    """The relative error that the kernels may have in `dtype`."""
    return 1e-5 if dtype == torch.float32 else 1e-2


@dataclass
class Case:
    """One layer with its input and the gradient that reaches its output."""

    x: Tensor  # [tokens, in]
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    lora_a: Tensor  # [rank, in]
    lora_b: Tensor  # [out, rank]
    dy: Tensor  # [tokens, out]
    beta: Tensor
    scaling: float = 1.7
    activation: str = "silu"

    def to(self, dtype: torch.dtype) -> Case:
        tensors = {k: v.to(dtype) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


class Guarded:
    """A contiguous tensor of NaN inside of memory that is NaN too: what is read beside it, or left out, shows."""

    ROOM = 4096  # elements on either side: a block's worth

    def __init__(self, shape: Sequence[int], like: Tensor) -> None:
        self.size = math.prod(shape)
        self.memory = torch.full((self.size + 2 * self.ROOM,), math.nan, dtype=like.dtype, device=like.device)
        self.tensor = self.memory[self.ROOM : self.ROOM + self.size].view(*shape)

    def intact(self) -> bool:
        """Test that nothing was written beside the tensor."""
        return bool(self.memory[: self.ROOM].isnan().all() and self.memory[self.ROOM + self.size :].isnan().all())


def guard_new_empty(monkeypatch: pytest.MonkeyPatch) -> list[Guarded]:
    """From here on `Tensor.new_empty` gives guarded tensors; they are added to the list that is returned."""
    made: list[Guarded] = []
    new_empty = Tensor.new_empty

    def guarded(self: Tensor, *size: Any, **options: Any) -> Tensor:
        like = new_empty(self, 0, **options)
        shape = new_empty(self, *size, **(options | {"device": "meta"})).shape
        made.append(Guarded(shape, like))
        return made[-1].tensor

    monkeypatch.setattr(Tensor, "new_empty", guarded)
    return made


def make_case(
    tokens: int,
    width: int,
    out: int,
    rank: int,
    *,
    dtypes: str = "fp32",
    beta: float = 0.3,
    activation: str = "silu",
    bias: bool = True,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    dtype, lora_dtype = DTYPES[dtypes]

    def randn(*shape: int, like: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator) * scale
        return Guarded(shape, torch.empty(0, dtype=like, device=DEVICE)).tensor.copy_(values)

    return Case(
        x=randn(tokens, width, like=dtype),
        weight=randn(out, width, like=dtype, scale=width**-0.5),
        bias=randn(out, like=dtype) if bias else None,
        lora_a=randn(rank, width, like=lora_dtype, scale=width**-0.5),
        lora_b=randn(out, rank, like=lora_dtype, scale=rank**-0.5),
        dy=randn(tokens, out, like=dtype),
        beta=torch.tensor(beta, device=DEVICE),
        activation=activation,
    )


def run(case: Case, function: Callable[..., Tensor] = afa_lora_linear) -> dict[str, Tensor]:
    """y, dx, dA and dB."""
    x, a, b = (t.detach().requires_grad_() for t in (case.x, case.lora_a, case.lora_b))
    options = {"beta": case.beta, "scaling": case.scaling, "activation": case.activation}
    y = function(x, case.weight, case.bias, a, b, **options)
    y.backward(case.dy)
    return {"y": y.detach(), "dx": x.grad, "dA": a.grad, "dB": b.grad}


def exact(case: Case) -> dict[str, Tensor]:
    """The same by the reference in float64."""
    return run(case.to(torch.float64), reference.afa_lora_linear)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, and the plain norm where nothing is expected."""
    norm = expected.double().norm()
    error = (got.double() - expected.double()).norm()
    return float(error / norm if norm > 0 else error)


def assert_exact(case: Case) -> None:
    """The kernels' results are within the limit of the reference in float64, each of them."""
    got, expected = run(case), exact(case)
    for name in OUTPUTS:
        assert got[name].shape == expected[name].shape, name
        error = relative_error(got[name], expected[name])
        assert error < limit(case.x.dtype), f"{name} is off by {error:.1e}"
