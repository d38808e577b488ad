"""What a run starts from, and what is written down about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from draft.checkpoint import head_sha256
from draft.comparison import row_ids
from draft.data.dataset import Row
from draft.data.vocabulary import coverage, draft_vocabulary
from draft.target import Target
from draft.training.build import blank_head, load_base_head, vocabulary_size, with_vocabulary
from draft.training.config import RunSettings
from draft.training.monitor import provenance


def starting_head(
    settings: RunSettings,
    target: Target,
    rows: list[Row],
    console: Console,
) -> tuple[Any, dict[str, Any]]:
    """The head of `--head` with its draftsmith.json, or a new one, whose first weights are not solved yet."""
    if settings.model.head:
        head, about = load_base_head(settings, target)
        if settings.model.rebuild_vocabulary:
            head = with_vocabulary(head, target, _vocabulary(settings, target, rows))
        share = coverage(rows, head.vocabulary.cpu())
        console.print(f"The head's vocabulary covers {share:.1%} of the tokens that are trained on.")
        if share < 0.95:
            console.print(
                f"Warning: {1 - share:.1%} of this domain's tokens can never be drafted with this head; "
                "a head pretrained on this domain would know them.",
                style="yellow",
            )
        return head, about
    return blank_head(target, _vocabulary(settings, target, rows), settings.model), {}


def _vocabulary(settings: RunSettings, target: Target, rows: list[Row]) -> Tensor:
    size = vocabulary_size(settings.model, target)
    return draft_vocabulary(rows, size, target.vocab_size, sorted(target.eos_token_ids))


def about_run(settings: RunSettings, target: Target, rows: list[Row], base: dict[str, Any]) -> dict[str, Any]:
    """What a head's draftsmith.json says of the run; base: that of the head it started from."""
    return {
        "target": settings.model.target,
        "target_adapter": settings.model.target_adapter,
        "target_fingerprint": target.fingerprint,
        "mode": settings.mode,
        "method": settings.method,
        "base_head": settings.model.head and Path(settings.model.head).name,
        "base_head_sha256": settings.model.head and head_sha256(settings.model.head),
        "tokens": sum(len(row.ids) for row in rows),
        "trained_tokens": sum(sum(row.mask) for row in rows),
        "trained_rows": sorted({*row_ids(rows), *base.get("trained_rows", [])}),
        **provenance(),
    }
