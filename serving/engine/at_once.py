"""Drafts from a head that knows all positions at once, such as Medusa: no cache, and nothing to catch up on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draft.heads import MedusaHead
from serving.engine.proposers import Job, spread
from serving.engine.tree import BRANCHING, DraftTree, TreeGrower


@dataclass(eq=False)
class AtOnceState:
    """What is known of one sequence."""

    read: int = 0  # tokens that the target has read; the last of them at position read - 1
    auxiliary: Tensor | None = None  # [1, layers * hidden], the target's states of that one
    waiting: int = 0  # tokens observed since `catch_up`


class AtOnceProposer:
    """Chains and trees from a head whose draft step k guesses token i+2+k from the target's states of token i alone.

    The distributions of a chain's tokens are independent of each other, each the head's own at its position. A tree is
    taken from their product: the nodes of the largest probability along their path.
    """

    def __init__(self, head: MedusaHead, layers: tuple[int, ...], *, branching: int = BRANCHING) -> None:
        """branching: children of a tree's node."""
        self.head, self.layers, self.branching = head, layers, branching
        self.vocabulary = head.vocabulary  # [draft_vocab] target ids

    @property
    def recordings(self) -> int:
        return 0

    def warm_up(self, *, compiled: bool) -> None:
        """Nothing is compiled: between the matrix products there is hardly anything."""

    def join(self) -> AtOnceState:
        return AtOnceState()

    def leave(self, state: AtOnceState) -> None:
        state.auxiliary = None

    def observe(self, state: AtOnceState, following: Sequence[int], auxiliary: Tensor) -> None:
        state.read += len(following)
        state.waiting += len(following)
        state.auxiliary = auxiliary[-1:].clone()  # not a view, which would keep the others

    def catch_up(self, states: Sequence[AtOnceState]) -> int:
        total = sum(state.waiting for state in states)
        for state in states:
            state.waiting = 0
        return total

    def propose(self, jobs: Sequence[Job]) -> list[DraftTree]:
        self.catch_up([job.state for job in jobs])
        hidden = self.head.fuse(torch.cat([job.state.auxiliary for job in jobs]).to(self.head.dtype))  # [jobs, hidden]
        steps = range(max(job.length for job in jobs))
        logits = torch.stack([self.head.logits(self.head(hidden, step), step) for step in steps], dim=1)
        draft = {False: self._chain, True: self._tree}
        return [draft[bool(job.nodes)](job, own[: job.length]) for job, own in zip(jobs, logits, strict=True)]

    def _chain(self, job: Job, logits: Tensor) -> DraftTree:
        """logits: [length, draft_vocab]."""
        tokens, q = job.rule.draft(logits, self.vocabulary, self._positions(job))
        return DraftTree.chain(tokens.tolist(), None if q is None else spread(q, self.vocabulary, self.vocab_size))

    def _tree(self, job: Job, logits: Tensor) -> DraftTree:
        """logits: [depth, draft_vocab]."""
        scores = job.rule.candidate_scores(logits, self.vocabulary, self._positions(job))
        grower = TreeGrower(self.branching, job.length, job.nodes)
        nodes = 1  # of the frontier; at first the last token known
        for at_depth in scores:
            frontier = grower.grow(at_depth.expand(nodes, -1), self.vocabulary)
            if frontier is None:
                break
            nodes = len(frontier.tokens)
        return grower.tree()

    def _positions(self, job: Job) -> list[int]:
        """Of the tokens that are drafted: the token after the last one read is known."""
        return [job.state.read + 1 + step for step in range(job.length)]

    @property
    def vocab_size(self) -> int:
        return self.head.config.vocab_size
