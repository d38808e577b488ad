"""Training-time test: unrolling a head over K draft steps for all positions of a text at once.

Position i reads the target's auxiliary hidden states of token x[i]. How the indices shift, step by step:

    step k   embedding of   hidden state                    rotary position   predicts    teacher: target logits at
    0        x[i+1]         combine(auxiliary of x[i])      i                 x[i+2]      i+1
    1        x[i+2]         own output of step 0 at i       i + 1             x[i+3]      i+2
    k        x[i+1+k]       own output of step k-1 at i     i + k             x[i+2+k]    i+1+k

Decoding from position i has the true states of all positions up to i in its cache, and then its own drafts. So
at step k a query attends to the step-0 keys of positions <= i, and to the keys of its position of steps 1..k: a
diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

DENSE_TOKENS = 1024  # longer texts are attended to in chunks
CHUNK = 512
FLEX_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLEX_LEAST_HEAD_DIM = 16
BLOCK = 128  # of FlexAttention

KeysValues = tuple[Tensor, Tensor]  # each [batch, heads, tokens, head_dim]


def shift_left(x: Tensor, by: int = 1) -> Tensor:
    """x[:, by:] with zeros at the end, same shape: entry i becomes entry i + by of before."""
    return torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], dim=1)


class TrainingAttention:
    """The attention of one batch, at all of its draft steps: to step 0 causally, to later steps by position.

        scores of entry i at step k = [ q_i · key j of step 0, j <= i | q_i · key i of step 1 | ... | of step k ]

    Three ways to compute it, which agree:

        dense       the scores as above, for short texts
        in chunks   so many queries at a time, against the keys up to the last; recomputed in the backward pass
        flex        FlexAttention over [keys of step 0 | keys of step 1 | ...] with a block mask, on CUDA: no scores in
                    memory

    segments: [batch, tokens], the number of the conversation that each token belongs to (padding is one of its own, so
    that its queries see something and the softmax gives no NaN); None: one a row.
    """

    def __init__(self, tokens: int, segments: Tensor | None, device: torch.device) -> None:
        self.tokens, self.segments, self.device = tokens, segments, device
        self._block_masks: dict[int, Any] = {}

    def __call__(self, query: Tensor, base: KeysValues, own: Sequence[KeysValues]) -> Tensor:
        """Queries [batch, heads, tokens, head_dim], keys and values of step 0 and of steps 1..k -> as the queries."""
        if self.device.type == "cuda" and query.dtype in FLEX_DTYPES and query.shape[-1] >= FLEX_LEAST_HEAD_DIM:
            return self.flex(query, base, own, _compiled_flex_attention())
        return self.dense(query, base, own) if self.tokens <= DENSE_TOKENS else self.in_chunks(query, base, own)

    def dense(self, query: Tensor, base: KeysValues, own: Sequence[KeysValues]) -> Tensor:
        return _attend(query, base, own, self._allowed(0, self.tokens))

    def in_chunks(self, query: Tensor, base: KeysValues, own: Sequence[KeysValues], size: int = CHUNK) -> Tensor:
        parts = []
        for start in range(0, self.tokens, size):
            end = min(start + size, self.tokens)
            keys = base[0][:, :, :end], base[1][:, :, :end]
            here = [(key[:, :, start:end], value[:, :, start:end]) for key, value in own]
            allowed = self._allowed(start, end)
            parts.append(checkpoint(_attend, query[:, :, start:end], keys, here, allowed, use_reentrant=False))
        return torch.cat(parts, dim=2)

    def _allowed(self, start: int, end: int) -> Tensor:
        """[batch or 1, 1, end - start, end] bool: the base keys that queries start..end-1 see."""
        columns = torch.arange(end, device=self.device)
        allowed = (columns <= columns[start:, None])[None]
        if self.segments is not None:
            allowed = allowed & (self.segments[:, start:end, None] == self.segments[:, None, :end])
        return allowed[:, None]

    def flex(
        self, query: Tensor, base: KeysValues, own: Sequence[KeysValues], flex_attention: Callable[..., Tensor]
    ) -> Tensor:
        padding = (0, 0, 0, self._blocks * BLOCK - self.tokens)  # so that each step's keys begin with a block
        keys, values = (torch.cat([pad(step[part], padding) for step in (base, *own)], dim=2) for part in (0, 1))
        mixed = flex_attention(pad(query, padding), keys, values, block_mask=self._block_mask(len(query), len(own)))
        return mixed[:, :, : self.tokens]

    @property
    def _blocks(self) -> int:
        return -(-self.tokens // BLOCK)

    def _block_mask(self, rows: int, steps: int) -> Any:
        """The keys that a query of `flex` sees, where `steps` draft steps came after step 0.

        The blocks are found without looking at single keys, which would take as much memory as the scores.
        """
        if steps in self._block_masks:
            return self._block_masks[steps]
        from torch.nn.attention.flex_attention import BlockMask

        count = self._blocks
        # padding ends every row: as the last segment it keeps the numbers of a row in order
        segments = torch.ones(rows, self.tokens, dtype=torch.int64, device=self.device)
        if self.segments is not None:
            segments = self.segments.masked_fill(self.segments == 0, self.tokens + 1)
        segments = pad(segments, (0, count * BLOCK - self.tokens), value=self.tokens + 1)  # [rows, blocks * BLOCK]
        last, first = (segments.unflatten(1, (count, BLOCK))[:, :, place] for place in (-1, 0))  # [rows, blocks]
        block = torch.arange(count, device=self.device)
        causal = (block <= block[:, None]) & (last[:, None, :] >= first[:, :, None])  # [rows, blocks, blocks]
        own = (block == block[:, None]).expand_as(causal)
        needed = torch.cat([causal, *[own] * steps], dim=-1)[:, None]  # [rows, 1, blocks, blocks * (1 + steps)]
        length = torch.tensor(count * BLOCK, device=self.device)  # a number would be compiled in

        def seen(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            together = segments[row, query] == segments[row, key % length]
            return ((key < length) & (key <= query) & together) | ((key >= length) & (key % length == query))

        self._block_masks[steps] = BlockMask.from_kv_blocks(
            needed.sum(-1, dtype=torch.int32),
            needed.to(torch.int32).argsort(dim=-1, descending=True, stable=True).to(torch.int32),
            BLOCK_SIZE=BLOCK,
            mask_mod=seen,
            seq_lengths=(count * BLOCK, count * BLOCK * (1 + steps)),
        )
        return self._block_masks[steps]


def _attend(query: Tensor, base: KeysValues, own: Sequence[KeysValues], allowed: Tensor) -> Tensor:
    """Softmax over the keys of step 0 and of later steps together, see `TrainingAttention`."""
    query = query * query.shape[-1] ** -0.5
    scores = (query @ base[0].transpose(-1, -2)).masked_fill(~allowed, -torch.inf)  # [batch, heads, queries, keys]
    if not own:
        return scores.softmax(dim=-1) @ base[1]
    extra = [(query * key).sum(-1, keepdim=True) for key, _ in own]  # [batch, heads, queries, 1] a step
    weights = torch.cat([scores, *extra], dim=-1).softmax(dim=-1)
    keys = scores.shape[-1]
    mixed = weights[..., :keys] @ base[1]
    for index, (_, value) in enumerate(own):
        mixed = mixed + weights[..., keys + index, None] * value
    return mixed


@lru_cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Uncompiled, FlexAttention would build the scores that it is there to avoid."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
