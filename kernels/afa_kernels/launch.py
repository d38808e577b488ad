"""Shapes, strides and blocks: what stands between tensors and the Triton kernels.

`forward` and `backward` are whole passes of the layer on matrices. The large product of each takes one of two
ways, whichever `tuning` measured as the faster for its shape: "fused" (one Triton kernel, everything written once)
or "update" (cuBLAS for the frozen product, then the rank-r term added in place, which reads and writes the
result once more but may win where cuBLAS is far ahead).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from afa_kernels import triton_kernels as kernels
from afa_kernels import tuning
from afa_kernels.tuning import Blocks, Candidate

GROUP_TOKENS = 8  # row blocks that share columns of the frozen weight in L2
# Whether the kernels below are Triton's interpreter's, which takes CPU tensors: TRITON_INTERPRET=1 at import.
INTERPRETED = not isinstance(kernels.down_kernel, triton.JITFunction)


class Way(NamedTuple):
    """One way to a large product: "fused" or "update", and the blocks of its Triton kernel."""

    variant: str
    blocks: Blocks


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype of everything that a dot takes beside x: x's own, since tensor cores mix none.

    fp32 when interpreting, where `_dot` casts up anyway.
    """
    return torch.float32 if INTERPRETED else x.dtype


def forward(
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
    z, h = _down(x, a, beta, activation)
    return _product(x, weight.t(), bias, h, b.t(), scaling), z


def backward(
    dy: Tensor,  # [tokens, out]
    x: Tensor,  # [tokens, in]
    weight: Tensor,  # [out, in]
    a: Tensor,  # [rank, in]
    b: Tensor,  # [out, rank]
    z: Tensor,  # [tokens, rank]
    beta: Tensor,  # []
    scaling: float,
    activation: str,
    *,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [tokens, in] in x's dtype, dA [rank, in] and dB [out, rank] in `dtypes`; None for those not `wanted`."""
    want_x, want_a, want_b = wanted
    dx = da = db = None
    if want_b:
        db = dy.new_empty(b.shape, dtype=dtypes[1])
        _outer(dy, z, beta, scaling, activation, into=db)
    if want_x or want_a:
        dz = _dz(dy, b, z, beta, scaling, activation)
        if want_x:
            dx = _product(dy, weight, None, dz, a, 1.0)
        if want_a:
            da = dy.new_empty(a.shape, dtype=dtypes[0])
            _outer(x, dz, beta, 1.0, "identity", into=da.t())
    return dx, da, db


def _down(x: Tensor, a: Tensor, beta: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """z = x A^T in fp32, and h = phi(z) as an operand of dots; [tokens, rank] each."""
    (tokens, width), rank = x.shape, a.shape[0]
    z = x.new_empty(tokens, rank, dtype=torch.float32)
    h = x.new_empty(tokens, rank, dtype=operand_dtype(x))

    def run(blocks: Blocks) -> None:
        _launch(
            kernels.down_kernel, (triton.cdiv(tokens, blocks.tokens),), blocks, x, a, beta, z, h, tokens, width, rank,
            *x.stride(), *a.stride(), **_thin_options(blocks, x, rank), ACTIVATION=activation,
        )  # fmt: skip

    if tokens:
        run(_thin_blocks("down", x, rank, run))
    return z, h


def _dz(dy: Tensor, b: Tensor, z: Tensor, beta: Tensor, scaling: float, activation: str) -> Tensor:
    """The gradient at z, scaling * (dy B) * phi'(z), as an operand of dots, [tokens, rank]."""
    (tokens, width), rank = dy.shape, b.shape[1]
    dz = dy.new_empty(tokens, rank, dtype=operand_dtype(dy))

    def run(blocks: Blocks) -> None:
        _launch(
            kernels.dz_kernel, (triton.cdiv(tokens, blocks.tokens),), blocks, dy, b, z, beta, dz, tokens, width, rank,
            scaling, *dy.stride(), *b.stride(), **_thin_options(blocks, dy, rank), ACTIVATION=activation,
        )  # fmt: skip

    if tokens:
        run(_thin_blocks("dz", dy, rank, run))
    return dz


def _product(p: Tensor, v: Tensor, bias: Tensor | None, h: Tensor, f: Tensor, scaling: float) -> Tensor:
    """p v + bias + scaling * h f: p [tokens, width], v [width, columns], h [tokens, rank], f [rank, columns]."""
    (tokens, width), columns, rank = p.shape, v.shape[1], h.shape[1]
    bias = None if bias is None else bias.contiguous()

    def run(way: Way) -> Tensor:
        in_place = way.variant == "update"
        # v.t() is the frozen weight, or its transpose: cuBLAS takes both as they lie
        out = F.linear(p, v.t(), bias) if in_place else p.new_empty(tokens, columns)
        blocks = way.blocks
        grid = (triton.cdiv(tokens, blocks.tokens) * triton.cdiv(columns, blocks.columns),)
        _launch(
            kernels.linear_kernel, grid, blocks, p, v, bias, h, f, out, tokens, columns, width, rank, scaling,
            *p.stride(), *v.stride(), *f.stride(), **_linear_options(blocks, width, rank), HAS_BIAS=bias is not None,
            IN_PLACE=in_place,
        )  # fmt: skip
        return out

    if not tokens:
        return p.new_empty(0, columns)
    only = tuning.wanted_variant()
    tables = {"fused": tuning.LINEAR, "update": tuning.UPDATE}
    ways = [Way(name, b) for name in tables if only in (None, name) for b in _blocks(tables[name], "linear", p)]
    key = (p.dtype, only, *tuning.shape_class(tokens, columns, width, rank), p.stride(1) == 1, v.stride(0) == 1)
    return run(_fastest("product", key, ways, run))


def _outer(p: Tensor, q: Tensor, beta: Tensor, scaling: float, activation: str, *, into: Tensor) -> None:
    """into [columns, rank] (any strides) = scaling * p^T phi(q): p [tokens, columns], q [tokens, rank]."""
    (tokens, columns), rank = p.shape, q.shape[1]

    def run(blocks: Blocks) -> None:
        splits, share = _splits(tokens, columns, blocks, p.device)
        partial = into if splits == 1 else p.new_empty(splits, columns, rank, dtype=torch.float32)
        strides = (0, *into.stride()) if splits == 1 else partial.stride()
        block_r = tuning.rank_block(rank, 128)
        grid = (triton.cdiv(columns, blocks.columns), splits, triton.cdiv(rank, block_r))
        _launch(
            kernels.outer_kernel, grid, blocks, p, q, beta, partial, tokens, columns, rank, scaling, share,
            *p.stride(), *strides, ACTIVATION=activation, BLOCK_T=blocks.tokens, BLOCK_N=blocks.columns,
            BLOCK_R=block_r,
        )  # fmt: skip
        if splits > 1:
            into.copy_(partial.sum(0))

    if not tokens:
        into.zero_()
        return
    key = (p.dtype, activation == "identity", *tuning.shape_class(tokens, columns, 0, rank), p.stride(1) == 1)
    run(_fastest("outer", key, _blocks(tuning.OUTER, "outer", p), run))


def _splits(tokens: int, columns: int, blocks: Blocks, device: torch.device) -> tuple[int, int]:
    """Into how many parts the sum over tokens is cut, and tokens a part: enough programs for every processor."""
    wanted = math.ceil(4 * _processors(device) / triton.cdiv(columns, blocks.columns))
    share = triton.cdiv(triton.cdiv(tokens, min(wanted, 64)), blocks.tokens) * blocks.tokens
    return triton.cdiv(tokens, share), share


# ---- options of a launch ----


def _launch(kernel: Any, grid: tuple[int, ...], blocks: Blocks, *tensors_and_sizes: Any, **options: Any) -> None:
    compiler = {} if INTERPRETED else {"num_warps": blocks.warps, "num_stages": blocks.stages}
    kernel[grid](*tensors_and_sizes, **options, INTERPRETED=INTERPRETED, **compiler)


def _thin_blocks(name: str, p: Tensor, rank: int, run: Callable[[Blocks], None]) -> Blocks:
    candidates = [tuning.INTERPRETED["thin"]] if INTERPRETED else tuning.thin_blocks(p.element_size(), rank)
    key = (p.dtype, *tuning.shape_class(p.shape[0], 0, p.shape[1], rank), p.stride(1) == 1)
    return _fastest(name, key, candidates, run)


def _thin_options(blocks: Blocks, p: Tensor, rank: int) -> dict[str, Any]:
    return {
        "BLOCK_T": blocks.tokens,
        "BLOCK_K": blocks.k,
        "BLOCK_R": tuning.rank_block(rank, 256),
        "EVEN_K": p.shape[1] % blocks.k == 0,
    }


def _linear_options(blocks: Blocks, width: int, rank: int) -> dict[str, Any]:
    return {
        "BLOCK_T": blocks.tokens,
        "BLOCK_N": blocks.columns,
        "BLOCK_K": blocks.k,
        "BLOCK_R": tuning.rank_block(rank, 64),
        "GROUP_T": GROUP_TOKENS,
        "EVEN_K": width % blocks.k == 0,
    }


def _blocks(table: dict[int, tuple[Blocks, ...]], interpreted: str, p: Tensor) -> list[Blocks]:
    """The table's blocks for p's dtype that p's device can hold."""
    if INTERPRETED:
        return [tuning.INTERPRETED[interpreted]]
    return [blocks for blocks in table[p.element_size()] if blocks.arch <= _arch(p.device)]


def _fastest(name: str, key: tuple, candidates: list[Candidate], run: Callable[[Candidate], object]) -> Candidate:
    return candidates[0] if INTERPRETED else tuning.choose(name, key, candidates, run)


@functools.cache
def _arch(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
