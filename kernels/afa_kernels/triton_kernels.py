"""The four Triton kernels of an annealed LoRA layer, forward and backward.

    down_kernel    z = x A^T, h = phi(z)                       reads x once
    linear_kernel  out = s * h F + p V (+ bias)                the large product; y, and dx, are written once
    dz_kernel      dz = s * (dy B) * phi'(z)                   reads dy once
    outer_kernel   dA = dz^T x and dB = s * dy^T phi(z)        read x, and dy, once

The matrices of width r (z, h, dz) are small beside those of width in and out, so only the latter count as
traffic; README.md in the folder above has the sums. The functions at the end launch them: `down`, `dz`, `product`
and `outer` take tensors of any strides, and let `tuning` choose the blocks.

Dots take operands of x's dtype (the caller casts A and B, and gives h and dz that dtype) and accumulate in fp32;
z, phi and every scaling are fp32.

Rows past the end of a matrix wrap around instead of being masked (they are computed and not stored), because
an unmasked load pipelines better; the axis that a dot sums over is masked wherever it ends inside a block.
Numbers of tokens are not specialised, so that a batch of another size is no new compilation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from afa_kernels import tuning
from afa_kernels.tuning import Blocks

GROUP_TOKENS = 8  # row blocks that share columns of the frozen weight in L2


@triton.jit
def _cast(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """`value` rounded to `dtype`, to the nearest even."""
    value = value.to(tl.float32)
    if INTERPRETED and dtype == tl.bfloat16:
        # Triton's interpreter cuts the low bits off instead of rounding, an error of up to 0.8 % that always
        # goes one way: round here, so that the cut is exact. NaN and infinity stay as they are.
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(tl.abs(value) < float("inf"), rounded.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a b, in fp32."""
    if INTERPRETED:
        # The interpreter keeps bf16 as raw 16-bit integers, and its dot would multiply those: silent garbage.
        # Products of bf16 values are exact in fp32; what real bf16 dots give has to be checked on a card.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")  # fp32 stays fp32: tf32 would keep 10 bits of it


@triton.jit
def _tanh(z):
    # A quotient of polynomials (the continued fraction of tanh, cut after z^2/9) where 1 - 2/(e^2z + 1) would
    # cancel; its relative error at 0.5 is below 1e-9.
    square = z * z
    small = z * (945 + square * (105 + square)) / (945 + square * (420 + square * 15))
    return tl.where(tl.abs(z) < 0.5, small, 1 - 2 / (tl.exp(2 * z) + 1))


