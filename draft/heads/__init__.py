"""Draft heads, one file an architecture; `draft.heads.registry` names them all."""

from draft.heads.base import DraftHead, StepwiseHead
from draft.heads.checkpoint import attach_head, load_head, save_head
from draft.heads.eagle import EagleHead
from draft.heads.eagle3 import Eagle3Config, Eagle3Head
from draft.heads.medusa import MedusaConfig, MedusaHead

__all__ = [
    "DraftHead",
    "Eagle3Config",
    "Eagle3Head",
    "EagleHead",
    "MedusaConfig",
    "MedusaHead",
    "StepwiseHead",
    "attach_head",
    "load_head",
    "save_head",
]
