"""What proposes the tokens that the target then verifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from draft.heads import MedusaHead
from serving.engine.compiler import FORK
from serving.engine.kv_cache import Batch, Segment
from serving.engine.model import HeadRunner
from serving.engine.tree import BRANCHING, DraftTree, TreeGrower
from serving.engine.verification import Rule


@dataclass(frozen=True)
class Job:
    """A wish for drafts of one sequence."""

    state: Any  # what `join` gave
    length: int  # at least 1: of a chain, or the depth of a tree
    nodes: int  # of a tree; 0: a chain
    rule: Rule


class Proposer(Protocol):
    """Guesses continuations of sequences. `observe` is told, in order, all that the target has read of each."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Whose auxiliary hidden states `observe` wants."""
        ...

    @property
    def recordings(self) -> int:
        """How often a pass was recorded as a CUDA graph."""
        ...

    def warm_up(self, *, compiled: bool) -> None:
        """Before requests come: compile the head, where that is wanted, and make its first passes."""
        ...

    def join(self) -> Any:
        """A new sequence begins; returns its state. There are never more than the engine has slots."""
        ...

    def leave(self, state: Any) -> None:
        """The sequence has ended."""
        ...

    def observe(self, state: Any, following: Sequence[int], auxiliary: Tensor) -> None:
        """The target has read n more tokens. Cheap: what the head has to compute waits for `propose`.

        following: the token after each of them; auxiliary: [n, layers * hidden], the target's true states.
        """
        ...

    def catch_up(self, states: Sequence[Any]) -> int:
        """Compute what waits for these sequences; returns how many tokens that were. `propose` does it, too."""
        ...

    def propose(self, jobs: Sequence[Job]) -> list[DraftTree]:
        """Drafts that follow the last token observed of each sequence; leaves no trace in what was observed."""
        ...


@dataclass(eq=False)
class HeadState:
    """What a head knows of one sequence."""

    slot: int
    hidden: Tensor | None = None  # [1, hidden], the head's output at the last position that it has read
    # what the target has read and the head has not: after a phase without speculation that is a lot
    following: list[int] = field(default_factory=list)
    auxiliary: list[Tensor] = field(default_factory=list)  # [n, layers * hidden] each

    @property
    def backlog(self) -> int:
        return len(self.following)


