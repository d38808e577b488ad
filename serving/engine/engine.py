"""The loop: prefill, then draft, verify and emit until the request ends."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draft.checkpoint import check_fits
from draft.data.row_cache import check_architecture
from draft.errors import UserError
from draft.heads import Eagle3Head
from draft.target import Target
from serving.engine.cache import SlotCache
from serving.engine.proposers import ChainProposer, Proposer
from serving.engine.sequence import (
    SEED_LIMIT,
    Completion,
    SamplingParams,
    Sequence,
    SpeculationStats,
    Token,
    special_ids,
)
from serving.engine.verification import RULES, Proposal, Rule, make_rule

MAX_SPECULATION_LENGTH = 32  # beyond any acceptance length that a chain reaches


class Engine:
    """Decodes with a target, and a draft head when there is one; the answers are the target's own either way.

    One request at a time: the engine owns its caches, is neither thread-safe nor re-entrant, and calls back from
    the thread that called it.
    """

    def __init__(
        self,
        target: Target,
        head: Eagle3Head | None = None,
        *,
        speculation_length: int = 5,
        rule: str = "shared-noise",
        max_length: int | None = None,
    ) -> None:
        """max_length: the most tokens of prompt and answer together (default: what the target was made for).

        Raises:
            UserError: when the head is not of the target's shape, or a value is out of range.
        """
        check_architecture(target)
        if head is not None:
            check_fits(head, {}, target)
        self.target = target
        self.head = head
        self.speculation_length = _check_speculation_length(speculation_length)
        self.rule = _check_rule(rule)
        self.max_length = _check_max_length(max_length, target)
        self.proposer: Proposer | None = ChainProposer(target, head) if head is not None else None
        self.cache = SlotCache(target.num_layers)
        self.special_ids = special_ids(target.tokenizer, target.eos_token_ids)

    @torch.inference_mode()
    def generate(
        self,
        prompt_ids: Ids[int],
        params: SamplingParams,
        *,
        speculative: bool = True,
        speculation_length: int | None = None,
        rule: str | None = None,
        on_token: Callable[[Token], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Completion:
        """Decode one request.

        speculative: False decodes plainly, as an engine without a head does. speculation_length, rule: this request's
        own. on_token is called with each token as it is decided; `cancelled` is asked once a step, and ends the
        request with what it has.

        Raises:
            UserError: for an empty prompt, ids outside the vocabulary, or a request that does not fit the context.
        """
        self._check_prompt(prompt_ids, params)
        length = _check_speculation_length(
            self.speculation_length if speculation_length is None else speculation_length
        )
        proposer = self.proposer if speculative and length > 0 else None
        seed = params.seed
        if seed is None and params.temperature > 0:
            seed = secrets.randbelow(SEED_LIMIT)
        request = _Request(
            sequence=Sequence(prompt_ids, params, self.target.tokenizer, self.target.eos_token_ids, self.special_ids),
            rule=make_rule(_check_rule(rule) if rule else self.rule, params, seed or 0),
            speculation_length=length if proposer else 0,
            emit=on_token or (lambda token: None),
        )
        began = time.perf_counter()
        self._prefill(request, proposer)
        prefilled = time.perf_counter()
        while request.sequence.finish_reason is None:
            if cancelled():
                request.sequence.finish_reason = "cancelled"
                break
            self._step(request, proposer)
        request.stats.prefill_seconds = prefilled - began
        request.stats.decode_seconds = time.perf_counter() - prefilled
        return request.completion(seed)

    def _check_prompt(self, prompt_ids: Ids[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise UserError("the prompt is empty; give at least one token.")
        wrong = [token for token in prompt_ids if not 0 <= token < self.target.vocab_size]
        if wrong:
            raise UserError(
                f"the prompt has token id {wrong[0]}; the target's go from 0 to {self.target.vocab_size - 1}."
            )
        if len(prompt_ids) + params.max_new_tokens > self.max_length:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens and max_new_tokens is {params.max_new_tokens}: together "
                f"they exceed the context of {self.max_length}; shorten the prompt or ask for at most "
                f"{max(0, self.max_length - len(prompt_ids))} tokens."
            )

    def _prefill(self, request: _Request, proposer: Proposer | None) -> None:
        """Read the prompt, emit the first token, and let the head read the prompt."""
        sequence = request.sequence
        capacity = sequence.length + sequence.params.max_new_tokens
        self.cache.clear(capacity)
        prompt = torch.tensor([sequence.prompt_ids], device=self.target.device)  # [1, prompt]
        last, auxiliary = self._forward(prompt, proposer)
        logits = self.target.logits(last[:, -1:])  # [1, 1, vocab]
        emitted = self._decide(request, logits, Proposal(prompt[:, :0]))
        if proposer is not None and auxiliary is not None and sequence.finish_reason is None:
            proposer.start(capacity)
            proposer.observe(torch.cat([prompt[:, 1:], emitted], dim=1), auxiliary)

    def _step(self, request: _Request, proposer: Proposer | None) -> None:
        """Draft, verify in one pass of the target, emit, and keep the accepted prefix in both caches."""
        sequence, stats = request.sequence, request.stats
        read = self.cache.length  # all tokens but the last
        last_token = torch.tensor([[sequence.last_id]], device=self.target.device)
        # a verification emits one token more than stand: further drafts could not be used
        count = min(request.speculation_length, sequence.remaining - 1)
        proposal = proposer.propose(count, request.rule) if proposer and count else Proposal(last_token[:, :0])
        block = torch.cat([last_token, proposal.tokens], dim=1)  # [1, K+1]
        hidden, auxiliary = self._forward(block, proposer)
        emitted = self._decide(request, self.target.logits(hidden), proposal)
        stats.count(drafted=count, tokens=sequence.tokens[len(sequence.tokens) - emitted.shape[1] :])
        self.cache.rollback(read + emitted.shape[1])
        if proposer is not None and auxiliary is not None and sequence.finish_reason is None:
            proposer.observe(emitted, auxiliary[:, : emitted.shape[1]])

    def _forward(self, ids: Tensor, proposer: Proposer | None) -> tuple[Tensor, Tensor | None]:
        """The target over [1, n] tokens after the cached ones -> last hidden, auxiliary states: [1, n, ...]."""
        past = self.cache.length
        output = self.target.forward(
            ids,
            layers=proposer.layers if proposer else None,
            position_ids=torch.arange(past, past + ids.shape[1], device=ids.device)[None],
            past_key_values=self.cache,
        )
        return output.last_hidden, output.auxiliary

    def _decide(self, request: _Request, logits: Tensor, proposal: Proposal) -> Tensor:
        """Verify, and emit what stands until the sequence ends.

        logits: [1, K+1, vocab]. Returns the emitted ids, [1, n].
        """
        sequence = request.sequence
        verdict = request.rule.verify(logits, proposal, sequence.length)
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chosen = precise.gather(-1, verdict.tokens[..., None])[..., 0]
        logprobs = chosen - precise.logsumexp(dim=-1)  # [1, K+1]
        # the step's one wait for the device; float64 holds ids exactly
        count = verdict.accepted[:, None].expand_as(logprobs)
        ids, values, (accepted, *_) = torch.stack([verdict.tokens, logprobs.double(), count])[:, 0].tolist()
        emitted = 0
        while emitted <= accepted and sequence.finish_reason is None:
            position = emitted if emitted < accepted else None
            request.emit(sequence.append(int(ids[emitted]), values[emitted], position))
            emitted += 1
        return verdict.tokens[:, :emitted]


@dataclass
class _Request:
    """A request while it is decoded."""

    sequence: Sequence
    rule: Rule
    speculation_length: int  # 0: plain decoding
    emit: Callable[[Token], None]
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    def completion(self, seed: int | None) -> Completion:
        sequence = self.sequence
        assert sequence.finish_reason is not None
        return Completion(
            prompt_ids=sequence.prompt_ids,
            token_ids=[token.id for token in sequence.tokens],
            tokens=sequence.tokens,
            text=sequence.text,
            finish_reason=sequence.finish_reason,
            seed=seed,
            stats=self.stats,
        )


def _check_speculation_length(length: int) -> int:
    if not isinstance(length, int) or not 0 <= length <= MAX_SPECULATION_LENGTH:
        raise UserError(
            f"speculation_length = {length!r}: it must be a whole number from 0 (off) to {MAX_SPECULATION_LENGTH}."
        )
    return length


def _check_rule(rule: str) -> str:
    if rule not in RULES:
        raise UserError(f"rule = {rule!r}: it must be one of {', '.join(RULES)}.")
    return rule


def _check_max_length(length: int | None, target: Target) -> int:
    if length is None:
        return target.max_length
    if not 2 <= length <= target.max_length:
        raise UserError(
            f"max_length = {length}: it must be from 2 to {target.max_length}, the context of target {target.name!r}."
        )
    return length
