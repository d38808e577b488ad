"""The arithmetic of an annealed LoRA layer (AFA-LoRA, arXiv 2512.22455); imports torch only.

`afa_lora_linear` is the one function that a layer calls. `reference` holds what every other version is
compared with, and the four other placements of the activation.
"""

from afa_kernels.reference import (
    ACTIVATIONS,
    PLACEMENTS,
    afa_lora_linear,
    annealed_activation,
    annealed_lora,
    canonical_placement,
)

__all__ = [
    "ACTIVATIONS",
    "PLACEMENTS",
    "afa_lora_linear",
    "annealed_activation",
    "annealed_lora",
    "canonical_placement",
]