class HeadProposer:
    """Chains and trees from a head that reads its own drafts, step by step.

    At position i the head reads the state of token i and the embedding of token i+1, and predicts token i+2. Past
    the target's last state it reads its own output, as training-time test taught it to.
    """

    def __init__(
        self, runner: HeadRunner, layers: tuple[int, ...], *, read_limit: int = 512, branching: int = BRANCHING
    ) -> None:
        """read_limit: the most tokens that the head reads in one pass; branching: children of a tree's node."""
        self.runner, self.layers = runner, layers
        self.read_limit, self.branching = read_limit, branching
        self.vocabulary = runner.head.vocabulary  # [draft_vocab] target ids
        self.vocab_size = runner.head.config.vocab_size
        self.device = self.vocabulary.device

    @property
    def recordings(self) -> int:
        return self.runner.recordings

    def warm_up(self, *, compiled: bool) -> None:
        if compiled:
            self.runner.compile()
        self.runner.try_out(1)  # one token has kernels of its own
        self.runner.try_out(3, FORK)

    def join(self) -> HeadState:
        return HeadState(self.runner.cache.acquire())

    def leave(self, state: HeadState) -> None:
        self.runner.cache.release(state.slot)

    def observe(self, state: HeadState, following: Sequence[int], auxiliary: Tensor) -> None:
        state.following.extend(following)
        state.auxiliary.append(auxiliary)

    def propose(self, jobs: Sequence[Job]) -> list[DraftTree]:
        self.catch_up([job.state for job in jobs])
        trees: dict[int, DraftTree] = {}
        chains = [index for index, job in enumerate(jobs) if not job.nodes]
        grown = [index for index, job in enumerate(jobs) if job.nodes]
        for indices, draft in ((chains, self._chains), (grown, self._trees)):
            if indices:
                trees.update(zip(indices, draft([jobs[index] for index in indices]), strict=True))
        return [trees[index] for index in range(len(jobs))]

    def catch_up(self, states: Sequence[HeadState]) -> int:
        """Read what the target has read since, with its true states: all sequences in one pass, when it is not long."""
        cache = self.runner.cache
        waiting = [state for state in states if state.backlog]
        total = sum(state.backlog for state in waiting)
        fused = self._fuse(waiting)
        while waiting:
            room, segments, parts = self.read_limit, list[Segment](), list[Tensor]()
            reading: list[tuple[HeadState, int]] = []
            for state in waiting:
                count = min(state.backlog, room)
                if not count:
                    break
                room -= count
                past = cache.lengths[state.slot]
                segments.append(Segment(state.slot, past, past, state.following[:count]))
                parts.append(fused[id(state)][:count])
                reading.append((state, count))
            batch = Batch.of(segments, self.device)
            output = self.runner.forward(batch, torch.cat(parts))
            for index, (state, count) in enumerate(reading):
                cache.extend(state.slot, count)
                state.hidden = output[batch.rows(index).stop - 1, None]
                fused[id(state)] = fused[id(state)][count:]
                del state.following[:count]
            waiting = [state for state in waiting if state.backlog]
        for state in states:
            state.auxiliary.clear()
        return total

    def _fuse(self, waiting: Sequence[HeadState]) -> dict[int, Tensor]:
        """The states that wait, [backlog, hidden] for each sequence: the weights are read once for all of them."""
        if not waiting:
            return {}
        fused = self.runner.fuse(torch.cat([states for state in waiting for states in state.auxiliary]))
        parts = fused.split([state.backlog for state in waiting])
        return {id(state): part for state, part in zip(waiting, parts, strict=True)}

    def _chains(self, jobs: list[Job]) -> list[DraftTree]:
        lengths = self.runner.cache.lengths
        observed = [lengths[job.state.slot] for job in jobs]  # also the position of the last token known
        drafts: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in jobs]  # tokens [1] and q [1, draft_vocab]
        active = list(range(len(jobs)))
        hidden = torch.cat([job.state.hidden for job in jobs])  # [active, hidden]
        for step in range(max(job.length for job in jobs)):
            logits = self.runner.logits(hidden)  # [active, draft_vocab]
            for row, index in enumerate(active):
                token, q = jobs[index].rule.draft(logits[row, None], self.vocabulary, [observed[index] + 1 + step])
                drafts[index][0].append(token)
                if q is not None:
                    drafts[index][1].append(q)
            going_on = [row for row, index in enumerate(active) if step + 1 < jobs[index].length]
            if not going_on:
                break
            hidden = hidden if len(going_on) == len(active) else hidden[going_on]
            active = [active[row] for row in going_on]
            segments = [
                Segment(jobs[index].state.slot, observed[index], observed[index] + step, [0]) for index in active
            ]
            # the drafted ids stay on the device: nothing waits for it inside the chain
            ids = torch.cat([drafts[index][0][-1] for index in active])
            hidden = self.runner.forward(Batch.of(segments, self.device, ids), hidden)
        tokens = torch.cat([token for chain, _ in drafts for token in chain]).tolist()
        trees, start = [], 0
        for job, (_, distributions) in zip(jobs, drafts, strict=True):
            q = spread(torch.cat(distributions), self.vocabulary, self.vocab_size) if distributions else None
            trees.append(DraftTree.chain(tokens[start : start + job.length], q))
            start += job.length
        return trees

    def _trees(self, jobs: list[Job]) -> list[DraftTree]:
        lengths = self.runner.cache.lengths
        observed = [lengths[job.state.slot] for job in jobs]
        growers = [TreeGrower(self.branching, job.length, job.nodes) for job in jobs]
        # of the nodes that were read last, [nodes, hidden]; at first the last token known
        states: dict[int, Tensor] = {index: job.state.hidden for index, job in enumerate(jobs)}
        depth = 1  # of the nodes to be found next
        while states:
            logits = self.runner.logits(torch.cat(list(states.values())))
            segments, inputs, growing, start = list[Segment](), list[Tensor](), list[int](), 0
            for index, hidden in states.items():
                count, place = len(hidden), observed[index] + depth
                scores = jobs[index].rule.candidate_scores(
                    logits[start : start + count], self.vocabulary, [place] * count
                )
                start += count
                grower = growers[index]
                frontier = grower.grow(scores, self.vocabulary)
                if frontier is None:
                    continue
                parents = list(grower.read_parents)
                past = observed[index] + len(parents) - len(frontier.tokens)
                segments.append(Segment(jobs[index].state.slot, observed[index], past, frontier.tokens, parents))
                inputs.append(hidden[frontier.rows])
                growing.append(index)
            if not growing:
                break
            batch = Batch.of(segments, self.device)
            output = self.runner.forward(batch, torch.cat(inputs))
            states = {index: output[slice_of(batch.rows(row))] for row, index in enumerate(growing)}
            depth += 1
        return [grower.tree() for grower in growers]


def spread(q: Tensor, vocabulary: Tensor, vocab_size: int) -> Tensor:
    """Distributions [K, draft_vocab] -> [K, vocab]: tokens outside the draft vocabulary have none."""
    return q.new_zeros(len(q), vocab_size).index_copy(1, vocabulary, q)


def slice_of(rows: range) -> slice:
    return slice(rows.start, rows.stop)


# Drafts from a head that knows all positions at once, such as Medusa: no cache, and nothing to catch up on.


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
