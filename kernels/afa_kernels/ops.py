"""The annealed LoRA layer as one function, and the choice of the implementation that computes it.

    AFA_KERNELS unset or auto   Triton for CUDA tensors, and for any tensors with TRITON_INTERPRET=1; else PyTorch
    AFA_KERNELS=reference       PyTorch
    AFA_KERNELS=triton          Triton, or a KernelsError that says why it can't be

A layer that the kernels do not cover takes the PyTorch path, which the log says once. `triton_kernels` is imported
where it is used only: a machine without Triton never comes there.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afa_kernels import reference
from afa_kernels.reference import ACTIVATIONS

logger = logging.getLogger("afa_kernels")

VARIABLE = "AFA_KERNELS"
CHOICES = ("auto", "reference", "triton")
MAX_RANK = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class KernelsError(RuntimeError):
    """An AFA_KERNELS that is unknown or can't be followed; the text says why, and what to do."""


def afa_lora_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    lora_a: Tensor,  # [rank, in]
    lora_b: Tensor,  # [out, rank]
    *,
    beta: Tensor,  # []
    scaling: float,
    activation: str,
) -> Tensor:  # [..., out]
    """A linear layer with its annealed adapter: x W^T + bias + scaling * phi(x A^T) B^T, in x's dtype.

    phi(z) = beta * sigma(z) + (1 - beta) * z with sigma one of silu, gelu (erf), relu, tanh (AFA-LoRA, arXiv
    2512.22455). x, weight and bias share a dtype; A and B may have another and get their gradients in it. Under
    autocast everything is computed, and returned, in autocast's dtype. Any strides; x may hold no token at all.
    `beta` is a 0-dim tensor on x's device, read where it lies: a new value costs neither a synchronisation nor a
    compilation. It gets no gradient; the weight and the bias get theirs in plain PyTorch only.

    Raises ValueError for an unknown activation and for shapes or devices that don't fit each other, TypeError
    for a beta that is no tensor, and KernelsError where the variable AFA_KERNELS requests the impossible.
    """
    _check(x, weight, bias, lora_a, lora_b, beta, activation)
    beta, device_type = beta.detach(), x.device.type
    tensors = (x, weight) if bias is None else (x, weight, bias)
    casts = torch.is_autocast_enabled(device_type) and x.dtype != torch.float64
    dtypes = tuple(torch.get_autocast_dtype(device_type) if casts else t.dtype for t in tensors)
    trains_base = torch.is_grad_enabled() and any(t.requires_grad for t in tensors[1:])
    if _takes_triton(dtypes, (lora_a.dtype, lora_b.dtype), lora_a.shape[0], trains_base, device_type):
        x, weight, *rest = (t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True))
        bias = rest[0] if rest else None
        flat = x.reshape(-1, x.shape[-1])  # [tokens, in]
        y = AfaLoraLinear.apply(flat, weight, bias, lora_a, lora_b, beta, float(scaling), activation)
        return y.reshape(*x.shape[:-1], weight.shape[0])
    return reference.afa_lora_linear(x, weight, bias, lora_a, lora_b, beta=beta, scaling=scaling, activation=activation)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, beta: Tensor, activation: str
) -> None:
    """Refuse shapes and devices that don't fit: the kernels compute addresses from them."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    if not isinstance(beta, Tensor):
        raise TypeError(f"beta is {beta!r}: give a 0-dim tensor on x's device, so that a new value compiles nothing")
    if beta.dim() or beta.device != x.device:
        raise ValueError(f"beta has shape {tuple(beta.shape)} on {beta.device}: give a 0-dim tensor on {x.device}")
    if x.dim() == 0 or weight.dim() != 2 or lora_a.dim() != 2 or lora_b.dim() != 2:
        raise ValueError("x needs at least one dimension, and weight, lora_a and lora_b need two")
    (out, width), rank = weight.shape, lora_a.shape[0]
    fits = x.shape[-1] == width and lora_a.shape[1] == width and lora_b.shape == (out, rank)
    if not fits or (bias is not None and bias.shape != (out,)):
        names = {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in names.items() if t is not None)
        raise ValueError(f"the shapes don't fit x W^T + bias + s phi(x A^T) B^T: {shapes}")
    if any(t is not None and t.device != x.device for t in (weight, bias, lora_a, lora_b)):
        raise ValueError(f"x is on {x.device}: put weight, bias, lora_a and lora_b there too")


# ---- the choice, which torch.compile makes once, while it traces ----


@torch.compiler.assume_constant_result
def _takes_triton(
    dtypes: Sequence[torch.dtype], lora_dtypes: Sequence[torch.dtype], rank: int, trains_base: bool, device_type: str
) -> bool:
    """True where AFA_KERNELS and the device leave the choice to the layer, and the kernels can compute it.

    Where only the layer is in the way, the log gives the reason; a KernelsError does where AFA_KERNELS=triton.
    """
    choice = _choice()
    reason = None if choice == "reference" else _no_triton(device_type)
    if choice == "triton" and reason is not None:
        raise _impossible(reason)
    if choice == "reference" or reason is not None:
        return False
    if rank > MAX_RANK:
        reason = f"rank {rank} is above {MAX_RANK}"
    elif unknown := [dtype for dtype in (*dtypes, *lora_dtypes) if dtype not in DTYPES]:
        reason = f"{unknown[0]} is not one of fp32, fp16 and bf16"
    elif len(set(dtypes)) > 1:
        reason = f"x, weight and bias have different dtypes ({', '.join(map(str, dtypes))})"
    elif trains_base:
        reason = "weight or bias wants a gradient, which the kernels don't compute"
    if reason is not None:
        fall_back(reason, device_type)
    return reason is None


@torch.compiler.assume_constant_result
def fall_back(reason: str, device_type: str) -> None:
    """Log once that a layer can't use the kernels for `reason`, on tensors of this device.

    `reason` is a clause, such as "LoRA dropout is 0.1". Silent where PyTorch would be used anyway. Raises
    KernelsError where AFA_KERNELS=triton.
    """
    choice = _choice()
    if choice == "triton":
        raise _impossible(reason)
    if choice == "auto" and _no_triton(device_type) is None:
        _log_once(reason)


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("annealed LoRA layers take plain PyTorch instead of the Triton kernels: %s", reason)


def _choice() -> str:
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise KernelsError(f"{VARIABLE} is {choice!r}: set it to one of {', '.join(CHOICES)}, or not at all")
    return choice


def _impossible(reason: str) -> KernelsError:
    return KernelsError(f"AFA_KERNELS=triton, but {reason}: set AFA_KERNELS=auto, or change that")


def _no_triton(device_type: str) -> str | None:
    """The reason why Triton can't take tensors of this device; None where it can."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET", "0").lower() in ("", "0", "false", "off", "no"):
        return f"x is on {device_type!r} and not on a CUDA device, and TRITON_INTERPRET is not 1"
    interpreted = _interpreted()
    if isinstance(interpreted, str):
        return interpreted
    if device_type != "cuda" and not interpreted:
        return f"x is on {device_type!r} and Triton was imported before TRITON_INTERPRET=1 was set"
    return None


