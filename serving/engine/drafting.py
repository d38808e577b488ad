"""Proposers of the tokens that the target then verifies, and the trees that they grow (EAGLE-2, arXiv 2406.16858)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from cpu_kernels.ops import FusedChains
from draft.heads import MedusaHead
from serving.engine.estimates import BINS, BRANCHING
from serving.engine.kv_cache import RaggedBatch, Segment
from serving.engine.model import HeadRunner
from serving.engine.noise import Purpose
from serving.engine.sampling import LEAST_TEMPERATURE, apply_temperature
from serving.engine.verification import DraftTree, Rule, calibrated

_CERTAIN = (1.0,) * BINS  # no calibration
_NOISE = {None: 0, Purpose.CHOICE: 1, Purpose.DRAFT: 2}  # as FusedChains.run takes it
READ_LIMIT = 512  # the most tokens that a head reads in one pass


@dataclass(frozen=True)
class Job:
    """The drafts requested of one sequence."""

    state: Any  # what `join` gave
    length: int  # at least 1: of a chain, or the depth of a tree
    nodes: int  # of a tree; 0: a chain
    rule: Rule
    # a chain ends before a token when that one, and all before it, are accepted with less than this probability
    floor: float = 0.0
    # estimates of acceptance, for equal bins of the largest q in a token's place; None: no such q is computed
    calibration: tuple[float, ...] | None = None


@dataclass(eq=False)
class HeadState:
    """A head's state of one sequence."""

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

    def __init__(self, runner: HeadRunner, layers: tuple[int, ...]) -> None:
        """layers: those whose auxiliary hidden states `observe` takes."""
        self.runner, self.layers, self.head = runner, layers, runner.head
        self.vocabulary = runner.head.vocabulary  # [draft_vocab] target ids
        self.vocab_size = runner.head.config.vocab_size
        self.device = self.vocabulary.device

    def join(self, tokens: int | None = None) -> HeadState:
        """Begin a new sequence of at most so many tokens, drafted ones included, and return its state.

        There is room where the target's cache has some: both have as many slots and blocks.
        """
        return HeadState(self.runner.cache.acquire(tokens))

    def leave(self, state: HeadState) -> None:
        """End the sequence."""
        self.runner.cache.release(state.slot)

    def observe(self, state: HeadState, following: Sequence[int], auxiliary: Tensor) -> None:
        """Take note of n tokens that the target has read, in order. What the head has to compute waits for `propose`.

        following: the token after each of them; auxiliary: [n, layers * hidden], the target's true states.
        """
        state.following.extend(following)
        state.auxiliary.append(auxiliary)

    def propose(self, jobs: Sequence[Job]) -> list[DraftTree]:
        """Draft after the last token observed of each sequence; what was observed stays as it was."""
        if self.runner.chains is not None and not any(job.nodes for job in jobs):
            return self._fused_chains(self.runner.chains, jobs)
        self.catch_up([job.state for job in jobs])
        chains, grown = [job for job in jobs if not job.nodes], [job for job in jobs if job.nodes]
        drafted = {False: iter(self._chains(chains) if chains else []), True: iter(self._trees(grown))}
        return [next(drafted[bool(job.nodes)]) for job in jobs]

    def catch_up(self, states: Sequence[HeadState]) -> int:
        """Read what the target has read since, with its true states, and return the number of its tokens.

        All sequences are read in one pass, when it is not long. `propose` does it, too.
        """
        cache = self.runner.cache
        waiting = [state for state in states if state.backlog]
        total = sum(state.backlog for state in waiting)
        if waiting:  # reduced to [backlog, hidden] each, reading the weights once for all
            reduced = self.runner.combine(torch.cat([part for state in waiting for part in state.auxiliary]))
            for state, part in zip(waiting, reduced.split([state.backlog for state in waiting]), strict=True):
                state.auxiliary = [part]
        while waiting:
            room, segments, parts = READ_LIMIT, list[Segment](), list[Tensor]()
            reading: list[tuple[HeadState, int]] = []
            for state in waiting:
                count = min(state.backlog, room)
                if not count:
                    break
                room -= count
                past = cache.lengths[state.slot]
                segments.append(Segment(state.slot, past, past, state.following[:count]))
                parts.append(state.auxiliary[0][:count])
                reading.append((state, count))
            batch = RaggedBatch.of(segments, self.device)
            output = self.runner.forward(batch, torch.cat(parts))
            for index, (state, count) in enumerate(reading):
                cache.extend(state.slot, count)
                state.hidden = output[batch.rows(index).stop - 1, None]
                state.auxiliary[0] = state.auxiliary[0][count:]
                del state.following[:count]
            waiting = [state for state in waiting if state.backlog]
        for state in states:
            state.auxiliary.clear()
        return total

    def _fused_chains(self, chains: FusedChains, jobs: Sequence[Job]) -> list[DraftTree]:
        """Read and draft as `catch_up` and `_chains` do, in one call."""
        runner, states = self.runner, [job.state for job in jobs]
        if sum(state.backlog for state in states) > READ_LIMIT:
            self.catch_up(states)
        lengths, rows, start = runner.cache.lengths, list[tuple[int, ...]](), 0
        for state in states:
            past, count = lengths[state.slot], state.backlog
            rows.append((state.slot, past, past, start, count))
            start += count
        observed = [past + count for _, _, past, _, count in rows]  # also the position of the last token known
        longest = max(job.length for job in jobs)
        keys = [
            job.rule.noise_keys(range(place + 1, place + 1 + longest)) or [(0, 0)] * longest
            for job, place in zip(jobs, observed, strict=True)
        ]
        blank = torch.zeros(1, runner.head.config.hidden_size)
        hidden = torch.cat([blank if state.hidden is None else state.hidden.float() for state in states])
        read = torch.cat([part for state in states for part in state.auxiliary] or [blank[:0]])
        noise = [_NOISE[job.rule.noise_purpose] for job in jobs]
        keep = any(job.rule.keeps_q for job in jobs)
        tokens, confidences, logits = chains.run(
            read if runner.reads_raw or not start else runner.combine(read),
            torch.tensor([token for state in states for token in state.following], dtype=torch.int64),
            torch.tensor(rows),
            hidden,
            runner.angles.table(max(observed) + longest),
            runner.cache.layers[0],
            runner.cache.table,
            torch.tensor([job.length for job in jobs]),
            torch.tensor(keys),
            torch.tensor(noise),
            torch.tensor([1.0 / max(job.rule.temperature or 1.0, LEAST_TEMPERATURE) for job in jobs]),
            torch.tensor([job.floor for job in jobs]),
            torch.tensor([job.calibration or _CERTAIN for job in jobs]),
            keep,
        )
        for state, row in zip(states, hidden, strict=True):
            runner.cache.extend(state.slot, state.backlog)
            state.hidden = row[None]
            state.following.clear()
            state.auxiliary.clear()
        trees = []
        for index, (job, chain, own) in enumerate(zip(jobs, tokens.tolist(), confidences.tolist(), strict=True)):
            drafted = [token for token in chain if token >= 0]
            q = None
            if job.rule.keeps_q:
                law = apply_temperature(logits[index, : len(drafted)], job.rule.temperature).softmax(dim=-1)
                q = spread(law, self.vocabulary, self.vocab_size)
            known = own[: len(drafted)] if job.calibration is not None else ()
            trees.append(DraftTree.chain(drafted, q, confidences=known))
        return trees

    def _chains(self, jobs: list[Job]) -> list[DraftTree]:
        lengths = self.runner.cache.lengths
        observed = [lengths[job.state.slot] for job in jobs]  # also the position of the last token known
        drafts: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in jobs]  # tokens [1] and q [1, draft_vocab]
        confidences: list[list[Tensor]] = [[] for _ in jobs]  # of each token
        survival = [1.0] * len(jobs)  # estimated, of the chain so far
        active = list(range(len(jobs)))
        hidden = torch.cat([job.state.hidden for job in jobs])  # [active, hidden]
        for step in range(max(job.length for job in jobs)):
            logits = self.runner.logits(hidden)  # [active, draft_vocab]
            going_on = []
            for row, index in enumerate(active):
                job = jobs[index]
                if job.calibration is not None:
                    largest = largest_probability(logits[row], job.rule.temperature)
                    # known before the draw, and so of the tokens before it alone; with a floor it waits for the device
                    if job.floor and self._ends(job, survival, index, float(largest), step):
                        continue
                    confidences[index].append(largest)
                token, q = job.rule.draft(logits[row, None], self.vocabulary, [observed[index] + 1 + step])
                drafts[index][0].append(token)
                if q is not None:
                    drafts[index][1].append(q)
                if step + 1 < job.length:
                    going_on.append(row)
            if not going_on:
                break
            hidden = hidden if len(going_on) == len(active) else hidden[going_on]
            active = [active[row] for row in going_on]
            segments = [
                Segment(jobs[index].state.slot, observed[index], observed[index] + step, [0]) for index in active
            ]
            # the drafted ids stay on the device: nothing waits for it inside the chain
            ids = torch.cat([drafts[index][0][-1] for index in active])
            hidden = self.runner.forward(RaggedBatch.of(segments, self.device, ids), hidden)
        tokens = torch.cat([token for chain, _ in drafts for token in chain]).tolist()
        trees, start = [], 0
        for (chain, distributions), own in zip(drafts, confidences, strict=True):
            q = spread(torch.cat(distributions), self.vocabulary, self.vocab_size) if distributions else None
            known = torch.stack(own).tolist() if own else []
            trees.append(DraftTree.chain(tokens[start : start + len(chain)], q, confidences=known))
            start += len(chain)
        return trees

    @staticmethod
    def _ends(job: Job, survival: list[float], index: int, confidence: float, step: int) -> bool:
        """Multiply the survival of a chain by its next token's, and test that it ends before that one."""
        assert job.calibration is not None
        survival[index] *= calibrated(job.calibration, confidence)
        return step > 0 and survival[index] < job.floor

    def _trees(self, jobs: list[Job]) -> list[DraftTree]:
        lengths = self.runner.cache.lengths
        observed = [lengths[job.state.slot] for job in jobs]
        growers = [TreeGrower(BRANCHING, job.length, job.nodes) for job in jobs]
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
            batch = RaggedBatch.of(segments, self.device)
            output = self.runner.forward(batch, torch.cat(inputs))
            spans = [batch.rows(row) for row in range(len(growing))]
            states = {index: output[span.start : span.stop] for index, span in zip(growing, spans, strict=True)}
            depth += 1
        return [grower.tree() for grower in growers]


