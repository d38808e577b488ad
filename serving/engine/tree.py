"""Trees of drafted tokens, and how they are grown from a head's scores (EAGLE-2, arXiv 2406.16858)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

BRANCHING = 8  # children that a node may have, and nodes that the head reads at a depth


@dataclass(frozen=True)
class DraftTree:
    """Drafted tokens, each after another one of them or after the last known token. A chain is a tree; so is nothing.

    A verification forwards the rows [last known token, *tokens]: row 0 is the root, and row i + 1 is node i.

    Raises:
        ValueError: a parent does not precede its child, two children of one node are the same token, or q does not fit.
    """

    tokens: list[int] = field(default_factory=list)  # n target ids, parents before children
    parents: list[int] = field(default_factory=list)  # a node, or -1: the last known token
    # [n, vocab] what each token was drawn from, over the target's vocabulary: chains under the rejection rule only
    q: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.parents) != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens have {len(self.parents)} parents")
        if not all(-1 <= parent < node for node, parent in enumerate(self.parents)):
            raise ValueError(f"a parent must precede its child: {self.parents}")
        if len(set(zip(self.parents, self.tokens, strict=True))) < len(self.tokens):
            raise ValueError("two children of one node are the same token")
        if self.q is not None and not (self.is_chain and len(self.q) == len(self.tokens)):
            raise ValueError("only a chain has distributions that it was drawn from, one for each token")

    @classmethod
    def chain(cls, tokens: Sequence[int], q: Tensor | None = None) -> DraftTree:
        """Each token after the one before it."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)), q)

    def __len__(self) -> int:
        return len(self.tokens)

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
        """Of the deepest node; 0 without nodes."""
        return max(self.depths, default=0)

    @cached_property
    def children(self) -> list[dict[int, int]]:
        """For each row its children, in their order: token -> node."""
        children: list[dict[int, int]] = [{} for _ in range(len(self.tokens) + 1)]
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            children[parent + 1][token] = node
        return children

    def path(self, node: int) -> list[int]:
        """The nodes from a child of the root to this one; -1, the root: none."""
        path: list[int] = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def prefix(self, row: int) -> list[int]:
        """The drafted tokens that a row follows and ends with; none for row 0."""
        return [self.tokens[node] for node in self.path(row - 1)]


@dataclass(frozen=True)
class Frontier:
    """Nodes that the head is to read next; `TreeGrower.grow` wants their scores in this order."""

    tokens: list[int]  # target ids
    rows: list[int]  # the row of the last scores that each came from: the head reads that row's state with it
    parents: list[
        int
    ]  # each one's parent as a place among all nodes that were read, in the order of reading; -1: the root


class TreeGrower:
    """Grows one tree from scores: additive along a path and at most 0, the log-probability that a token will stand.

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
        self.read_parents: list[
            int
        ] = []  # `Frontier.parents` of all nodes read so far and of the frontier, laid end to end

    def grow(self, scores: Tensor, vocabulary: Tensor) -> Frontier | None:
        """Add the children of the frontier, and say which of them the head is to read; None: the tree is complete.

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
        """Candidates from the best to the worst; of equals the one found first, so parents precede their children."""
        return sorted(range(len(self._values)), key=lambda candidate: -self._values[candidate])

    def tree(self) -> DraftTree:
        """The best nodes, from the best to the worst."""
        chosen = self._ranking()[: self.size]
        node_of = {-1: -1, **{candidate: node for node, candidate in enumerate(chosen)}}
        return DraftTree(
            [self._tokens[candidate] for candidate in chosen],
            [node_of[self._parents[candidate]] for candidate in chosen],
        )
