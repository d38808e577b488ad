"""Decoding on a CPU: linear layers that read bfloat16 or float32 weights once, and attention over cache slots.

The operators are C++ (kernels.cpp), compiled at first use. Each row of each operator gives the same bits whatever
rows it is batched with, so the width of a verification does not change greedy text.
"""

from __future__ import annotations

from cpu_kernels.build import KernelsUnavailable
from cpu_kernels.ops import (
    PackedLinear,
    arithmetic,
    arithmetics,
    load_kernels,
    pack_linears,
    set_arithmetic,
    set_threads,
    slot_attention,
)

__all__ = [
    "KernelsUnavailable",
    "PackedLinear",
    "arithmetic",
    "arithmetics",
    "load_kernels",
    "pack_linears",
    "set_arithmetic",
    "set_threads",
    "slot_attention",
]