@dataclass(eq=False)
class AtOnceState:
    """The state of one sequence."""

    read: int = 0  # tokens that the target has read; the last of them at position read - 1
    auxiliary: Tensor | None = None  # [1, layers * hidden], the target's states of that one


class AtOnceProposer:
    """The same as `HeadProposer` for a head such as Medusa, whose draft step k predicts token i+2+k from the target's
    states of token i alone: no cache, and nothing to catch up on.

    The distributions of a chain's tokens are independent of each other, each the head's own at its position. A tree is
    taken from their product: the nodes of the largest probability along their path.
    """

    def __init__(self, head: MedusaHead, layers: tuple[int, ...]) -> None:
        self.head, self.layers = head, layers
        self.vocabulary = head.vocabulary  # [draft_vocab] target ids

    def join(self, tokens: int | None = None) -> AtOnceState:
        return AtOnceState()

    def leave(self, state: AtOnceState) -> None:
        state.auxiliary = None

    def observe(self, state: AtOnceState, following: Sequence[int], auxiliary: Tensor) -> None:
        state.read += len(following)
        state.auxiliary = auxiliary[-1:].clone()  # not a view, which would keep the others

    def catch_up(self, states: Sequence[AtOnceState]) -> int:
        return 0

    def propose(self, jobs: Sequence[Job]) -> list[DraftTree]:
        hidden = self.head.combine(
            torch.cat([job.state.auxiliary for job in jobs]).to(self.head.dtype)
        )  # [jobs, hidden]
        steps = range(max(job.length for job in jobs))
        logits = torch.stack([self.head.logits(self.head(hidden, step), step) for step in steps], dim=1)
        return [self._draft(job, own[: job.length]) for job, own in zip(jobs, logits, strict=True)]

    def _draft(self, job: Job, logits: Tensor) -> DraftTree:
        """logits: [length, draft_vocab]."""
        # of the tokens that are drafted: the token after the last one read is known
        positions = [job.state.read + 1 + step for step in range(job.length)]
        if not job.nodes:
            confidences: list[float] = []
            if job.calibration is not None:
                largest = [largest_probability(row, job.rule.temperature) for row in logits]
                confidences = torch.stack(largest).tolist()
                survival = accumulate((calibrated(job.calibration, each) for each in confidences), mul)
                count = max(1, sum(share >= job.floor for share in survival))
                logits, positions, confidences = logits[:count], positions[:count], confidences[:count]
            tokens, q = job.rule.draft(logits, self.vocabulary, positions)
            q = None if q is None else spread(q, self.vocabulary, self.head.config.vocab_size)
            return DraftTree.chain(tokens.tolist(), q, confidences=confidences)
        grower = TreeGrower(BRANCHING, job.length, job.nodes)
        nodes = 1  # of the frontier; at first the last token known
        for scores in job.rule.candidate_scores(logits, self.vocabulary, positions):
            frontier = grower.grow(scores.expand(nodes, -1), self.vocabulary)
            if frontier is None:
                break
            nodes = len(frontier.tokens)
        return grower.tree()


