"""Verification of drafted tokens: rules that reproduce the target's own distribution p exactly, whatever is drafted.

`position` is that of the first token to be decided. A node of depth d is at position + d - 1, and what the target
gives after it is for position + d. p at a row is the target's law there: adjusted for the drafted tokens on the
row's path, then warped.

*Shared noise* (Daliri et al., arXiv 2408.07978). The target's choice at a position is argmax(log p + g), with g
keyed by (seed, position, token). Nodes are accepted while they equal it, so the text is that of plain decoding with the
same seed, and drafts may depend on g in any way. Greedy is g = 0.

*Rejection*. Chains are drawn from q and accepted with min(1, p/q); the first token to be rejected is replaced by a draw
from norm(max(0, p - q)) (Leviathan et al. 2211.17192, Chen et al. 2302.01318). Candidates in trees are a function
of the prefix, so q = 1: child x of a row is accepted with p(x); where it is rejected, p(x) becomes 0 and the rest is
renormalised for the next child, and after the last one the rest gives the token (EAGLE, arXiv 2401.15077). In all,
some child is accepted with the children's probability under p. A copied token is a candidate, too, the only one of its
row: it may follow drawn ones in a chain, since it counts only where they have been accepted.

Why numbers keyed by position serve rejection, too. A verification that looks at the ACCEPT (is a draft accepted) or
CHOICE (what replaces it, or the bonus token) numbers of a position does so because all before it was accepted, and
therefore emits that position's token: each is looked at in one verification only, as chain or as tree. The DRAFT
numbers of a position serve again when a chain is rejected before it. But the acceptance of x_i depends on numbers of
positions up to i, so what was drafted behind the first rejection decided nothing, and given all that was emitted its
numbers are as good as new. How long a step took, which later plans depend on, may tell of such drafts all the same: so
the DRAFT numbers are keyed by the first position of their verification, too, and never serve twice. The three purposes
are independent, and so are siblings, whose numbers are keyed by their tokens, too. This asks of the engine: how many
tokens are drafted, by the head or copied, as chain or as tree, may depend on what was emitted and accepted and how long
it took, but not on a drafted token that is then withheld. So a chain may end by the largest q of its next token, since
that depends on the tokens before it, which are verified: either they are emitted, or nothing after them counts. It may
not end by the probability of a token that was drawn, nor may copied tokens replace the head's because these disagree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from cpu_kernels.ops import choices
from serving.engine.noise import Purpose, choose, draft_seed, gumbel, position_keys, signed, uniform
from serving.engine.sampling import LEAST_TEMPERATURE, Processor, SamplingParams, apply_temperature

# row of a verification -> log p [vocab]; computed on demand: warping a row is not free
Law = Callable[[int], Tensor]


@dataclass(frozen=True)
class DraftTree:
    """Drafted tokens, each after another one of them or after the last known token. A chain is a tree; so is nothing.

    A verification forwards the rows [last known token, *tokens]: row 0 is the root, and row i + 1 is node i.

    Raises:
        ValueError: a parent does not precede its child, two children of one node are the same token, or q does not fit.
    """

    tokens: list[int] = field(default_factory=list)  # n target ids, parents before children
    parents: list[int] = field(default_factory=list)  # a node, or -1: the last known token
    # [n - copied, vocab] what each token was drawn from, over the target's vocabulary: chains under the rejection rule
    q: Tensor | None = field(default=None, compare=False)
    copied: int = 0  # so many of the last tokens of a chain were copied; the head drafted the others
    # the largest probability of each token that the head drafted for a chain, before its draw; none: not computed
    confidences: list[float] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens have {len(self.parents)} parents")
        if not all(-1 <= parent < node for node, parent in enumerate(self.parents)):
            raise ValueError(f"a parent must precede its child: {self.parents}")
        if len(set(zip(self.parents, self.tokens, strict=True))) < len(self.tokens):
            raise ValueError("two children of one node are the same token")
        if self.q is not None and not (self.is_chain and len(self.q) == self.drawn):
            raise ValueError("only a chain has distributions that it was drawn from, one for each token")
        if self.copied and not (self.is_chain and self.copied <= len(self.tokens)):
            raise ValueError("only a chain has copied tokens, at its end")

    @classmethod
    def chain(
        cls, tokens: Sequence[int], q: Tensor | None = None, *, copied: int = 0, confidences: Sequence[float] = ()
    ) -> DraftTree:
        """Return a tree of each token after the one before it."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)), q, copied, list(confidences))

    def extended(self, tokens: Sequence[int]) -> DraftTree:
        """Return this chain with copied tokens behind it."""
        copied = self.copied + len(tokens)
        return DraftTree.chain([*self.tokens, *tokens], self.q, copied=copied, confidences=self.confidences)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def drawn(self) -> int:
        """Tokens that the head drafted."""
        return len(self.tokens) - self.copied

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.tokens) - 1))

    @property
    def depths(self) -> list[int]:
        """Tokens from the last known one to each node: 1 for children of the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    @property
    def depth(self) -> int:
        """Depth of the deepest node; 0 without nodes."""
        return max(self.depths, default=0)

    @cached_property
    def children(self) -> list[dict[int, int]]:
        """Children of each row, in their order: token -> node."""
        children: list[dict[int, int]] = [{} for _ in range(len(self.tokens) + 1)]
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            children[parent + 1][token] = node
        return children

    def path(self, node: int) -> list[int]:
        """Return the nodes from a child of the root to this one; -1, the root: none."""
        path: list[int] = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def prefix(self, row: int) -> list[int]:
        """Return the drafted tokens that a row follows and ends with; none for row 0."""
        return [self.tokens[node] for node in self.path(row - 1)]


def calibrated(calibration: Sequence[float], confidence: float) -> float:
    """Return the estimate of the bin, of equal ones, that a probability falls into."""
    return calibration[bin_of(confidence, len(calibration))]


def bin_of(confidence: float, bins: int) -> int:
    """Return the one of equal bins that a probability falls into; the first for NaN."""
    return min(bins - 1, int(confidence * bins)) if confidence > 0 else 0


class Verdict(NamedTuple):
    """The result of a verification: the tokens of `path`, then `bonus`."""

    path: list[int]  # accepted nodes, from a child of the root on
    bonus: int  # the target's own token


class SeededSampler:
    """The random decisions of a request: they depend on (seed, position, purpose, candidate)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def accepts(self, probability: float, position: int, candidate: int) -> bool:
        return uniform(self.seed, Purpose.ACCEPT, [position], torch.tensor([candidate])).item() < probability

    def draw(self, log_p: Tensor, position: int) -> int:
        return int(choose(log_p[None], self.seed, [position])[0])


