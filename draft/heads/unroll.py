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

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DENSE_TOKENS = 1024  # longer texts are attended to in chunks
CHUNK = 512

KeysValues = tuple[Tensor, Tensor]  # each [batch, heads, tokens, head_dim]


def shift_left(x: Tensor, by: int = 1) -> Tensor:
    """x[:, by:] with zeros at the end, same shape: entry i becomes entry i + by of before."""
    return torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], dim=1)


def take(x: Tensor, places: Tensor | None) -> Tensor:
    """x [batch, tokens, size] at `places` [batch, wanted]: [batch, wanted, size]; all of it without them."""
    return x if places is None else torch.take_along_dim(x, places[..., None], dim=1)


def wanted_places(wanted: Tensor) -> Tensor:
    """Positions that are wanted, rising: wanted [batch, tokens] bool -> [batch, most wanted of a row].

    Rows with fewer are filled up with positions that are not wanted.
    """
    most = max(1, int(wanted.sum(1).max()))
    return wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]


def attend_unrolled(
    query: Tensor,
    base: KeysValues,
    own: Sequence[KeysValues],
    segments: Tensor | None,
    places: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The attention of one draft step: to step 0 causally, to later steps by position.

        scores of entry i at step k = [ q_i · key j of step 0, j <= i | q_i · key i of step 1 | ... | of step k ]

    Long texts take `chunk` queries at a time, against the keys up to the last, and recompute the scores in the backward
    pass, so that what is kept grows with the tokens and not with their square.

    query: [batch, heads, queries, head_dim]; base, own: keys and values of step 0, and of steps 1..k at the queries.
    places: [batch, queries], the position of each query; None: one at each position.
    segments: [batch, tokens], the number of the conversation that each token belongs to (padding is one of its own, so
    that its queries see something and the softmax gives no NaN); None: one a row.
    chunk: None chooses by the length.

    Returns:
        [batch, heads, queries, head_dim].
    """
    tokens, queries = base[0].shape[2], query.shape[2]
    if places is None:
        places = torch.arange(tokens, device=query.device)[None]
    chunk = chunk or (queries if tokens <= DENSE_TOKENS else CHUNK)
    if chunk >= queries:
        return _attend(query, base, own, _allowed(segments, places, tokens))
    parts = []
    for start in range(0, queries, chunk):
        part = slice(start, start + chunk)
        end = int(places[:, part].max()) + 1
        keys = base[0][:, :, :end], base[1][:, :, :end]
        here = [(key[:, :, part], value[:, :, part]) for key, value in own]
        allowed = _allowed(segments, places[:, part], end)
        parts.append(checkpoint(_attend, query[:, :, part], keys, here, allowed, use_reentrant=False))
    return torch.cat(parts, dim=2)


def _allowed(segments: Tensor | None, places: Tensor, end: int) -> Tensor:
    """[batch or 1, 1, queries, end] bool: which of the first `end` base keys the queries at `places` see."""
    allowed = torch.arange(end, device=places.device) <= places[..., None]
    if segments is not None:
        own = torch.take_along_dim(segments, places, dim=1)  # [batch, queries]
        allowed = allowed & (own[..., None] == segments[:, None, :end])
    return allowed[:, None]


def _attend(query: Tensor, base: KeysValues, own: Sequence[KeysValues], allowed: Tensor) -> Tensor:
    """Softmax over the keys of step 0 and of later steps together, see `attend_unrolled`."""
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
