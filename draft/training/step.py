"""Training-time test: unrolling a head over K draft steps for all positions of a text at once.

Position i reads the target's auxiliary hidden states of token x[i]. How the indices shift, step by step:

    step k   embedding of   hidden state                    rotary position   predicts    teacher: target logits at
    0        x[i+1]         fuse(auxiliary of x[i])         i                 x[i+2]      i+1
    1        x[i+2]         own output of step 0 at i       i + 1             x[i+3]      i+2
    k        x[i+1+k]       own output of step k-1 at i     i + k             x[i+2+k]    i+1+k

Decoding from position i has the true states of all positions up to i in its cache, and then its own drafts. So
at step k a query attends to the step-0 keys of positions <= i, and to its own keys of steps 1..k: a diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from draft.heads.head import StepwiseHead
from draft.heads.medusa import MedusaHead
from draft.training.attention import TrainingAttention


def unroll(
    head: StepwiseHead,
    embeds: Tensor,
    auxiliary: Tensor,
    steps: int,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the head's hidden states of draft steps 0..steps-1, each [batch, tokens, hidden].

    embeds: [batch, tokens, hidden], the target's embeddings of x; auxiliary: [batch, tokens, layers * hidden], its
    states of the same x at `head.auxiliary_layers`.
    attention_mask, position_ids: [batch, tokens], see `Batch`; rows are padded on the right. Entry i of step k is
    meaningful where x[i+1+k] exists in the same conversation; beyond a row's end the embeddings are zeros.
    """
    batch, tokens, _ = embeds.shape
    attention = head.attention
    groups = head.config.num_attention_heads // head.config.num_key_value_heads
    positions = torch.arange(tokens, device=embeds.device).expand(batch, -1) if position_ids is None else position_ids
    attend = TrainingAttention(tokens, attention_mask, embeds.device)

    hidden = head.fuse(auxiliary)
    base: tuple[Tensor, Tensor] | None = None
    own: list[tuple[Tensor, Tensor]] = []  # keys and values of steps 1.., each [batch, heads, tokens, head_dim]
    for step in range(steps):
        embeds = shift_left(embeds)
        x, residual = head.mix(embeds, hidden)
        q, k, v = attention.project(x, head.rope(positions + step, hidden.dtype))
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if base is None:
            base = k, v
        else:
            own.append((k, v))
        mixed = attend(q, base, own)
        hidden = head.finish(residual, attention.merge(mixed))
        yield hidden


def unroll_at_once(head: MedusaHead, embeds: Tensor, auxiliary: Tensor, steps: int, **_: Any) -> Iterator[Tensor]:
    """`unroll` for a head that drafts all positions from the target's states alone: as many steps as it has positions.

    Neither embeddings nor what attention may see make a difference to it.
    """
    hidden = head.fuse(auxiliary)
    for step in range(min(steps, head.longest)):
        yield head(hidden, step)


def shift_left(x: Tensor, by: int = 1) -> Tensor:
    """x[:, by:] with zeros at the end, same shape: entry i becomes entry i + by of before."""
    return torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], dim=1)