def follow(tree: DraftTree, choice: Callable[[int], int]) -> Verdict:
    """The longest path of the tree that equals the target's choices; choice: row -> token, called on that path only."""
    path: list[int] = []
    row = 0
    while (token := choice(row)) in tree.children[row]:
        path.append(tree.children[row][token])
        row = path[-1] + 1
    return Verdict(path, token)


def greedy_choices(logits: Tensor, compiled: bool = False) -> list[int]:
    """The greedy choice of each row: [N, vocab], adjusted where a request needs it -> N ids.

    compiled: the CPU kernels choose.
    """
    if compiled:
        return choices(logits).tolist()
    return logits.max(dim=-1).indices.tolist()  # `argmax` takes four times as long on a CPU in bfloat16


def draft_acceptance(p: Tensor, q: Tensor, token: int) -> float:
    """min(1, p(x) / q(x)), the probability that x, drawn from q, is accepted; p, q: [vocab]."""
    drawn = float(q[token])
    return min(1.0, float(p[token]) / drawn) if drawn > 0 else 0.0


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(0, p - q)) [vocab], the law of what replaces a rejected draft; p where, by rounding, nothing is left."""
    left = (p - q).clamp(min=0.0)
    total = left.sum()
    return left / total if total > 0 else p


def candidate_acceptance(left: Tensor, token: int) -> float:
    """The probability that the deterministic candidate x is accepted: p(x) renormalised over the rest of p [vocab]."""
    return float(left[token] / left.sum())


def without(left: Tensor, token: int) -> Tensor:
    """Return the rest of p [vocab], not normalised, once this token has been rejected."""
    return left.index_fill(0, torch.tensor([token], device=left.device), 0.0)


def verify_chain(tree: DraftTree, law: Law, position: int, sampler: SeededSampler) -> Verdict:
    """The rejection rule for a chain whose tokens were drawn from tree.q, and then copied."""
    assert tree.q is not None
    for node, token in enumerate(tree.tokens):
        p = law(node).exp()  # [vocab]
        q = tree.q[node].to(p.dtype) if node < tree.drawn else None
        probability = candidate_acceptance(p, token) if q is None else draft_acceptance(p, q, token)
        if not sampler.accepts(probability, position + node, token):
            left = without(p, token) if q is None else residual(p, q)
            return Verdict(list(range(node)), sampler.draw((left / left.sum()).log(), position + node))
    return Verdict(list(range(len(tree))), sampler.draw(law(len(tree)), position + len(tree)))


def verify_candidates(tree: DraftTree, law: Law, position: int, sampler: SeededSampler) -> Verdict:
    """The rejection rule for a tree, or a chain, whose tokens are deterministic given what precedes them."""
    path: list[int] = []
    row = 0
    while tree.children[row]:
        left = law(row).exp()  # [vocab]
        for token, node in tree.children[row].items():
            if sampler.accepts(candidate_acceptance(left, token), position, token):
                path.append(node)
                break
            left = without(left, token)
        else:
            return Verdict(path, sampler.draw((left / left.sum()).log(), position))
        position, row = position + 1, path[-1] + 1
    return Verdict(path, sampler.draw(law(row), position))


class Rule(ABC):
    """The drafting and verification of one request's tokens.

    The head drafts at the request's temperature; truncation and penalties are left to the target, without loss.
    """

    first_position = 0  # the first that the next verification decides: of the DRAFT numbers' key
    noise_purpose: Purpose | None = None  # of the noise that `draft` adds to the head's scores
    keeps_q = False  # verification needs the distributions that drafts were drawn from

    def __init__(self, params: SamplingParams, seed: int, compiled: bool = False) -> None:
        """compiled: the CPU kernels choose tokens, where they can."""
        self.temperature, self.seed, self.compiled = params.temperature, seed, compiled

    def noise_keys(self, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Return the keys of the noise of `draft` at these positions, as signed 64-bit numbers; none: no noise."""
        if self.noise_purpose is None:
            return []
        seed = draft_seed(self.seed, self.first_position) if self.noise_purpose == Purpose.DRAFT else self.seed
        return [(signed(a), signed(b)) for a, b in position_keys(seed, self.noise_purpose, positions)]

    @abstractmethod
    def draft(self, logits: Tensor, vocabulary: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Draft the tokens at these m positions, each a chain's next one. Never waits for the device.

        logits: [m, draft_vocab] of the head; vocabulary: [draft_vocab] target ids.

        Returns:
            target ids [m], and the distributions [m, draft_vocab] they were drawn from where verification needs them.
        """

    def candidate_scores(self, logits: Tensor, vocabulary: Tensor, positions: Sequence[int]) -> Tensor:
        """Return log-probabilities [m, draft_vocab] that tokens at m positions will be accepted, for a `TreeGrower`.

        By default log q: deterministic, as the rejection rule requires of a tree.
        """
        return apply_temperature(logits, self.temperature or 1.0).log_softmax(dim=-1)

    @abstractmethod
    def verify(self, logits: Tensor, tree: DraftTree, position: int, processor: Processor) -> Verdict:
        """Decide on the tokens from `position` on; logits: [n+1, vocab] of the target at the rows of the tree."""


class Greedy(Rule):
    """Temperature 0: the shared-noise rule without noise."""

    def draft(self, logits: Tensor, vocabulary: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return vocabulary[logits.max(dim=-1).indices], None

    def verify(self, logits: Tensor, tree: DraftTree, position: int, processor: Processor) -> Verdict:
        prefixes = [tree.prefix(row) for row in range(len(tree) + 1)]
        return follow(tree, greedy_choices(processor.adjust(logits, prefixes)).__getitem__)


class SharedNoise(Rule):
    """The target chooses argmax(log p + g), the head drafts with the same g: the text depends on the seed only."""

    noise_purpose = Purpose.CHOICE

    def _noisy(self, logits: Tensor, vocabulary: Tensor, positions: Sequence[int]) -> Tensor:
        """log q + g [m, draft_vocab], up to a constant a row. Nodes of a frontier share a position, and so noise."""
        distinct = sorted(set(positions))
        noise = gumbel(self.seed, Purpose.CHOICE, distinct, vocabulary)
        scores = apply_temperature(logits, self.temperature)
        return scores + noise[[distinct.index(position) for position in positions]].to(scores.dtype)

    def draft(self, logits: Tensor, vocabulary: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        return vocabulary[self._noisy(logits, vocabulary, positions).max(dim=-1).indices], None

    def candidate_scores(self, logits: Tensor, vocabulary: Tensor, positions: Sequence[int]) -> Tensor:
        """softmax(log q + g) as an estimate of which token argmax(log p + g) will be.

        Were q = p, the argmax would be certain; the less q resembles p, the flatter the truth. A softmax of unit
        scale is between the two, and a probability, so that nodes under different parents compare. Measured on
        random pairs p = norm(q exp(s z)) with z normal, trees of 16 nodes, accepted tokens for s = 0.3, 1, 2: by
        this 3.9, 3.2, 2.1; nodes found by log q + g but ranked by log q alone 2.1, 1.8, 1.5; without noise 1.9,
        1.7, 1.4; by sums of log q + g not normalised 0.2, 0.2, 0.1. Twice the scale gains with a strong head and
        loses with a weak one (4.8, 3.3, 1.9).
        """
        return self._noisy(logits, vocabulary, positions).log_softmax(dim=-1)

    def verify(self, logits: Tensor, tree: DraftTree, position: int, processor: Processor) -> Verdict:
        depths = [0, *tree.depths]
        if self.compiled and not (processor.active or processor.truncates):
            # all rows at once, and no softmax: it subtracts the same from all of a row
            keys = torch.tensor(self.noise_keys([position + depth for depth in depths]))
            chosen = choices(logits, keys, 1.0 / max(self.temperature, LEAST_TEMPERATURE)).tolist()
            return follow(tree, chosen.__getitem__)
        law, sampler = target_law(logits, tree, processor), SeededSampler(self.seed)
        return follow(tree, lambda row: sampler.draw(law(row), position + depths[row]))


class Rejection(Rule):
    """Tokens drawn from q are accepted with min(1, p/q), candidates (copied, or a tree's) with p.

    Without drafts it chooses as shared noise does.
    """

    noise_purpose = Purpose.DRAFT
    keeps_q = True

    def draft(self, logits: Tensor, vocabulary: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        log_q = apply_temperature(logits, self.temperature).log_softmax(dim=-1)
        return vocabulary[
            choose(log_q, draft_seed(self.seed, self.first_position), positions, Purpose.DRAFT)
        ], log_q.exp()

    def verify(self, logits: Tensor, tree: DraftTree, position: int, processor: Processor) -> Verdict:
        decide = verify_candidates if tree.q is None else verify_chain
        return decide(tree, target_law(logits, tree, processor), position, SeededSampler(self.seed))


def target_law(logits: Tensor, tree: DraftTree, processor: Processor) -> Law:
    """The target's own distribution at each row; logits: [n+1, vocab]."""

    def log_p(row: int) -> Tensor:
        return processor.warp(processor.adjust(logits[row : row + 1], [tree.prefix(row)]))[0]

    return log_p


RULES: dict[str, type[Rule]] = {"shared-noise": SharedNoise, "rejection": Rejection}


def make_rule(name: str, params: SamplingParams, seed: int, compiled: bool = False) -> Rule:
    """The rule of one request; at temperature 0 both are greedy."""
    return (RULES[name] if params.temperature > 0 else Greedy)(params, seed, compiled)
