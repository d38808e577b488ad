"""The arithmetic of an annealed LoRA layer (AFA-LoRA, arXiv 2512.22455); imports torch and triton only.

`afa_lora_linear` is the one function that a layer calls: it picks the Triton kernels or plain PyTorch (see
`ops`). `reference` holds what every other version is compared with, and the four other placements of the
activation.
"""

from afa_kernels.ops import KernelsError, afa_lora_linear, fall_back
from afa_kernels.reference import (
    ACTIVATIONS,
    PLACEMENTS,
    annealed_activation,
    annealed_lora,
    canonical_placement,
)

__all__ = [
    "ACTIVATIONS",
    "PLACEMENTS",
    "KernelsError",
    "afa_lora_linear",
    "annealed_activation",
    "annealed_lora",
    "canonical_placement",
    "fall_back",
]
