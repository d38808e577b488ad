"""AFA-LoRA in plain PyTorch, for any floating dtype.

    y = W0 x + s * B phi(A x)        phi(z) = beta*sigma(z) + (1-beta)*z

Source of the formula: AFA-LoRA, arXiv 2512.22455. Every sigma of a placement is the same annealed phi, so
each placement is the plain product B A x at beta = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,  # the exact, erf form
    "relu": F.relu,
    "tanh": torch.tanh,
}


# s is phi; the stages of the adapter's share in the order in which they are applied
PLACEMENTS = ("A-s-B", "s-A-B", "s-A-B-s", "s-A-s-B", "s-A-s-B-s")


def canonical_placement(name: str) -> str:
    """The placement's name in PLACEMENTS; the glyph σ may stand for s. ValueError for an unknown one."""
    key = name.replace("σ", "s")
    if key not in PLACEMENTS:
        raise ValueError(f"unknown placement {name!r}: choose one of {', '.join(PLACEMENTS)}")
    return key


def annealed_activation(z: Tensor, beta: Tensor, activation: str) -> Tensor:
    """phi(z) = beta*sigma(z) + (1-beta)*z, of z's shape and dtype.

    `beta` is a 0-dim tensor on z's device (a 0-dim tensor never promotes z, so bf16 stays bf16, and reading
    it needs no synchronisation with the device). Raises ValueError for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    return beta * ACTIVATIONS[activation](z) + (1 - beta) * z


def annealed_lora(
    x: Tensor,  # [..., in]
    lora_a: Tensor,  # [r, in]
    lora_b: Tensor,  # [out, r]
    *,
    beta: Tensor,  # []
    scaling: float,
    activation: str,
    placement: str,
) -> Tensor:  # [..., out]
    """The adapter's share of the output, scaling * phi?(B phi?(A phi?(x))), in x's dtype.

    A and B may be of another dtype (fp32 beside bf16 activations is the normal case): they are cast to x's
    for the products, never x to theirs; the casts are differentiable, so the gradients arrive in the dtypes
    of A and B. The scaling is outside of every activation. Raises ValueError for an unknown placement or
    activation.
    """
    h = x
    for stage in canonical_placement(placement).split("-"):
        if stage == "s":
            h = annealed_activation(h, beta, activation)
        else:
            h = F.linear(h, (lora_a if stage == "A" else lora_b).to(x.dtype))  # [..., r], then [..., out]
    return scaling * h


def afa_lora_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    lora_a: Tensor,  # [r, in]
    lora_b: Tensor,  # [out, r]
    *,
    beta: Tensor,  # []
    scaling: float,
    activation: str,
) -> Tensor:  # [..., out]
    """A linear layer with its annealed adapter, x W^T + bias + scaling * phi(x A^T) B^T, in x's dtype.

    This is the placement A-s-B, the one that is worth fusing: phi acts on r values a token. x, weight and
    bias share one dtype; A and B may have another (see `annealed_lora`). Differentiable in everything but
    beta.
    """
    base = F.linear(x, weight, bias)
    return base + annealed_lora(x, lora_a, lora_b, beta=beta, scaling=scaling, activation=activation, placement="A-s-B")
