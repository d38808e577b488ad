"""Linear layers with packed weights, in place of a model's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from draft.target import fastest_cpu_dtype
from serving.engine.cpu.operators import pack, packed_linear

# Rows from which a native bfloat16 product beats float32 arithmetic on packed weights.
NATIVE_ROWS = 65


class PackedLinear(nn.Module):
    """A linear layer for decoding: its weight is stored once, in bfloat16 or float32, in the kernels' order.

    Where the CPU multiplies bfloat16 natively, prompts go through the plain weight, which is then kept as well.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        stored = weight.detach().to(dtype)  # [out, in]
        native = dtype == torch.bfloat16 and fastest_cpu_dtype() == torch.bfloat16
        self.packed: Tensor
        self.weight: Tensor | None
        self.bias: Tensor | None
        # buffers that a checkpoint does not have: the order is this machine's
        self.register_buffer("packed", pack(stored), persistent=False)
        self.register_buffer("weight", stored if native else None, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, dtype: torch.dtype) -> PackedLinear:
        """`linear` with its weight stored in `dtype`; its bias stays as it is."""
        return cls(linear.weight, linear.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if self.weight is not None and x.dtype == self.weight.dtype and x.numel() >= NATIVE_ROWS * self.in_features:
            return nn.functional.linear(x, self.weight, self.bias)
        return packed_linear(x, self.packed, self.out_features, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weights={self.packed.dtype}"


def pack_linears(module: nn.Module, dtype: torch.dtype) -> int:
    """Replace every nn.Linear below `module` by a PackedLinear, in place; returns how many.

    A weight shared with an embedding stays there for the embedding.
    """
    replaced: dict[int, PackedLinear] = {}
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                if id(child) not in replaced:
                    replaced[id(child)] = PackedLinear.from_linear(child, dtype)
                setattr(parent, name, replaced[id(child)])
                count += 1
    return count
