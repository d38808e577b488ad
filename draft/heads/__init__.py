"""Draft heads, one file an architecture; what is done with each of them is in `draft.heads.registry`."""

from draft.heads.base import DraftHead, StepwiseHead
from draft.heads.eagle import EagleConfig, EagleHead
from draft.heads.eagle3 import Eagle3Config, Eagle3Head
from draft.heads.medusa import MedusaConfig, MedusaHead

__all__ = [
    "DraftHead",
    "Eagle3Config",
    "Eagle3Head",
    "EagleConfig",
    "EagleHead",
    "MedusaConfig",
    "MedusaHead",
    "StepwiseHead",
]
