"""AFA-LoRA in plain PyTorch, for any floating dtype.

    y = W0 x + s * B phi(A x)        phi(z) = beta*sigma(z) + (1-beta)*z

Source of the formula: AFA-LoRA, arXiv 2512.22455. Every sigma of a placement is the same annealed phi, so
each placement is the plain product B A x at beta = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,  # the exact, erf form
    "relu": F.relu,
    "tanh": torch.tanh,
}


class Placement(NamedTuple):
    """The places of phi in the chain x -> A -> B."""

    before_a: bool
    between: bool
    after_b: bool


PLACEMENTS: dict[str, Placement] = {
    "A-s-B": Placement(before_a=False, between=True, after_b=False),
    "s-A-B": Placement(before_a=True, between=False, after_b=False),
    "s-A-B-s": Placement(before_a=True, between=False, after_b=True),
    "s-A-s-B": Placement(before_a=True, between=True, after_b=False),
    "s-A-s-B-s": Placement(before_a=True, between=True, after_b=True),
}


def canonical_placement(name: str) -> str:
    """The placement's key in PLACEMENTS; the glyph σ may stand for s. ValueError for an unknown one."""
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
    where = PLACEMENTS[canonical_placement(placement)]
    h = annealed_activation(x, beta, activation) if where.before_a else x
    h = F.linear(h, lora_a.to(x.dtype))  # [..., r]
    if where.between:
        h = annealed_activation(h, beta, activation)
    h = F.linear(h, lora_b.to(x.dtype))  # [..., out]
    if where.after_b:
        h = annealed_activation(h, beta, activation)
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
