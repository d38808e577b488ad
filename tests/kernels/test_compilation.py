"""The kernels compile for sm_80, sm_90 and sm_100 within their registers and shared memory; no card is needed.

`make test` compiles every kernel with its first blocks in bf16 for all three, and for sm_90 also each use, each
activation and three kernels in fp32. `make test-kernels-all` compiles every configuration that can be chosen.
Triton caches what it compiled.
"""

from __future__ import annotations

import pytest
from kernel_cases import INTERPRETING

triton = pytest.importorskip("triton")
if INTERPRETING:
    pytest.skip("a process that interprets Triton compiles nothing", allow_module_level=True)

from compiled_kernels import (  # noqa: E402
    ARCHITECTURES,
    SHARED_MEMORY,
    Kernel,
    compile_kernel,
    every_kernel,
    first_kernels,
)

from afa_kernels import triton_kernels, tuning  # noqa: E402

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


def check(arch: int, kernel: Kernel) -> None:
    used = compile_kernel(kernel, arch)
    assert used.spilled <= SPILL_LIMIT, used
    assert used.shared <= SHARED_MEMORY[arch], used
    assert 16 <= used.registers <= 255, used


@pytest.mark.parametrize(("arch", "kernel"), SUBSET, ids=map(name, SUBSET))
def test_it_compiles(arch: int, kernel: Kernel) -> None:
    check(arch, kernel)


@pytest.mark.every_configuration
@pytest.mark.parametrize(("arch", "kernel"), ALL, ids=map(name, ALL))
def test_every_configuration_compiles(arch: int, kernel: Kernel) -> None:
    check(arch, kernel)


def test_the_limits_are_read_from_the_compiler() -> None:
    spills = Kernel("update", "bf16", tuning.Blocks(256, 128, 32, 4, 1))
    assert compile_kernel(spills, 90).spilled > SPILL_LIMIT
    hungry = Kernel("linear", "bf16", tuning.LINEAR[2][0]._replace(stages=8))
    assert compile_kernel(hungry, 80).shared > SHARED_MEMORY[80]


def test_a_new_beta_or_number_of_tokens_is_no_new_kernel() -> None:
    kernels = [value for name, value in vars(triton_kernels).items() if name.endswith("_kernel")]
    assert len(kernels) == 4
    for kernel in kernels:
        parameters = {parameter.name: parameter for parameter in kernel.params}
        assert parameters["tokens"].do_not_specialize
        assert not any(parameters[name].is_constexpr for name in ("beta_ptr", "scaling") if name in parameters)
