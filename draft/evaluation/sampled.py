"""τ at temperature 1 under the rejection rule, estimated from text that the target sampled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from draft.data.dataset import Row
from draft.errors import UserError
from draft.evaluation.replay import (
    TOKENS_PER_BATCH,
    Acceptance,
    Span,
    drafted_states,
    generations,
    response_positions,
    target_passes,
)
from draft.heads import DraftHead
from draft.target import Target, TargetOutput

_POSITIONS_PER_CHUNK = 512  # positions whose probabilities over the whole vocabulary are in memory at once


def is_sampled(row: Row) -> bool:
    """True for a row that was sampled from the target's whole distribution and has something to verify."""
    return row.temperature == 1 and row.top_p == 1 and row.trained > 1 and not row.retokenised


def sampled_acceptance(
    target: Target,
    heads: Mapping[str, DraftHead],
    rows: Iterable[Row],
    max_steps: int = 8,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: str | None = None,
) -> dict[str, Acceptance]:
    """Estimate τ at temperature 1 under the rejection rule, from rows sampled at temperature 1 without truncation.

    With p the target's distribution over the whole vocabulary, q the head's over the draft vocabulary (0 outside
    it) and x the recorded tokens,

        τ_K = 1 + Σ_{k<K} E[ Π_{j<k} min(1, q_j(x_j) / p_j(x_j)) · Σ_v min(p_k(v), q_k(v)) ]

    The expectation is over the places where decoding starts a block, not evenly over all positions: blocks leap
    over easy text, so that an even average would be too high. Given the text, the recorded token is accepted as a draft
    with probability min(1, q/p), which gives each position its probability of starting a block. As in the engine,
    drafting stops short of a length limit, and an accepted EOS brings no bonus token (v leaves it out).

    Returns:
        for each head the expected emitted tokens and the expected verifications of each row.

    Raises:
        UserError: when no row was sampled at temperature 1 with top-p 1.
    """
    sampled = [row for row in rows if is_sampled(row)]
    if not sampled:
        raise UserError(
            "the estimate at temperature 1 needs responses of two tokens or more sampled at temperature 1 and top-p 1, "
            "and there are none in these rows; run `draft-train prepare` with a share of sampled responses."
        )
    spans = [generations(row, target.eos_token_ids) for row in sampled]
    row_ids = [row.id for row in sampled]
    results = {name: Acceptance(row_ids, *np.zeros((2, len(sampled), max_steps))) for name in heads}
    with torch.no_grad():
        for indices, ids, output in target_passes(target, sampled, tokens_per_batch, progress, heads.values()):
            wanted = response_positions([spans[index] for index in indices], ids)
            for name, head in heads.items():
                ratios, overlaps = rejection_terms(target, head, ids, output, wanted, max_steps)
                longest = ratios.shape[-1]  # a head may have fewer draft steps
                survival = torch.cat([torch.ones_like(ratios[..., :1]), ratios.cumprod(dim=-1)], dim=-1).tolist()
                for index, alive, overlap in zip(indices, survival, overlaps.tolist(), strict=True):
                    for span in spans[index]:
                        for column in range(max_steps):
                            emitted, verifications = expected_walk(alive, overlap, span, min(column + 1, longest))
                            results[name].emitted[index, column] += emitted
                            results[name].verifications[index, column] += verifications
    return results


def rejection_terms(
    target: Target, head: DraftHead, ids: Tensor, output: TargetOutput, wanted: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """The rejection rule's terms at draft step k after entry i, where the drafts before it are the recorded tokens.

    wanted: [batch, tokens] bool, the entries i that drafting may start from.

    Returns:
        min(1, q/p) of the recorded token, and Σ_v min(p(v), q(v)) over v other than EOS: [batch, tokens, steps] each
        (fewer steps where the head has fewer);
        meaningful where the recorded token i + 2 + k belongs to the same response as i.
    """
    states = list(drafted_states(target, head, ids, output, steps))
    hidden = torch.stack(states, dim=2)  # [batch, tokens, steps, hidden]
    ratios = torch.zeros(hidden.shape[:3], dtype=torch.float64, device=ids.device)
    overlaps = torch.zeros_like(ratios)
    draft_ids = torch.full((head.config.vocab_size,), -1, device=ids.device)
    draft_ids[head.vocabulary] = torch.arange(len(head.vocabulary), device=ids.device)
    is_eos = torch.isin(head.vocabulary, torch.tensor(sorted(target.eos_token_ids), device=ids.device))
    for chunk in wanted.nonzero().split(_POSITIONS_PER_CHUNK):
        batch, entries = chunk.unbind(1)  # [chunk] each
        scores = target.logits(output.last_hidden[batch, entries + 1])  # [chunk, vocab]: at k, of entry i = entries - k
        log_p = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(dim=-1)
        token = ids[batch, entries + 2]
        log_p_token = log_p.gather(-1, token[:, None])[:, 0]
        p = log_p[:, head.vocabulary].masked_fill(is_eos, -torch.inf).exp()  # [chunk, draft_vocab]
        for step in range(hidden.shape[2]):
            real = entries >= step
            rows, starts = batch[real], entries[real] - step
            logits = head.logits(hidden[rows, starts, step], step)  # [real, draft_vocab]
            log_q = logits.to(log_p.dtype).log_softmax(dim=-1)
            draft_id = draft_ids[token[real]]
            log_q_token = log_q.gather(-1, draft_id.clamp_min(0)[:, None])[:, 0].masked_fill(draft_id < 0, -torch.inf)
            ratios[rows, starts, step] = (log_q_token - log_p_token[real]).clamp_max(0).exp().to(ratios)
            overlaps[rows, starts, step] = torch.minimum(p[real], log_q.exp()).sum(dim=-1).to(overlaps)
    return ratios, overlaps


def expected_walk(
    survival: Sequence[Sequence[float]], overlaps: Sequence[Sequence[float]], span: Span, length: int
) -> tuple[float, float]:
    """Expected (emitted tokens, verifications) of decoding one response, over the rejection rule's coins.

    survival[i][k]: probability that the first k recorded tokens after i + 1 are accepted as drafts; overlaps[i][k]:
    the probability that draft k is accepted, whatever it is, unless it is EOS.
    """
    total = span.end - 1 - span.start
    begins = [1.0] + [0.0] * (total + length)  # probability that a block starts after `offset` emitted tokens
    emitted = 0.0
    for offset in range(total):
        entry, remaining = span.start - 1 + offset, total - offset
        drafted = min(length, remaining if span.ended_by_eos else remaining - 1)
        alive = survival[entry]
        gain = sum(alive[step] * overlaps[entry][step] for step in range(drafted))
        emitted += begins[offset] * (1 + gain)
        for accepted in range(drafted):
            begins[offset + accepted + 1] += begins[offset] * (alive[accepted] - alive[accepted + 1])
        begins[offset + drafted + 1] += begins[offset] * alive[drafted]
    return emitted, sum(begins[:total])
