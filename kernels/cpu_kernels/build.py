"""Compile the C++ kernels with the machine's own compiler, once."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent
_FLAGS = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread"]


class KernelsUnavailable(Exception):
    """The kernels cannot be compiled here; the message says why, and what to do."""


def built_library(cache: Path) -> Path:
    """Return the kernels compiled for this machine, from the folder `cache`; the first time takes some 20 s.

    Raises:
        KernelsUnavailable: when there is no C++ compiler ($CXX, g++, c++ or clang++), or it refuses the source.
    """
    names = filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++"))
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise KernelsUnavailable(
            "the CPU kernels need a C++ compiler and none of $CXX, g++, c++, clang++ is there; install g++, or decode "
            "with the eager engine."
        )
    library = cache / f"cpu-kernels-{_key(compiler)}.so"
    if not library.is_file():
        _build(compiler, library)
    return library


def _key(compiler: str) -> str:
    """Hash everything that a build depends on; a home folder may be shared by machines of different CPUs."""
    digest = hashlib.sha256(f"{_FLAGS} {torch.__version__} {compiler} {platform.machine()}".encode())
    digest.update(_run([compiler, "--version"]).stdout.encode())
    for source in sorted([*_SOURCE.glob("*.h"), *_SOURCE.glob("*.cpp")]):
        digest.update(source.read_bytes())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        described = ("flags", "Features", "model name", "cpu family", "model\t", "CPU part")
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith(described)]
        digest.update("\n".join(sorted(set(lines))).encode())
    return digest.hexdigest()[:16]


def _build(compiler: str, library: Path) -> None:
    """Compile into a temporary file beside `library`, then rename: other processes see all of it or nothing."""
    log.info("compiling the CPU kernels once (about 20 s)")
    library.parent.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    descriptor, temporary = tempfile.mkstemp(prefix="compiling-", suffix=".so", dir=library.parent)
    os.close(descriptor)
    try:
        result = _run(
            [
                compiler,
                *_FLAGS,
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                *(f"-I{folder}" for folder in (include, include / "torch/csrc/api/include")),
                str(_SOURCE / "kernels.cpp"),
                *("-o", temporary, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
            ]
        )
        if result.returncode != 0:
            lines = result.stderr.splitlines() or [f"exit status {result.returncode}"]
            first = next((line for line in lines if "error" in line.lower()), lines[0])
            raise KernelsUnavailable(
                f"{compiler} could not compile the CPU kernels ({first.strip()[:300]}); set $CXX to another."
            )
        Path(temporary).chmod(0o755)
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
