"""The Triton kernels as custom operators, and the one torch.autograd.Function around them.

Operators with fake implementations are what lets torch.compile keep its graph whole: it knows their shapes and
never looks inside. The Function is traced through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from afa_kernels import launch


@torch.library.custom_op("afa_kernels::forward", mutates_args=())
def forward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    beta: Tensor,
    scaling: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """See `launch.forward`: y [tokens, out] and z [tokens, rank]."""
    # The dtypes are settled: autocast must not change them in here. Triton launches on the current device.
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        return launch.forward(x, weight, bias, a, b, beta, scaling, activation)


@forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0], dtype=torch.float32)


@torch.library.custom_op("afa_kernels::backward", mutates_args=())
def backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    z: Tensor,
    beta: Tensor,
    scaling: float,
    activation: str,
    wanted: list[bool],
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `launch.backward`: dx, dA, dB; an empty tensor stands for a gradient that is not wanted."""
    want_x, want_a, want_b = wanted
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        grads = launch.backward(
            dy, x, weight, a, b, z, beta, scaling, activation,
            wanted=(want_x, want_a, want_b), dtypes=(a_dtype, b_dtype),
        )  # fmt: skip
    dx, da, db = (x.new_empty(0) if grad is None else grad for grad in grads)
    return dx, da, db


@backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, wanted, a_dtype, b_dtype = rest
    return (
        x.new_empty(x.shape if wanted[0] else (0,)),
        a.new_empty(a.shape, dtype=a_dtype) if wanted[1] else x.new_empty(0),
        b.new_empty(b.shape, dtype=b_dtype) if wanted[2] else x.new_empty(0),
    )


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the Triton kernels of afa_lora_linear have no second derivative (double backward): set "
        "AFA_KERNELS=reference, whose plain PyTorch has one"
    )


backward_op.register_autograd(_refuse_double_backward)


class AfaLoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling * phi(x A^T) B^T on matrices, with gradients of x, A and B only.

    Kept for the backward: x, W, A and B as the kernels take them, and z [tokens, rank]; nothing of width out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [tokens, in]
        weight: Tensor,  # [out, in]
        bias: Tensor | None,  # [out]
        lora_a: Tensor,  # [rank, in]
        lora_b: Tensor,  # [out, rank]
        beta: Tensor,  # []
        scaling: float,
        activation: str,
    ) -> Tensor:  # [tokens, out]
        dtype = launch.operand_dtype(x)
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        y, z = forward_op(x, weight, bias, a, b, beta, scaling, activation)
        ctx.save_for_backward(x, weight, a, b, z, beta)
        ctx.scaling, ctx.activation = scaling, activation
        ctx.dtypes = lora_a.dtype, lora_b.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, z, beta = ctx.saved_tensors
        need_x, _, _, need_a, need_b, *_ = ctx.needs_input_grad
        wanted = [need_x, need_a, need_b]
        grads = backward_op(dy, x, weight, a, b, z, beta, ctx.scaling, ctx.activation, wanted, *ctx.dtypes)
        dx, da, db = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return dx, None, None, da, db, None, None, None
