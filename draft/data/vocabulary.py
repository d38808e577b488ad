"""The reduced vocabulary of a draft head: the tokens that the target writes most often."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from draft.data.dataset import Row
from draft.errors import UserError


def token_counts(rows: Sequence[Row], vocab_size: int) -> Tensor:
    """How often each token is trained on: [vocab_size] int64."""
    trained = [token for row in rows for token, wanted in zip(row.ids, row.mask, strict=True) if wanted]
    return torch.bincount(torch.tensor(trained, dtype=torch.int64), minlength=vocab_size)


def draft_vocabulary(rows: Sequence[Row], size: int, vocab_size: int, always: Iterable[int] = ()) -> Tensor:
    """The `size` target ids that are trained on most often, sorted: [size] int64.

    Ties go to the lower id, and so do places that no trained token needs. `always` (the ends of a turn) come first.

    Raises:
        UserError: when `size` exceeds the target's vocabulary or has no room for `always`.
    """
    if size > vocab_size:
        raise UserError(f"a draft vocabulary of {size} tokens exceeds the target's {vocab_size}; choose a smaller one.")
    counts = token_counts(rows, vocab_size)
    required = torch.tensor(sorted(set(always)), dtype=torch.int64)
    if len(required) > size:
        raise UserError(
            f"a draft vocabulary of {size} tokens has no room for {len(required)} ends of turn; choose a larger one."
        )
    counts[required] = torch.iinfo(torch.int64).max
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def coverage(rows: Sequence[Row], vocabulary: Tensor) -> float:
    """Share of the trained-on tokens that are in `vocabulary` [draft_vocab]; 1.0 when there are none."""
    size = 1 + max([int(vocabulary.max()), *(token for row in rows for token in row.ids)])
    counts = token_counts(rows, size)
    total = int(counts.sum())
    return int(counts[vocabulary.cpu()].sum()) / total if total else 1.0
