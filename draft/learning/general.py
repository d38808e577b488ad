"""The general rows of a learner's gates: those of `--general`, checked before anything is learnt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from draft.data.capture import open_capture
from draft.data.dataset import Row, open_dataset
from draft.errors import UserError
from draft.evaluation.compare import LEAST_CONVERSATIONS, row_ids, trained_row_ids
from draft.evaluation.replay import is_replayed
from draft.target import TextTarget


def check_general(folder: Path, target: TextTarget, about: Mapping[str, Any], capture: Path) -> None:
    """Refuse general rows by which every attempt would fail, or be in vain, after its training.

    about: the draftsmith.json of the first head. capture: its requests name the target, whose weights are not read.

    Raises:
        UserError: where they cannot be opened, are too few, of another target, or among those of the head's training.
    """
    dataset = open_dataset(folder)
    rows, fingerprint, name = dataset.rows("held-out"), dataset.manifest["target_fingerprint"], repr(str(folder))
    if (count := greedy_conversations(rows, target)) < LEAST_CONVERSATIONS:
        raise UserError(
            f"--general {name} holds {count} held-out conversations that were written greedily, and with fewer than "
            f"{LEAST_CONVERSATIONS} no head is served; prepare more."
        )
    if seen := row_ids(rows) & (trained_row_ids(about) or set()):
        raise UserError(
            f"--general {name}: --head was trained on {len(seen)} of its {len(rows)} held-out rows; prepare rows of "
            "other prompts."
        )
    try:
        captured = open_capture(capture).target.fingerprint
    except UserError:  # nothing so far
        captured = ""
    if captured not in ("", fingerprint):
        raise UserError(
            f"--general {name} was prepared for a target with fingerprint {fingerprint}, and {str(capture)!r} holds "
            f"answers of one with {captured}; prepare general rows with that target."
        )


def greedy_conversations(rows: Iterable[Row], target: TextTarget) -> int:
    """The number of conversations that a gate measures."""
    return len({row.id for row in rows if is_replayed(row, target.eos_token_ids)})
