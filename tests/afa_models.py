"""A small module with an annealed adapter, as if trained, for tests of the adapter."""

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from draft.afa import AfaLoraConfig, add_adapter

PLACEMENTS = ["A-s-B", "s-A-B", "s-A-B-s", "s-A-s-B", "s-A-s-B-s"]
SIGMA: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "relu": lambda z: (z + z.abs()) / 2,
    "tanh": lambda z: 1 - 2 / (torch.exp(2 * z) + 1),
}
X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def formula(x: Tensor, a: Tensor, b: Tensor, beta: float, activation: str, placement: str) -> Tensor:
    """The output that an annealed adapter adds, before its scaling, written out again without torch's layers."""
    stages = {
        "A": lambda h: h @ a.double().T,
        "B": lambda h: h @ b.double().T,
        "s": lambda h: beta * SIGMA[activation](h) + (1 - beta) * h,
    }
    for stage in placement.split("-"):
        x = stages[stage](x)
    return x


class Head(nn.Module):
    """Stands for a draft head: a plain nn.Module with nn.Linear children."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 5)
        self.lm_head = nn.Linear(5, 7, bias=False)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.fc(x)))


def randomise(model: nn.Module, seed: int = 3) -> None:
    """Gives A and B values, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> PeftModel:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["fc", "lm_head"]} | options
    model = add_adapter(Head(dtype), AfaLoraConfig(**options))
    randomise(model)
    return model.eval()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
