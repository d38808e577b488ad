"""The rows of a run: what it trains on, and the few that are replayed on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from draft.data.dataset import Row, open_dataset
from draft.errors import UserError
from draft.target import Target
from draft.training.config import RunSettings


@dataclass(frozen=True)
class Rows:
    train: list[Row]
    held_out: list[Row]  # greedy ones, a few, for the replay during training


def load_rows(settings: RunSettings, target: Target, console: Console) -> Rows:
    """The rows of all data folders, in their order; what one of them holds out is not trained on from another.

    Raises:
        UserError: when they belong to another target, or when none can be trained on.
    """
    train: list[Row] = []
    held_out: list[Row] = []
    for folder in settings.data.data:
        dataset = open_dataset(Path(folder))
        dataset.check_target(target)
        train += dataset.rows("train")
        held_out += dataset.rows("held-out")
    train = _without(train, held_out, settings.data.data, console)
    train = [row for row in train if sum(row.mask[2:])]
    if not train:
        raise UserError(f"{', '.join(settings.data.data)}: no training rows; prepare a larger data set.")
    return Rows(train, [row for row in held_out if row.greedy][: settings.training.eval_rows])


def _without(train: list[Row], held_out: list[Row], folders: list[str], console: Console) -> list[Row]:
    """The rows whose prompts no data set holds out: each has a split of its own, and two may share prompts."""
    ids = {row.id for row in held_out}
    kept = [row for row in train if row.id not in ids]
    if train and not kept:
        raise UserError(
            f"{', '.join(folders)}: no training rows, for the prompts of all of them are held out in another data set; "
            "prepare data of other prompts."
        )
    if left_out := len(train) - len(kept):
        console.print(f"{left_out} training rows are left out: their prompts are held out in another data set.")
    return kept
