"""The table of draft head architectures."""

from __future__ import annotations

from draft.heads.base import DraftHead
from draft.heads.eagle import EagleHead
from draft.heads.eagle3 import Eagle3Head
from draft.heads.medusa import MedusaHead

ARCHITECTURES: dict[str, type[DraftHead]] = {head.architecture: head for head in (Eagle3Head, EagleHead, MedusaHead)}
DEFAULT = Eagle3Head.architecture
