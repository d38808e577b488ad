"""AFA-LoRA (arXiv 2512.22455) as a variant of PEFT's LoRA."""

from draft.afa.adapter import (
    AnnealingCallback,
    add_adapter,
    load_afa_adapter,
    merge_adapter,
    set_annealing_step,
)
from draft.afa.layer import AfaLinear, AfaLoraConfig
from draft.afa.schedule import beta_at

__all__ = [
    "AfaLinear",
    "AfaLoraConfig",
    "AnnealingCallback",
    "add_adapter",
    "beta_at",
    "load_afa_adapter",
    "merge_adapter",
    "set_annealing_step",
]
