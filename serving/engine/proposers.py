"""What proposes the tokens that the target then verifies."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from draft.heads import Eagle3Head
from draft.target import Target
from serving.engine.cache import SlotLayer, causal_mask
from serving.engine.verification import Proposal, Rule


class Proposer(Protocol):
    """Guesses continuations of one sequence. `observe` is told all that the target has read, in order."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Whose auxiliary hidden states `observe` wants."""
        ...

    def start(self, capacity: int) -> None:
        """Forget the last sequence; the next one has at most `capacity` tokens."""
        ...

    def observe(self, following: Tensor, auxiliary: Tensor) -> None:
        """The target has read n more tokens.

        following: [1, n], the token after each of them; auxiliary: [1, n, layers * hidden], the target's true states.
        """
        ...

    def propose(self, count: int, rule: Rule) -> Proposal:
        """`count` (at least 1) tokens to follow the last observed one; leaves no trace in what was observed."""
        ...


class ChainProposer:
    """One chain of drafts from an EAGLE-3 head.

    At position i the head reads the state of token i and the embedding of token i+1, and predicts token i+2. Past
    the target's last state it reads its own output, before the norm, as training-time test taught it to.
    """

    def __init__(self, target: Target, head: Eagle3Head) -> None:
        self.layers = target.default_auxiliary_layers
        self.target, self.head = target, head
        self.vocabulary = head.vocabulary  # [draft_vocab] target ids
        self.dtype = head.fc.weight.dtype
        self.cache = SlotLayer()
        self._hidden: Tensor | None = None  # [1, 1, hidden], the head's output at the last observed position

    def start(self, capacity: int) -> None:
        self.cache.clear(capacity)
        self._hidden = None

    def observe(self, following: Tensor, auxiliary: Tensor) -> None:
        fused = self.head.fuse(auxiliary.to(self.dtype))  # [1, n, hidden]
        self._hidden = self._read(following, fused)[:, -1:]

    def propose(self, count: int, rule: Rule) -> Proposal:
        assert self._hidden is not None, "nothing was observed"
        observed = self.cache.length
        first = observed + 1  # position of the first token to draft; `observed` is that of the last token known
        hidden = self._hidden
        tokens: list[Tensor] = []  # each [1]
        distributions: list[Tensor] = []  # each [1, draft_vocab]; none for rules that don't need them
        for step in range(count):
            token, q = rule.draft(self.head.logits(hidden)[:, -1], self.vocabulary, first + step)
            tokens.append(token)
            if q is not None:
                distributions.append(q)
            if step + 1 < count:
                hidden = self._read(token[:, None], hidden)
        self.cache.rollback(observed)  # the drafted steps go: accepted tokens are read again with true states
        chain = torch.stack(tokens, dim=1)  # [1, K]
        return Proposal(chain, self._spread(distributions) if distributions else None)

    def _read(self, following: Tensor, hidden: Tensor) -> Tensor:
        """Run the head over n positions after the cached ones: [1, n], [1, n, hidden] -> [1, n, hidden]."""
        past, new = self.cache.length, following.shape[1]
        positions = torch.arange(past, past + new, device=following.device)[None]
        embeds = self.target.embedding(following).to(self.dtype)
        return self.head(embeds, hidden, positions, self.cache, causal_mask(past, new, following.device))

    def _spread(self, distributions: list[Tensor]) -> Tensor:
        """K distributions [1, draft_vocab] -> [1, K, vocab]: tokens outside the draft vocabulary have none."""
        q = torch.stack(distributions, dim=1)
        full = q.new_zeros(1, len(distributions), self.target.vocab_size)
        return full.index_copy(2, self.vocabulary, q)
