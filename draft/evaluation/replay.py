"""Replay: the acceptance length τ of draft heads from text that the target wrote, without decoding.

One pass of the target over a text gives the states of all its positions, and an unrolled head (training-time test)
gives its drafts after each of them. Greedy text is then walked block by block as the engine would have walked it.
`draft.evaluation.replay` does the same in expectation for text sampled at temperature 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from draft.data.dataset import Row
from draft.data.examples import batches, collate
from draft.errors import UserError
from draft.evaluation.tau import acceptance_length
from draft.heads import DraftHead
from draft.heads.unroll import shift_left, wanted_places
from draft.target import Target, TargetOutput

TOKENS_PER_BATCH = 4096
Pass = tuple[list[int], Tensor, TargetOutput]  # indices of rows, ids [batch, tokens], the target's output


@dataclass(frozen=True)
class Span:
    """One generation inside a row: tokens start..end-1, of which the prefill gave the first."""

    start: int
    end: int
    ended_by_eos: bool  # otherwise by its length limit, before which the engine drafts fewer tokens


@dataclass(frozen=True)
class Acceptance:
    """Costs of decoding the rows at speculation lengths 1..max_steps; column K-1 is for K."""

    row_ids: list[str]
    emitted: np.ndarray  # [rows, max_steps] tokens given by verifications, the bonus token included
    verifications: np.ndarray  # [rows, max_steps]

    def tau(self, length: int) -> float:
        """τ over all rows at speculation length `length`."""
        return acceptance_length(self.emitted[:, length - 1].sum(), self.verifications[:, length - 1].sum())

    def units(self, length: int) -> np.ndarray:
        """[conversations, 2]: (emitted, verifications), what a bootstrap by conversation resamples.

        Rows of one id are one conversation; those without a verification (responses of one token) are left out.
        """
        ids, unit = np.unique(self.row_ids, return_inverse=True)
        sums = np.zeros((len(ids), 2))
        np.add.at(sums, unit, np.stack([self.emitted[:, length - 1], self.verifications[:, length - 1]], axis=1))
        return sums[sums[:, 1] > 0]


@dataclass(frozen=True)
class ReplayResult(Acceptance):
    """Greedy replay, with counts of blocks by how much was drafted and accepted."""

    blocks: np.ndarray  # [max_steps (K - 1), drafted, accepted] verifications

    @classmethod
    def empty(cls, row_ids: list[str], max_steps: int) -> ReplayResult:
        emitted, verifications = np.zeros((2, len(row_ids), max_steps), dtype=np.int64)
        return cls(row_ids, emitted, verifications, np.zeros((max_steps, max_steps + 1, max_steps + 1), dtype=np.int64))

    def add(self, row: int, leading: Sequence[int], spans: Sequence[Span], longest: int | None) -> None:
        """Count the responses of a row, in place; leading: see `walk`; longest: see `DraftHead`."""
        for span in spans:
            for column in range(len(self.blocks)):
                for drafted, accepted, emitted in walk(leading, span, min(column + 1, longest or column + 1)):
                    self.blocks[column, drafted, accepted] += 1
                    self.emitted[row, column] += emitted
                    self.verifications[row, column] += 1

    def drafted(self, length: int) -> list[int]:
        """Verifications in which each draft position was filled, as the engine counts them."""
        return [int(self.blocks[length - 1, position:].sum()) for position in range(1, length + 1)]

    def accepted(self, length: int) -> list[int]:
        """Verifications in which each draft position was accepted (so all before it were too)."""
        return [int(self.blocks[length - 1, :, position:].sum()) for position in range(1, length + 1)]

    def acceptance_per_position(self, length: int) -> list[float]:
        """accepted / drafted of each position."""
        return _ratios(self.accepted(length), self.drafted(length))

    def conditional_acceptance_per_position(self, length: int) -> list[float]:
        """accepted / drafted of each position among the verifications that accepted all positions before it."""
        reached = [int(self.blocks[length - 1, position:, position - 1 :].sum()) for position in range(1, length + 1)]
        return _ratios(self.accepted(length), reached)


def _ratios(numerators: list[int], denominators: list[int]) -> list[float]:
    return [n / d if d else float("nan") for n, d in zip(numerators, denominators, strict=True)]


def replay(
    target: Target,
    heads: Mapping[str, DraftHead],
    rows: Iterable[Row],
    max_steps: int = 8,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: str | None = None,
    passes: Iterable[Pass] | None = None,
) -> dict[str, ReplayResult]:
    """Greedy replay of several heads with one pass of the target; rows that were not written greedily are left out.

    The walk is the engine's: the prefill gives a response's first token; each verification drafts K tokens, or one less
    than may still be emitted where that is fewer, keeps the accepted prefix, adds the target's own token, and is
    trimmed at the end of the response. A token outside the draft vocabulary is always a miss. For a response that ended
    with EOS the limit it was written under is unknown, and K tokens count as drafted up to its end.

    Args:
        heads: by any name; the results have the same names.
        progress: the text beside a progress bar; None shows none.
        passes: what `target_passes` yields for the greedy rows, where it is kept from one call to the next.

    Raises:
        UserError: when no row was written greedily with something to verify.
    """
    greedy = [row for row in rows if row.greedy]
    spans = [generations(row, target.eos_token_ids) for row in greedy]
    if not any(is_replayed(row, target.eos_token_ids) for row in greedy):
        raise UserError(
            "greedy replay needs responses of two tokens or more that the target wrote at temperature 0 as these very "
            "tokens, and there are none in these rows; run `draft-train prepare` with a share of greedy responses."
        )
    results = {name: ReplayResult.empty([row.id for row in greedy], max_steps) for name in heads}
    with torch.no_grad():
        if passes is None:
            passes = target_passes(target, greedy, tokens_per_batch, progress, heads.values())
        for indices, ids, output in passes:
            wanted = response_positions([spans[index] for index in indices], ids)
            for name, head in heads.items():
                leading = _leading_hits(target, head, ids, output, wanted, max_steps).tolist()
                for index, hits in zip(indices, leading, strict=True):
                    results[name].add(index, hits, spans[index], head.longest)
    return results


def replay_acceptance_length(
    target: Target, head: DraftHead, rows: Iterable[Row], length: int, passes: Iterable[Pass] | None = None
) -> float:
    """τ of one head by greedy replay at one speculation length: the trainer's periodic evaluation.

    The head is evaluated in eval mode and left in the mode it was in. passes: see `replay`.
    """
    training = head.training
    head.eval()
    try:
        return replay(target, {"head": head}, rows, length, passes=passes)["head"].tau(length)
    finally:
        head.train(training)


def generations(row: Row, eos_token_ids: frozenset[int]) -> list[Span]:
    """The responses in a row: runs of assistant tokens from `prompt_length` on, each cut after its first EOS."""
    spans: list[Span] = []
    places = range(max(row.prompt_length, 1), len(row.ids))
    for trained, group in groupby(places, key=lambda place: bool(row.mask[place])):
        if trained:
            response = list(group)
            eos = next((place for place in response if int(row.ids[place]) in eos_token_ids), None)
            spans.append(Span(response[0], (response[-1] if eos is None else eos) + 1, eos is not None))
    return spans


def is_replayed(row: Row, eos_token_ids: frozenset[int]) -> bool:
    """True for a row that was written greedily and has something to verify."""
    return row.greedy and any(span.end - span.start > 1 for span in generations(row, eos_token_ids))


def walk(leading: Sequence[int], span: Span, length: int) -> Iterator[tuple[int, int, int]]:
    """Walk a greedy response as the engine does; yields (drafted, accepted, emitted) of each verification.

    leading[i]: number of tokens after i + 1 that are drafted right in a row, from the target's states up to i.
    """
    last = span.start  # the last emitted token: given, but not yet read by the target
    while (remaining := span.end - 1 - last) > 0:
        drafted = length if span.ended_by_eos else min(length, remaining - 1)
        accepted = min(leading[last - 1], drafted, remaining)
        emitted = min(accepted + 1, remaining)
        yield drafted, accepted, emitted
        last += emitted


def target_passes(
    target: Target,
    rows: Sequence[Row],
    tokens_per_batch: int,
    progress: str | None,
    heads: Iterable[DraftHead] = (),
) -> Iterator[Pass]:
    """Yield the target's passes over some rows, those of similar length together.

    The output has the auxiliary states that any of `heads` reads; without heads, those of the default layers.
    Padding on the right needs no mask: everything is causal, and no real token sees what follows it.
    """
    wanted = {layer for head in heads for layer in head.auxiliary_layers(target)}
    layers = sorted(wanted or target.default_auxiliary_layers)
    together = batches(rows, tokens_per_batch, seed=0, epoch=0)
    for indices in track(together, description=progress or "", disable=progress is None):
        ids = collate([rows[index] for index in indices]).input_ids.to(target.device)
        yield indices, ids, target.forward(ids, layers=layers)


def response_positions(spans: list[list[Span]], ids: Tensor) -> Tensor:
    """[batch, tokens] bool: entries i from which a response's tokens i + 2.. are drafted."""
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    for entry, row_spans in enumerate(spans):
        for span in row_spans:
            wanted[entry, span.start - 1 : span.end - 2] = True
    return wanted.to(ids.device)


