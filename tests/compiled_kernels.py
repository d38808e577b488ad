"""Compiles the kernels for chips that are not here, as they would be launched, and reads what they need."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from afa_kernels import triton_kernels, tuning
from afa_kernels.tuning import Blocks

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block may have
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
ACTIVATIONS = ("silu", "gelu", "relu", "tanh")


@dataclass(frozen=True)
class Kernel:
    """One specialisation of one kernel: its blocks, and the arguments that differ between its uses."""

    name: str  # down, dz, linear (y), linear_dx, update, outer_a (dA) or outer_b (dB)
    dtype: str
    blocks: Blocks
    rank: int = 16
    activation: str = "silu"
    even: bool = True  # sizes and strides are multiples of the blocks and of 16
    bias: bool = False


@dataclass(frozen=True)
class Resources:
    """Figures of ptxas and Triton about a compiled kernel."""

    registers: int  # of a thread
    spilled: int  # bytes that a thread stores and loads for want of registers
    shared: int  # bytes of a block


def every_kernel(arch: int) -> Iterator[Kernel]:
    """Every configuration that `tuning` offers on this architecture, for each rank block and use."""
    for dtype in ("bf16", "fp32"):
        size = ITEMSIZE[dtype]
        for rank in (16, 32, 64, 128, 256):
            for blocks in tuning.thin_blocks(size, rank):
                yield Kernel("down", dtype, blocks, rank)
                yield Kernel("dz", dtype, blocks, rank, "gelu")
            if rank <= 128:  # outer_kernel's largest rank block
                for blocks in tuning.OUTER[size]:
                    yield Kernel("outer_a", dtype, blocks, rank, "identity")
                    yield Kernel("outer_b", dtype, blocks, rank, "gelu")
            if rank <= 64:  # linear_kernel's
                yield from (Kernel("update", dtype, blocks, rank) for blocks in tuning.UPDATE[size])
                for blocks in tuning.LINEAR[size]:
                    if blocks.arch <= arch:
                        yield Kernel("linear", dtype, blocks, rank)
                        yield Kernel("linear_dx", dtype, blocks, rank)
    for dtype in ITEMSIZE:
        yield from first_kernels(dtype)
        yield from first_kernels(dtype, even=False)
        for activation in ACTIVATIONS:
            yield from (k for k in first_kernels(dtype, activation) if k.name in ("down", "dz", "outer_b"))


def first_kernels(dtype: str, activation: str = "silu", even: bool = True) -> Iterator[Kernel]:
    """Each kernel with the blocks that it has before anything is measured."""
    size = ITEMSIZE[dtype]
    thin, linear, outer = tuning.thin_blocks(size, 16)[0], tuning.LINEAR[size][0], tuning.OUTER[size][0]
    for name, blocks in (("down", thin), ("dz", thin), ("outer_b", outer)):
        yield Kernel(name, dtype, blocks, activation=activation, even=even)
    for name, blocks in (("linear", linear), ("linear_dx", linear), ("update", tuning.UPDATE[size][0])):
        yield Kernel(name, dtype, blocks, even=even, bias=name == "linear")
    yield Kernel("outer_a", dtype, outer, activation="identity", even=even)


def compile_kernel(kernel: Kernel, arch: int) -> Resources:
    """Compiles `kernel` for sm_<arch>. Raises what Triton raises where that fails."""
    source, options = _source(kernel)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        # as Triton calls it, but for its report
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}", file.name]
        report = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", report)
    assert used, report
    spilled = sum(int(size) for size in re.findall(r"(\d+) bytes spill", report))
    return Resources(int(used[1]), spilled, compiled.metadata.shared)


# The strides that are 1 where x, weight, A and B are contiguous.
UNIT_STRIDES = {
    "down": ("stride_xk", "stride_ak"),
    "dz": ("stride_do", "stride_br"),
    "linear": ("stride_pk", "stride_vk", "stride_fr"),
    "linear_dx": ("stride_pk", "stride_vn", "stride_fn"),
    "update": ("stride_pk", "stride_vk", "stride_fr"),
    "outer_a": ("stride_pn", "stride_on"),
    "outer_b": ("stride_pn", "stride_or"),
}


def _constants(kernel: Kernel) -> dict[str, Any]:
    blocks, family = kernel.blocks, kernel.name.partition("_")[0]
    constants: dict[str, Any] = {"BLOCK_T": blocks.tokens, "INTERPRETED": False}
    constants |= dict.fromkeys(UNIT_STRIDES[kernel.name], 1)
    if family in ("down", "dz"):
        block_r = tuning.rank_block(kernel.rank, 256)
        constants |= {"BLOCK_K": blocks.k, "BLOCK_R": block_r, "EVEN_K": kernel.even, "ACTIVATION": kernel.activation}
    elif family == "outer":
        block_r = tuning.rank_block(kernel.rank, 128)
        constants |= {"BLOCK_N": blocks.columns, "BLOCK_R": block_r, "ACTIVATION": kernel.activation}
    else:
        constants |= {"BLOCK_N": blocks.columns, "BLOCK_K": blocks.k, "BLOCK_R": tuning.rank_block(kernel.rank, 64)}
        constants |= {"GROUP_T": 8, "EVEN_K": kernel.even, "IN_PLACE": family == "update", "HAS_BIAS": kernel.bias}
        constants |= {} if kernel.bias else {"bias_ptr": None}
    return constants


def _type(name: str, kernel: Kernel) -> str:
    fp32 = {"beta_ptr", "z_ptr"} | ({"out_ptr"} if kernel.name.startswith("outer") else set())
    fp32 |= {"q_ptr"} if kernel.name == "outer_b" else set()
    if name.endswith("_ptr"):
        return "*fp32" if name in fp32 else f"*{kernel.dtype}"
    return "fp32" if name == "scaling" else "i32"


def _source(kernel: Kernel) -> tuple[ASTSource, dict[str, int]]:
    family = kernel.name.partition("_")[0]
    function = getattr(triton_kernels, f"{'linear' if family == 'update' else family}_kernel")
    constants = _constants(kernel)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list] = {}
    for index, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else _type(name, kernel)
        sizes = name in ("width", "columns") or name.startswith("stride")
        if name not in constants and (signature[name][0] == "*" or (kernel.even and sizes)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    return source, {"num_warps": kernel.blocks.warps, "num_stages": kernel.blocks.stages}
