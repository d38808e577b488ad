"""Keep what the C library's allocator has, between steps that need the same memory again."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed memory to the kernel, which would have to clear every page of it once more.

    A training step on the CPU frees and takes the same hundreds of megabytes; by default each large tensor is mapped
    and unmapped anew. For a whole process, so programs call it and libraries don't. Returns whether it took effect:
    other systems and C libraries are left as they are.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
