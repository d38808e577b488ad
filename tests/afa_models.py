"""A small module with an annealed adapter, as if trained, for tests of the adapter."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from draft.afa import AfaLoraConfig, add_adapter

PLACEMENTS = ["A-s-B", "s-A-B", "s-A-B-s", "s-A-s-B", "s-A-s-B-s"]
X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


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
