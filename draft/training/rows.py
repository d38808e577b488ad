"""The rows of a run: what it trains on, and the few that are replayed on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from draft.data.dataset import Row, open_dataset
from draft.errors import UserError
from draft.target import Target
from draft.training.config import RunSettings


@dataclass(frozen=True)
class Rows:
    train: list[Row]
    held_out: list[Row]  # greedy ones, a few, for the replay during training


def load_rows(settings: RunSettings, target: Target) -> Rows:
    """The rows of all data folders; UserError when they belong to another target or when none can be trained on."""
    train: list[Row] = []
    held_out: list[Row] = []
    for folder in settings.data.data:
        dataset = open_dataset(Path(folder))
        dataset.check_target(target)
        train += dataset.rows("train")
        held_out += [row for row in dataset.rows("held-out") if row.greedy]
    train = [row for row in train if sum(row.mask[2:])]
    if not train:
        raise UserError(f"{', '.join(settings.data.data)}: no training rows; prepare a larger data set.")
    return Rows(train, held_out[: settings.training.eval_rows])