def drafted_states(
    target: Target, head: DraftHead, ids: Tensor, output: TargetOutput, steps: int, places: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield the head's hidden states of each draft step that it has, [batch, tokens, hidden], in the head's dtype.

    places: [batch, wanted], the entries whose states are wanted; None: all.
    """
    auxiliary = output.states_of(head.auxiliary_layers(target)).to(head.dtype)
    return head.unroll(target.embedding(ids).to(head.dtype), auxiliary, steps, places=places)


def _leading_hits(
    target: Target, head: DraftHead, ids: Tensor, output: TargetOutput, wanted: Tensor, steps: int
) -> Tensor:
    """[batch, tokens]: number of the `steps` greedy drafts from each wanted entry that are right before the first miss.

    The recorded tokens are fed to the head in the place of its own drafts: up to the first miss they are the same.
    """
    places = wanted_places(wanted)
    alive = torch.take_along_dim(wanted, places, dim=1)  # entries without a miss so far: only they need logits
    leading = torch.zeros_like(places)
    for step, hidden in enumerate(drafted_states(target, head, ids, output, steps, places)):
        drafts = head.vocabulary[head.logits(hidden[alive], step).argmax(dim=-1)]  # [alive]
        recorded = torch.take_along_dim(shift_left(ids, step + 2), places, dim=1)
        alive[alive.clone()] = drafts == recorded[alive]
        leading += alive
    return torch.zeros_like(ids).scatter_(1, places, leading)


# ---- τ at temperature 1 under the rejection rule, estimated from text that the target sampled ----


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
