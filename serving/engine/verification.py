"""Which drafted tokens stand: pure functions on tensors, and the rules that feed them.

Both rules are lossless: what comes out is distributed as the target's own warped distribution p, whatever is drafted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from serving.engine.sampling import Purpose, gumbel, heat, uniform, warp
from serving.engine.sequence import SamplingParams


@dataclass(frozen=True)
class Proposal:
    """A chain of drafted tokens."""

    tokens: Tensor  # [1, K] target ids
    q: Tensor | None = None  # [1, K, vocab] what each was drawn from, over the target's vocabulary; rejection needs it


@dataclass(frozen=True)
class Verdict:
    """What a verification emits: `accepted` drafted tokens, then one of the target's own; the rest is void."""

    tokens: Tensor  # [batch, K+1]
    accepted: Tensor  # [batch] int64, 0..K


def verify_shared_noise(choices: Tensor, drafted: Tensor) -> Verdict:
    """Drafted tokens stand as long as they are what the target itself chooses (arXiv 2408.07978; greedy likewise).

    choices: [batch, K+1], the target's choice after each drafted prefix; drafted: [batch, K].
    """
    accepted = (choices[:, :-1] == drafted).long().cumprod(dim=1).sum(dim=1)
    return Verdict(choices, accepted)


def acceptance_probability(p: Tensor, q: Tensor, drafted: Tensor) -> Tensor:
    """min(1, p(x) / q(x)) of each drafted token: p, q [batch, K, vocab], drafted [batch, K] -> [batch, K]."""
    p_drafted, q_drafted = (x.gather(-1, drafted[..., None])[..., 0] for x in (p, q))
    return (p_drafted / q_drafted).clamp(max=1.0)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(0, p - q)), what replaces a rejected draft: p, q [..., vocab] -> [..., vocab].

    It is p where nothing is left, which is where q = 0 (no draft: the bonus token) or, by rounding, q = p.
    """
    left = (p - q).clamp(min=0.0)
    total = left.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, left / total, p)


def verify_rejection(p: Tensor, q: Tensor, drafted: Tensor, uniforms: Tensor, noise: Tensor) -> Verdict:
    """Speculative sampling (Leviathan et al. 2211.17192, Chen et al. 2302.01318).

    p: [batch, K+1, vocab] the target's distribution after each drafted prefix; q: [batch, K, vocab] what each of
    drafted [batch, K] was drawn from; uniforms: [batch, K]; noise: [batch, K+1, vocab] standard Gumbel.
    """
    accept = uniforms < acceptance_probability(p[:, :-1], q, drafted)
    accepted = accept.long().cumprod(dim=1).sum(dim=1)  # [batch]
    row = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    q_or_none = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)  # nothing was drafted for the bonus token
    left = residual(p.gather(1, row), q_or_none.gather(1, row))  # [batch, 1, vocab]
    supplied = (left.log() + noise.gather(1, row)).argmax(dim=-1)  # [batch, 1]
    tokens = torch.cat([drafted, supplied], dim=1).scatter(1, accepted[:, None], supplied)
    return Verdict(tokens, accepted)


class Rule(Protocol):
    """How one request's tokens are drafted and verified. Its methods never wait for the device.

    The head drafts at the request's temperature; truncation is left to the target, which is lossless all the same.
    """

    def draft(self, logits: Tensor, vocabulary: Tensor, position: int) -> tuple[Tensor, Tensor | None]:
        """Draft the token at `position`.

        logits: [1, draft_vocab] of the head; vocabulary: [draft_vocab] target ids.

        Returns:
            target ids [1], and the distribution [1, draft_vocab] they were drawn from when verification needs it.
        """
        ...

    def verify(self, logits: Tensor, proposal: Proposal, position: int) -> Verdict:
        """Decide on the tokens from `position` on; logits: [1, K+1, vocab] of the target after each drafted prefix."""
        ...


class Greedy:
    """Temperature 0: the shared-noise rule without noise."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        pass

    def draft(self, logits: Tensor, vocabulary: Tensor, position: int) -> tuple[Tensor, Tensor | None]:
        return vocabulary[logits.argmax(dim=-1)], None

    def verify(self, logits: Tensor, proposal: Proposal, position: int) -> Verdict:
        return verify_shared_noise(logits.argmax(dim=-1), proposal.tokens)


class SharedNoise:
    """The target chooses argmax(log p + g), the head guesses with the same g: the text depends on the seed only."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params, self.seed = params, seed

    def draft(self, logits: Tensor, vocabulary: Tensor, position: int) -> tuple[Tensor, Tensor | None]:
        noise = gumbel(self.seed, Purpose.CHOICE, [position], vocabulary)
        return vocabulary[(heat(logits, self.params.temperature) + noise).argmax(dim=-1)], None

    def verify(self, logits: Tensor, proposal: Proposal, position: int) -> Verdict:
        log_p = warp(logits, self.params)
        return verify_shared_noise((log_p + _choice_noise(self.seed, position, logits)).argmax(dim=-1), proposal.tokens)


class Rejection:
    """Chains are drawn from q and stand with min(1, p/q). Without drafts it chooses what shared noise chooses.

    A position that was drafted and not reached is drafted again with the same numbers. That is sound: whether
    earlier tokens stand depends on the numbers of their own positions only.
    """

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params, self.seed = params, seed

    def draft(self, logits: Tensor, vocabulary: Tensor, position: int) -> tuple[Tensor, Tensor | None]:
        log_q = heat(logits, self.params.temperature).log_softmax(dim=-1)
        noise = gumbel(self.seed, Purpose.DRAFT, [position], vocabulary)
        return vocabulary[(log_q + noise).argmax(dim=-1)], log_q.exp()

    def verify(self, logits: Tensor, proposal: Proposal, position: int) -> Verdict:
        p = warp(logits, self.params).exp()
        count = proposal.tokens.shape[1]
        one = torch.zeros(1, dtype=torch.int64, device=logits.device)
        uniforms = uniform(self.seed, Purpose.ACCEPT, range(position, position + count), one).mT  # [1, K]
        q = p[:, :0] if proposal.q is None else proposal.q.to(p.dtype)
        return verify_rejection(p, q, proposal.tokens, uniforms, _choice_noise(self.seed, position, logits)[None])


RULES: dict[str, type[SharedNoise] | type[Rejection]] = {"shared-noise": SharedNoise, "rejection": Rejection}


def make_rule(name: str, params: SamplingParams, seed: int) -> Rule:
    """The rule of one request; at temperature 0 both are greedy."""
    return (RULES[name] if params.temperature > 0 else Greedy)(params, seed)


def _choice_noise(seed: int, position: int, logits: Tensor) -> Tensor:
    """Gumbel noise [K+1, vocab] for the target's choices; logits: [1, K+1, vocab]."""
    vocabulary = torch.arange(logits.shape[2], device=logits.device)
    positions = range(position, position + logits.shape[1])
    return gumbel(seed, Purpose.CHOICE, positions, vocabulary)