@triton.jit
def _phi(z, beta, ACTIVATION: tl.constexpr):
    """beta * sigma(z) + (1 - beta) * z in fp32; z itself where the activation is left out."""
    if ACTIVATION == "identity":
        return z
    if ACTIVATION == "silu":
        sigma = z / (1 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        sigma = z * 0.5 * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "relu":
        sigma = tl.where(z < 0, 0.0, z)  # a NaN is not below 0 and passes
    else:
        tl.static_assert(ACTIVATION == "tanh")
        sigma = _tanh(z)
    return beta * sigma + (1 - beta) * z


@triton.jit
def _phi_backward(dh, z, beta, ACTIVATION: tl.constexpr):
    """dh * phi'(z) in fp32."""
    if ACTIVATION == "identity":
        return dh
    curved = dh * beta  # the gradient at sigma(z)
    if ACTIVATION == "silu":
        logistic = 1 / (1 + tl.exp(-z))
        curved *= logistic * (1 + z * (1 - logistic))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        curved *= 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "relu":
        curved = tl.where(z <= 0, 0.0, curved)  # no product with 0: torch gives 0 for an infinite dh too
    else:
        tl.static_assert(ACTIVATION == "tanh")
        value = _tanh(z)
        curved *= 1 - value * value
    return curved + dh * (1 - beta)


@triton.jit
def _add_product(
    acc, p_ptrs, q_ptrs, p_step, q_step, width,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc + p q in fp32, over the `width` columns of p and rows of q.

    p_ptrs and q_ptrs point to the first BLOCK_K of them; a step of BLOCK_K moves them on by p_step and q_step.
    """
    ks = tl.arange(0, BLOCK_K)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            p = tl.load(p_ptrs)
            q = tl.load(q_ptrs)
        else:
            p = tl.load(p_ptrs, mask=(ks < width - start)[None, :], other=0.0)
            q = tl.load(q_ptrs, mask=(ks < width - start)[:, None], other=0.0)
        acc = _dot(p, q, acc, INTERPRETED)
        p_ptrs += p_step
        q_ptrs += q_step
    return acc


@triton.jit
def _times_factor(
    p_ptr, f_ptr, rows, width, rank, stride_pt, stride_pk, stride_fk, stride_fr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rows of p [tokens, width] times the thin f [width, rank], as an fp32 block [BLOCK_T, BLOCK_R]."""
    ranks = tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    p_ptrs = p_ptr + rows.to(tl.int64)[:, None] * stride_pt + ks[None, :] * stride_pk
    f_ptrs = f_ptr + ks[:, None] * stride_fk + (ranks % rank)[None, :] * stride_fr
    acc = tl.full((BLOCK_T, BLOCK_R), 0.0, tl.float32)
    return _add_product(
        acc, p_ptrs, f_ptrs, BLOCK_K * stride_pk, BLOCK_K * stride_fk, width, BLOCK_K, EVEN_K, INTERPRETED
    )


@triton.jit(do_not_specialize=["tokens"])
def down_kernel(
    x_ptr, a_ptr, beta_ptr, z_ptr, h_ptr, tokens, width, rank, stride_xt, stride_xk, stride_ar, stride_ak,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """z = x A^T and h = phi(z): x [tokens, width], A [rank, width], z (fp32) and h [tokens, rank] contiguous.

    One program makes BLOCK_T rows in full rank, so that x is read once. beta is read from memory: a new value
    is no new compilation.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    z = _times_factor(
        x_ptr, a_ptr, rows % tokens, width, rank, stride_xt, stride_xk, stride_ak, stride_ar,
        BLOCK_T, BLOCK_K, BLOCK_R, EVEN_K, INTERPRETED,
    )  # fmt: skip
    h = _phi(z, tl.load(beta_ptr).to(tl.float32), ACTIVATION)
    ranks = tl.arange(0, BLOCK_R)
    offsets = rows.to(tl.int64)[:, None] * rank + ranks[None, :]
    mask = (rows < tokens)[:, None] & (ranks < rank)[None, :]
    tl.store(z_ptr + offsets, z, mask=mask)
    tl.store(h_ptr + offsets, _cast(h, h_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def dz_kernel(
    dy_ptr, b_ptr, z_ptr, beta_ptr, dz_ptr, tokens, width, rank, scaling, stride_dt, stride_do, stride_bo, stride_br,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dz = scaling * (dy B) * phi'(z): dy [tokens, width], B [width, rank], z and dz [tokens, rank] contiguous."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    dh = scaling * _times_factor(
        dy_ptr, b_ptr, rows % tokens, width, rank, stride_dt, stride_do, stride_bo, stride_br,
        BLOCK_T, BLOCK_K, BLOCK_R, EVEN_K, INTERPRETED,
    )  # fmt: skip
    ranks = tl.arange(0, BLOCK_R)
    offsets = rows.to(tl.int64)[:, None] * rank + ranks[None, :]
    mask = (rows < tokens)[:, None] & (ranks < rank)[None, :]
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0)
    dz = _phi_backward(dh, z, tl.load(beta_ptr).to(tl.float32), ACTIVATION)
    tl.store(dz_ptr + offsets, _cast(dz, dz_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def linear_kernel(
    p_ptr, v_ptr, bias_ptr, h_ptr, f_ptr, out_ptr, tokens, columns, width, rank, scaling,
    stride_pt, stride_pk, stride_vk, stride_vn, stride_fr, stride_fn,
    HAS_BIAS: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_T: tl.constexpr, EVEN_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = scaling * h f + p v (+ bias); with IN_PLACE, out += scaling * h f (p, v and bias are not read).

    p [tokens, width], v [width, columns], bias [columns], h [tokens, rank] contiguous, f [rank, columns], out
    [tokens, columns] contiguous. The forward has p = x, v = W^T, f = B^T; dx has p = dy, v = W, f = A.

    The rank-r product comes first: scaled in the accumulator, it is the start of the long sum over `width`,
    which then needs no second accumulator and no product in its epilogue.
    """
    # Programs run in groups of GROUP_T row blocks, so that those in flight share columns of v in L2.
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(tokens, BLOCK_T)
    per_group = GROUP_T * tl.cdiv(columns, BLOCK_N)
    first = pid // per_group * GROUP_T
    group = min(row_blocks - first, GROUP_T)
    rows = (first + pid % per_group % group) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = pid % per_group // group * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_rows = (rows % tokens).to(tl.int64)
    safe_cols = (cols % columns).to(tl.int64)

    ranks = tl.arange(0, BLOCK_R)
    acc = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    for start in tl.range(0, rank, BLOCK_R, num_stages=1):  # one or few turns: nothing to pipeline
        r = start + ranks
        h = tl.load(h_ptr + safe_rows[:, None] * rank + r[None, :], mask=(r < rank)[None, :], other=0.0)
        f = tl.load(f_ptr + r[:, None] * stride_fr + safe_cols[None, :] * stride_fn, (r < rank)[:, None], other=0.0)
        acc = _dot(h, f, acc, INTERPRETED)
    acc *= scaling

    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * columns + cols[None, :]
    mask = (rows < tokens)[:, None] & (cols < columns)[None, :]
    if IN_PLACE:
        acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    else:
        ks = tl.arange(0, BLOCK_K)
        p_ptrs = p_ptr + safe_rows[:, None] * stride_pt + ks[None, :] * stride_pk
        v_ptrs = v_ptr + ks.to(tl.int64)[:, None] * stride_vk + safe_cols[None, :] * stride_vn
        acc = _add_product(
            acc, p_ptrs, v_ptrs, BLOCK_K * stride_pk, BLOCK_K * stride_vk, width, BLOCK_K, EVEN_K, INTERPRETED
        )
        if HAS_BIAS:
            acc += tl.load(bias_ptr + safe_cols).to(tl.float32)[None, :]
    tl.store(out_ptrs, _cast(acc, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["tokens", "tokens_per_split", "stride_os"])
def outer_kernel(
    p_ptr, q_ptr, beta_ptr, out_ptr, tokens, columns, rank, scaling, tokens_per_split,
    stride_pt, stride_pn, stride_os, stride_on, stride_or,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out[split] = scaling * p^T phi(q) over that split's tokens.

    p [tokens, columns], q [tokens, rank] contiguous, out [splits, columns, rank] by its strides. dA has p = x,
    q = dz and no activation, dB has p = dy and q = z: computing h again costs less than keeping it. The caller
    adds the splits up, in a fixed order, so that gradients are the same in every run (atomics would not be).
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = split * tokens_per_split
    last = min(first + tokens_per_split, tokens)
    beta = tl.load(beta_ptr).to(tl.float32)
    safe_cols = cols % columns
    safe_ranks = ranks % rank
    acc = tl.full((BLOCK_N, BLOCK_R), 0.0, tl.float32)
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t < last)[:, None]
        row = t.to(tl.int64)[:, None]
        p = tl.load(p_ptr + row * stride_pt + safe_cols[None, :] * stride_pn, mask=inside, other=0.0)
        q = tl.load(q_ptr + row * rank + safe_ranks[None, :], mask=inside, other=0.0)
        if ACTIVATION != "identity":
            q = _phi(q, beta, ACTIVATION)
        if not INTERPRETED:
            q = q.to(p_ptr.dtype.element_ty)
        acc = _dot(tl.trans(p), q, acc, INTERPRETED)
    out_ptrs = out_ptr + split.to(tl.int64) * stride_os + cols[:, None] * stride_on + ranks[None, :] * stride_or
    mask = (cols < columns)[:, None] & (ranks < rank)[None, :]
    tl.store(out_ptrs, _cast(acc * scaling, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)


# ---- launches: strides, grids and options ----

# True where the kernels above are Triton's interpreter's, which takes CPU tensors: TRITON_INTERPRET=1 at import.
INTERPRETED = not isinstance(down_kernel, triton.JITFunction)


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype of everything that a dot takes beside x: x's own, since tensor cores mix none.

    fp32 when interpreting, where `_dot` casts up anyway.
    """
    return torch.float32 if INTERPRETED else x.dtype


def down(x: Tensor, a: Tensor, beta: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """z = x A^T in fp32, and h = phi(z) as an operand of dots; [tokens, rank] each."""
    (tokens, width), rank = x.shape, a.shape[0]
    z = x.new_empty(tokens, rank, dtype=torch.float32)
    h = x.new_empty(tokens, rank, dtype=operand_dtype(x))
    sizes = (tokens, width, rank, *x.stride(), *a.stride())
    _launch_thin("down", down_kernel, x, rank, activation, x, a, beta, z, h, *sizes)
    return z, h


def dz(dy: Tensor, b: Tensor, z: Tensor, beta: Tensor, scaling: float, activation: str) -> Tensor:
    """The gradient at z, scaling * (dy B) * phi'(z), as an operand of dots, [tokens, rank]."""
    (tokens, width), rank = dy.shape, b.shape[1]
    out = dy.new_empty(tokens, rank, dtype=operand_dtype(dy))
    sizes = (tokens, width, rank, scaling, *dy.stride(), *b.stride())
    _launch_thin("dz", dz_kernel, dy, rank, activation, dy, b, z, beta, out, *sizes)
    return out


def _launch_thin(name: str, kernel: Any, p: Tensor, rank: int, activation: str, *arguments: Any) -> None:
    """Launch a kernel that reads rows of p [tokens, width] once and makes `rank` columns of them."""
    tokens, width = p.shape

    def run(blocks: Blocks) -> None:
        _launch(
            kernel, (triton.cdiv(tokens, blocks.tokens),), blocks, *arguments, BLOCK_T=blocks.tokens,
            BLOCK_K=blocks.k, BLOCK_R=tuning.rank_block(rank, 256), EVEN_K=width % blocks.k == 0,
            ACTIVATION=activation,
        )  # fmt: skip

    if tokens:
        candidates = [tuning.INTERPRETED["thin"]] if INTERPRETED else tuning.thin_blocks(p.element_size(), rank)
        run(_fastest(name, (p.dtype, *tuning.shape_class(tokens, 0, width, rank), p.stride(1) == 1), candidates, run))


def product(p: Tensor, v: Tensor, bias: Tensor | None, h: Tensor, f: Tensor, scaling: float) -> Tensor:
    """p v + bias + scaling * h f: p [tokens, width], v [width, columns], h [tokens, rank], f [rank, columns]."""
    (tokens, width), columns, rank = p.shape, v.shape[1], h.shape[1]
    bias = None if bias is None else bias.contiguous()

    def run(blocks: Blocks) -> Tensor:
        # v.t() is the frozen weight, or its transpose: cuBLAS takes both as they lie
        out = F.linear(p, v.t(), bias) if blocks.in_place else p.new_empty(tokens, columns)
        grid = (triton.cdiv(tokens, blocks.tokens) * triton.cdiv(columns, blocks.columns),)
        _launch(
            linear_kernel, grid, blocks, p, v, bias, h, f, out, tokens, columns, width, rank, scaling,
            *p.stride(), *v.stride(), *f.stride(), BLOCK_T=blocks.tokens, BLOCK_N=blocks.columns, BLOCK_K=blocks.k,
            BLOCK_R=tuning.rank_block(rank, 64), GROUP_T=GROUP_TOKENS, EVEN_K=width % blocks.k == 0,
            HAS_BIAS=bias is not None, IN_PLACE=blocks.in_place,
        )  # fmt: skip
        return out

    if not tokens:
        return p.new_empty(0, columns)
    variants = tuning.product_variants()
    candidates = [b for name in variants for b in _blocks(tuning.PRODUCTS[name], "linear", p)]
    key = (p.dtype, *variants, *tuning.shape_class(tokens, columns, width, rank), p.stride(1) == 1, v.stride(0) == 1)
    return run(_fastest("product", key, candidates, run))


def outer(p: Tensor, q: Tensor, beta: Tensor, scaling: float, activation: str, *, into: Tensor) -> None:
    """into [columns, rank] (any strides) = scaling * p^T phi(q): p [tokens, columns], q [tokens, rank]."""
    (tokens, columns), rank = p.shape, q.shape[1]

    def run(blocks: Blocks) -> None:
        splits, share = _splits(tokens, columns, blocks, p.device)
        partial = into if splits == 1 else p.new_empty(splits, columns, rank, dtype=torch.float32)
        strides = (0, *into.stride()) if splits == 1 else partial.stride()
        block_r = tuning.rank_block(rank, 128)
        grid = (triton.cdiv(columns, blocks.columns), splits, triton.cdiv(rank, block_r))
        _launch(
            outer_kernel, grid, blocks, p, q, beta, partial, tokens, columns, rank, scaling, share,
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
    """The parts that the sum over tokens is cut into, and tokens a part: enough programs for every processor."""
    wanted = math.ceil(4 * _processors(device) / triton.cdiv(columns, blocks.columns))
    share = triton.cdiv(triton.cdiv(tokens, min(wanted, 64)), blocks.tokens) * blocks.tokens
    return triton.cdiv(tokens, share), share


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _blocks(table: dict[int, tuple[Blocks, ...]], interpreted: str, p: Tensor) -> list[Blocks]:
    """The table's blocks for p's dtype that p's device can hold."""
    if INTERPRETED:
        return [tuning.INTERPRETED[interpreted]._replace(in_place=table is tuning.UPDATE)]
    major, minor = torch.cuda.get_device_capability(p.device) if p.device.type == "cuda" else (8, 0)
    return [blocks for blocks in table[p.element_size()] if blocks.arch <= 10 * major + minor]


def _fastest(name: str, key: tuple, candidates: list[Blocks], run: Callable[[Blocks], object]) -> Blocks:
    return candidates[0] if INTERPRETED else tuning.choose(name, key, candidates, run)


def _launch(kernel: Any, grid: tuple[int, ...], blocks: Blocks, *arguments: Any, **options: Any) -> None:
    compiler = {} if INTERPRETED else {"num_warps": blocks.warps, "num_stages": blocks.stages}
    kernel[grid](*arguments, **options, INTERPRETED=INTERPRETED, **compiler)
