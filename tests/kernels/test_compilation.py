"""The kernels compile for sm_80, sm_90 and sm_100 within their registers and shared memory; no card is needed.

`make test` compiles every kernel with its first blocks in bf16 for all three, and for sm_90 also each use, each
activation and three kernels in fp32. `make test-kernels-all` compiles every configuration that can be chosen.
Triton caches what it compiled.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from kernel_cases import INTERPRETING

triton = pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("a process that interprets Triton compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from afa_kernels import triton_kernels, tuning  # noqa: E402

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block may have
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
ACTIVATIONS = ("silu", "gelu", "relu", "tanh")


@dataclass(frozen=True)
class Kernel:
    """One specialisation of one kernel: its blocks, and the arguments that differ between its uses."""

    name: str  # down, dz, linear (y), linear_dx, update, outer_a (dA) or outer_b (dB)
    dtype: str
    blocks: tuning.Blocks
    rank: int = 16
    activation: str = "silu"
    even: bool = True  # sizes and strides are multiples of the blocks and of 16
    bias: bool = False


class Resources(NamedTuple):
    """Figures of ptxas and Triton: registers of a thread, bytes that it spills, and shared bytes of a block."""

    registers: int
    spilled: int
    shared: int


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
        command += ["-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stderr
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


# ---- tests ----

SPILL_LIMIT = 384  # bytes of a thread, stores and loads together, of 1020 that its registers hold

SUBSET = [(90, kernel) for kernel in first_kernels("bf16")]
SUBSET += [(90, Kernel("dz", "bf16", tuning.THIN[2][1], activation=name)) for name in ("gelu", "relu", "tanh")]
FOUR = ("down", "dz", "linear", "update", "outer_b")  # update is linear_kernel without its long sum
SUBSET += [(arch, kernel) for arch in (80, 100) for kernel in first_kernels("bf16") if kernel.name in FOUR]
SUBSET += [(90, kernel) for kernel in first_kernels("fp32") if kernel.name in ("dz", "linear", "outer_b")]
ALL = [(arch, kernel) for arch in ARCHITECTURES for kernel in dict.fromkeys(every_kernel(arch))]


def name(case: tuple[int, Kernel]) -> str:
    arch, k = case
    blocks = "x".join(map(str, k.blocks[:5]))
    return f"sm{arch}-{k.name}-{k.dtype}-{blocks}-r{k.rank}-{k.activation}{'' if k.even else '-ragged'}"


EVERY = [pytest.param(*case, id=f"all-{name(case)}", marks=pytest.mark.every_configuration) for case in ALL]


@pytest.mark.parametrize(("arch", "kernel"), [*(pytest.param(*case, id=name(case)) for case in SUBSET), *EVERY])
def test_it_compiles(arch, kernel):
    used = compile_kernel(kernel, arch)
    assert used.spilled <= SPILL_LIMIT, used
    assert used.shared <= SHARED_MEMORY[arch], used
    assert 16 <= used.registers <= 255, used


def test_the_limits_are_read_from_the_compiler():
    spills = Kernel("update", "bf16", tuning.Blocks(256, 128, 32, 4, 1))
    assert compile_kernel(spills, 90).spilled > SPILL_LIMIT
    hungry = Kernel("linear", "bf16", tuning.LINEAR[2][0]._replace(stages=8))
    assert compile_kernel(hungry, 80).shared > SHARED_MEMORY[80]


def test_a_new_beta_or_number_of_tokens_is_no_new_kernel():
    kernels = [value for name, value in vars(triton_kernels).items() if name.endswith("_kernel")]
    assert len(kernels) == 4
    for kernel in kernels:
        parameters = {parameter.name: parameter for parameter in kernel.params}
        assert parameters["tokens"].do_not_specialize
        assert not any(parameters[name].is_constexpr for name in ("beta_ptr", "scaling") if name in parameters)