@functools.cache
def _interpreted() -> bool | str:
    """True where the kernels are interpreted; the reason, where Triton doesn't import."""
    try:
        return bool(importlib.import_module("afa_kernels.triton_kernels").INTERPRETED)
    except ImportError as error:
        return f"Triton can't be imported ({error})"


# ---- autograd ----


class AfaLoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling * phi(x A^T) B^T on matrices, with gradients of x, A and B only.

    Kept for the backward: x, W, A and B as the kernels take them, and z [tokens, rank]; nothing of width out.
    torch.compile traces through this, and sees the two custom operators as whole nodes of its graph.
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
        from afa_kernels.triton_kernels import operand_dtype

        a, b = lora_a.to(operand_dtype(x)), lora_b.to(operand_dtype(x))
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


@torch.library.custom_op("afa_kernels::forward", mutates_args=())
def forward_op(
    x: Tensor,  # [tokens, in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    a: Tensor,  # [rank, in]
    b: Tensor,  # [out, rank]
    beta: Tensor,  # []
    scaling: float,
    activation: str,
) -> tuple[Tensor, Tensor]:  # [tokens, out], [tokens, rank]
    """y in x's dtype, which weight and bias share, and z = x A^T in fp32; A and B have `operand_dtype(x)`.

    `activation` may also be "identity", which leaves the activation out. Any strides; tokens may be 0.
    """
    from afa_kernels import triton_kernels as kernels

    # The dtypes are settled: autocast must not change them in here. Triton launches on the current device.
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        z, h = kernels.down(x, a, beta, activation)
        return kernels.product(x, weight.t(), bias, h, b.t(), scaling), z


@forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0], dtype=torch.float32)


@torch.library.custom_op("afa_kernels::backward", mutates_args=())
def backward_op(
    dy: Tensor,  # [tokens, out]
    x: Tensor,  # [tokens, in]
    weight: Tensor,  # [out, in]
    a: Tensor,  # [rank, in]
    b: Tensor,  # [out, rank]
    z: Tensor,  # [tokens, rank]
    beta: Tensor,  # []
    scaling: float,
    activation: str,
    wanted: list[bool],
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [tokens, in] in x's dtype, dA [rank, in], dB [out, rank]; an empty tensor for each that is not `wanted`."""
    from afa_kernels import triton_kernels as kernels

    want_x, want_a, want_b = wanted
    dx, da, db = (x.new_empty(0) for _ in wanted)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        if want_b:
            db = dy.new_empty(b.shape, dtype=b_dtype)
            kernels.outer(dy, z, beta, scaling, activation, into=db)
        if want_x or want_a:
            dz = kernels.dz(dy, b, z, beta, scaling, activation)
            if want_x:
                dx = kernels.product(dy, weight, None, dz, a, 1.0)
            if want_a:
                da = dy.new_empty(a.shape, dtype=a_dtype)
                kernels.outer(x, dz, beta, 1.0, "identity", into=da.t())
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
