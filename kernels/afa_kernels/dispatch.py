"""Which implementation runs: the Triton kernels, or plain PyTorch.

    AFA_KERNELS unset or auto   Triton for CUDA tensors, and for any tensors with TRITON_INTERPRET=1; else PyTorch
    AFA_KERNELS=reference       PyTorch
    AFA_KERNELS=triton          Triton, or a KernelsError that says why it can't be

What the kernels do not cover takes the PyTorch path and says so once in the log.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os

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
    """AFA_KERNELS asks for what can't be done, or for something unknown; the text says why, and what to do."""


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
    for a beta that is no tensor, and KernelsError where the variable AFA_KERNELS asks for the impossible.
    """
    _check(x, weight, bias, lora_a, lora_b, beta, activation)
    beta = beta.detach()
    if not _may_take_triton(x.device.type):  # a CPU's way: nothing more is looked at
        return reference.afa_lora_linear(
            x, weight, bias, lora_a, lora_b, beta=beta, scaling=scaling, activation=activation
        )
    tensors = (x, weight) if bias is None else (x, weight, bias)
    casts = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtypes = tuple(torch.get_autocast_dtype(x.device.type) if casts else t.dtype for t in tensors)
    trains_base = torch.is_grad_enabled() and any(t.requires_grad for t in tensors[1:])
    if not _covers(dtypes, (lora_a.dtype, lora_b.dtype), lora_a.shape[0], trains_base):
        return reference.afa_lora_linear(
            x, weight, bias, lora_a, lora_b, beta=beta, scaling=scaling, activation=activation
        )

    from afa_kernels.autograd import AfaLoraLinear  # here, because a machine without Triton never comes here

    x, weight, *rest = (t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True))
    flat = x.reshape(-1, x.shape[-1])  # [tokens, in]
    y = AfaLoraLinear.apply(flat, weight, rest[0] if rest else None, lora_a, lora_b, beta, float(scaling), activation)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@torch.compiler.assume_constant_result
def fall_back(reason: str, device_type: str) -> None:
    """For a layer that can't use the kernels for `reason`, on tensors of this device: says so once in the log.

    `reason` is a clause, such as "LoRA dropout is 0.1". Says nothing where PyTorch would be used anyway. Raises
    KernelsError where AFA_KERNELS=triton.
    """
    choice = _choice()
    if choice == "triton":
        raise _impossible(reason)
    if choice == "auto" and _no_triton(device_type) is None:
        _say_once(reason)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, beta: Tensor, activation: str
) -> None:
    """The kernels compute addresses from these shapes, so nothing that doesn't fit may pass."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    if not isinstance(beta, Tensor):
        raise TypeError(f"beta is {beta!r}: give a 0-dim tensor on x's device, so that a new value compiles nothing")
    if beta.dim() or beta.device != x.device:
        raise ValueError(f"beta has shape {tuple(beta.shape)} on {beta.device}: give a 0-dim tensor on {x.device}")
    if x.dim() == 0 or weight.dim() != 2 or lora_a.dim() != 2 or lora_b.dim() != 2:
        raise ValueError("x needs at least one dimension, and weight, lora_a and lora_b need two")
    out, width = weight.shape
    rank = lora_a.shape[0]
    fits = x.shape[-1] == width and lora_a.shape[1] == width and lora_b.shape[0] == out and lora_b.shape[1] == rank
    if not fits or (bias is not None and (bias.dim() != 1 or bias.shape[0] != out)):
        names = {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in names.items() if t is not None)
        raise ValueError(f"the shapes don't fit x W^T + bias + s phi(x A^T) B^T: {shapes}")
    if any(t is not None and t.device != x.device for t in (weight, bias, lora_a, lora_b)):
        raise ValueError(f"x is on {x.device}: put weight, bias, lora_a and lora_b there too")


# The two questions below are asked once under torch.compile, while it traces.


@torch.compiler.assume_constant_result
def _may_take_triton(device_type: str) -> bool:
    """Whether AFA_KERNELS and the device leave it to what the layer is."""
    choice = _choice()
    if choice == "reference":
        return False
    reason = _no_triton(device_type)
    if reason is not None and choice == "triton":
        raise _impossible(reason)
    return reason is None


@torch.compiler.assume_constant_result
def _covers(
    dtypes: tuple[torch.dtype, ...], lora_dtypes: tuple[torch.dtype, ...], rank: int, trains_base: bool
) -> bool:
    """Whether the kernels can do this layer; says so once in the log if not."""
    reason = _not_covered(dtypes, lora_dtypes, rank, trains_base)
    if reason is not None and _choice() == "triton":
        raise _impossible(reason)
    if reason is not None:
        _say_once(reason)
    return reason is None


def _impossible(reason: str) -> KernelsError:
    return KernelsError(f"AFA_KERNELS=triton, but {reason}: set AFA_KERNELS=auto, or change that")


def _choice() -> str:
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise KernelsError(f"{VARIABLE} is {choice!r}: set it to one of {', '.join(CHOICES)}, or not at all")
    return choice


def _no_triton(device_type: str) -> str | None:
    """Why Triton can't take tensors of this device; None where it can."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET", "0").lower() in ("", "0", "false", "off", "no"):
        return f"x is on {device_type!r} and not on a CUDA device, and TRITON_INTERPRET is not 1"
    launch = _launch()
    if isinstance(launch, str):
        return launch
    if device_type != "cuda" and not launch:
        return f"x is on {device_type!r} and Triton was imported before TRITON_INTERPRET=1 was set"
    return None


@functools.cache
def _launch() -> bool | str:
    """Whether the kernels are interpreted; why there are none, where Triton doesn't import."""
    try:
        return bool(importlib.import_module("afa_kernels.launch").INTERPRETED)
    except ImportError as error:
        return f"Triton can't be imported ({error})"


def _not_covered(
    dtypes: tuple[torch.dtype, ...], lora_dtypes: tuple[torch.dtype, ...], rank: int, trains_base: bool
) -> str | None:
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}"
    for dtype in (*dtypes, *lora_dtypes):
        if dtype not in DTYPES:
            return f"{dtype} is not one of fp32, fp16 and bf16"
    if len(set(dtypes)) > 1:
        return f"x, weight and bias have different dtypes ({', '.join(map(str, dtypes))})"
    if trains_base:
        return "weight or bias wants a gradient, which the kernels don't compute"
    return None


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("annealed LoRA layers take plain PyTorch instead of the Triton kernels: %s", reason)