Proposer = HeadProposer | AtOnceProposer


def largest_probability(logits: Tensor, temperature: float) -> Tensor:
    """The largest q [] of a token's distribution, at a request's temperature; of greedy ones at 1; [draft_vocab]."""
    return 1 / apply_temperature(logits, temperature or 1.0).exp().sum()  # the largest exponential is 1


def spread(q: Tensor, vocabulary: Tensor, vocab_size: int) -> Tensor:
    """Spread distributions [K, draft_vocab] -> [K, vocab]: tokens outside the draft vocabulary have none."""
    return q.new_zeros(len(q), vocab_size).index_copy(1, vocabulary, q)


@dataclass(frozen=True)
class Frontier:
    """Nodes that the head is to read next; `TreeGrower.grow` takes their scores in this order."""

    tokens: list[int]  # target ids
    rows: list[int]  # the row of the last scores that each came from: the head reads that row's state with it
    # each one's parent as a place among all nodes that were read, in the order of reading; -1: the root
    parents: list[int]


class TreeGrower:
    """Grows one tree from scores: additive along a path and at most 0, the log-probability of a token's acceptance.

    A node's value is the sum of the scores on its path. At each depth the `top_k` best nodes are read by the head and
    get `top_k` children each; at last the `size` best of all candidates, read or not, are the tree. No child is worth
    more than its parent, so these are connected. Nodes whose children cannot be among them are not read, and what
    the tree is does not change by that.

        grower = TreeGrower(top_k=8, depth=5, size=16)
        frontier = grower.grow(scores_of_root, vocabulary)
        while frontier is not None:
            frontier = grower.grow(scores_of(frontier), vocabulary)
        tree = grower.tree()
    """

    def __init__(self, top_k: int, depth: int, size: int) -> None:
        """top_k: children of a node, and nodes read at a depth; depth: of the deepest node; size: nodes of the tree."""
        self.top_k, self.depth, self.size = top_k, depth, size
        # all candidates, in the order in which they were found; the root is -1
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._values: list[float] = []
        self._frontier = [-1]
        self._places = {-1: -1}  # candidates that the head has read or is about to read -> their places
        self._levels = 0
        self.read_parents: list[int] = []  # `Frontier.parents` of all nodes read so far, those of the frontier last

    def grow(self, scores: Tensor, vocabulary: Tensor) -> Frontier | None:
        """Add the children of the frontier, and return those that the head is to read; None: the tree is complete.

        scores: [nodes of the frontier, draft_vocab], at first [1, draft_vocab]: the root's; vocabulary: [draft_vocab]
        target ids.
        """
        best = scores.topk(min(self.top_k, scores.shape[1]), dim=-1)  # [frontier, top_k], falling
        tokens, values = vocabulary[best.indices].tolist(), best.values.tolist()
        first = len(self._tokens)
        for parent, its_tokens, its_values in zip(self._frontier, tokens, values, strict=True):
            above = self._values[parent] if parent >= 0 else 0.0
            for token, value in zip(its_tokens, its_values, strict=True):
                if value > -math.inf:
                    self._tokens.append(token)
                    self._parents.append(parent)
                    self._values.append(above + value)
        self._levels += 1
        return self._advance(first) if self._levels < self.depth else None

    def _advance(self, first: int) -> Frontier | None:
        """Choose the next frontier among the candidates from `first` on."""
        # a child ranks after its parent: that of the last node of the tree, or of one behind it, is outside
        useful = self._ranking()[: self.size - 1]
        frontier = [candidate for candidate in useful if candidate >= first][: self.top_k]
        if not frontier:
            return None
        rows = [self._frontier.index(self._parents[candidate]) for candidate in frontier]
        parents = [self._places[self._parents[candidate]] for candidate in frontier]
        self._places.update({candidate: len(self.read_parents) + i for i, candidate in enumerate(frontier)})
        self.read_parents += parents
        self._frontier = frontier
        return Frontier([self._tokens[candidate] for candidate in frontier], rows, parents)

    def _ranking(self) -> list[int]:
        """Order the candidates from the best to the worst; of equals the first found: parents precede children."""
        return sorted(range(len(self._values)), key=lambda candidate: -self._values[candidate])

    def tree(self) -> DraftTree:
        """Return the tree of the best nodes, from the best to the worst."""
        chosen = self._ranking()[: self.size]
        node_of = {-1: -1, **{candidate: node for node, candidate in enumerate(chosen)}}
        return DraftTree(
            [self._tokens[candidate] for candidate in chosen],
            [node_of[self._parents[candidate]] for candidate in chosen],
        )
