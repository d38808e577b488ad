"""The target's hidden states for a batch: computed in this process, optionally remembered between epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draft.data.examples import Batch
from draft.target import Target


@dataclass(frozen=True)
class Features:
    """What training reads of the target, for a right-padded batch."""

    embeds: Tensor  # [batch, tokens, hidden]
    auxiliary: Tensor  # [batch, tokens, layers * hidden]
    last_hidden: Tensor  # [batch, tokens, hidden], after the final norm


class FeatureSource:
    """Runs the target once per batch, or once per row when `remember` is set."""

    def __init__(self, target: Target, *, remember: bool) -> None:
        self.target = target
        self.remember = remember
        self.layers: Sequence[int] = target.default_auxiliary_layers  # a head may read others
        self._rows: dict[int, Tensor] = {}  # row -> [tokens, (layers + 1) * hidden] on the CPU

    def get(self, batch: Batch, rows: list[int]) -> Features:
        """Features of `batch`, whose rows are the training rows `rows`."""
        target, width = self.target, len(self.layers) * self.target.hidden_size
        with torch.no_grad():
            if self.remember and all(row in self._rows for row in rows):
                both = torch.zeros(*batch.input_ids.shape, width + target.hidden_size, dtype=target.dtype)
                for index, row in enumerate(rows):
                    both[index, : len(self._rows[row])] = self._rows[row]
                both = both.to(target.device)
            else:
                # padding on the right needs no mask: no real token sees what follows it
                output = target.forward(batch.input_ids, layers=self.layers)
                assert output.auxiliary is not None
                both = torch.cat([output.auxiliary, output.last_hidden], dim=-1)
                if self.remember:
                    for index, row in enumerate(rows):
                        self._rows[row] = both[index, batch.attention_mask[index].bool()].cpu()
            auxiliary, last_hidden = both.split([width, target.hidden_size], dim=-1)
            return Features(target.embedding(batch.input_ids), auxiliary, last_hidden)


def fits_in_memory(target: Target, tokens: int) -> bool:
    """Whether the hidden states of `tokens` tokens take less than a third of the memory that is free now."""
    import psutil

    return tokens * 4 * target.hidden_size * target.dtype.itemsize < psutil.virtual_memory().available / 3
