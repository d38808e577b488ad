"""The kernels compile for sm_80, sm_90 and sm_100 within their registers and shared memory; no card is needed.

`make test` compiles every kernel with its first blocks in bf16 for all three, and for sm_90 also each use, each
activation and three kernels in fp32. `make test-kernels-all` compiles every configuration that can be chosen.
Triton caches what it compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import INTERPRETING

triton = pytest.importorskip("triton")

SPILL_LIMIT = 384  # bytes of a thread, stores and loads together, of 1020 that its registers hold

if INTERPRETING:

    def test_in_a_process_that_does_not_interpret() -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:]

else:
    from compiled_kernels import (
        ARCHITECTURES,
        SHARED_MEMORY,
        Kernel,
        compile_kernel,
        every_kernel,
        first_kernels,
    )

    from afa_kernels import ops, triton_kernels, tuning

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

    @pytest.fixture
    def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
        """Launches go through Triton's own cache up to the compiler, which notes the kernel and runs no further."""
        from triton.backends.compiler import GPUTarget

        made: list[str] = []
        target = GPUTarget("cuda", 90, 32)
        driver = SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        )

        def compiler(source: Any, **options: Any) -> SimpleNamespace:
            made.append(source.name)
            return SimpleNamespace(hash="", result=lambda: None)

        run = triton.JITFunction.run
        monkeypatch.setattr(triton.compiler, "compile", compiler)
        monkeypatch.setattr(triton.JITFunction, "run", lambda *a, **k: run(*a, **(k | {"warmup": True})))
        kernels = [k for k in vars(triton_kernels).values() if isinstance(k, triton.JITFunction)]
        for kernel in kernels:
            kernel.device_caches.clear()  # a new cache takes the compiler from where it is patched
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        yield made
        for kernel in kernels:
            kernel.device_caches.clear()

    def train(beta: torch.Tensor, tokens: int = 32, scaling: float = 2.0, activation: str = "silu") -> None:
        x, weight, dy = torch.ones(tokens, 64), torch.ones(48, 64), torch.ones(tokens, 48)
        a, b = torch.ones(16, 64, requires_grad=True), torch.ones(48, 16, requires_grad=True)
        y = ops.AfaLoraLinear.apply(x.requires_grad_(), weight, None, a, b, beta, scaling, activation)
        y.backward(dy)

    @pytest.mark.parametrize("variant", ["fused", "update"])
    def test_a_new_beta_compiles_nothing(variant: str, compilations: list[str]) -> None:
        with tuning.only(variant):
            train(torch.tensor(1.0))
            first = sorted(compilations)
            assert first == sorted(["down_kernel", "dz_kernel", "outer_kernel", "outer_kernel", *["linear_kernel"] * 2])
            for beta in (0.7, 0.3, 0.0):
                train(torch.tensor(beta))
            for tokens in (33, 47, 48):
                train(torch.tensor(0.5), tokens)
            train(torch.tensor(0.5), scaling=1.0)
            assert sorted(compilations) == first
            train(torch.tensor(0.5), activation="tanh")  # the count does count
            assert len(compilations) == len(first) + 3

    def test_launches_take_the_first_blocks_without_a_card() -> None:
        assert triton_kernels._blocks(tuning.LINEAR, "linear", torch.ones(1)) == list(tuning.LINEAR[4])
