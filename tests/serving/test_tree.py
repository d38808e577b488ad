"""Trees of drafts: what they may be, and that growth reads and keeps exactly the best nodes."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_decoding import Model

from serving.engine.drafting import Frontier, TreeGrower
from serving.engine.verification import DraftTree

#   root - 5 - 7 - 5
#        \   \ 8
#         6 - 7
TREE = DraftTree([5, 6, 7, 8, 7, 5], [-1, -1, 0, 0, 1, 2])


def test_a_tree_knows_its_shape() -> None:
    assert len(TREE) == 6 and TREE.depth == 3 and TREE.depths == [1, 1, 2, 2, 2, 3]
    assert TREE.path(5) == [0, 2, 5] and TREE.path(1) == [1] and TREE.path(-1) == []
    assert [TREE.prefix(row) for row in range(7)] == [[], [5], [6], [5, 7], [5, 8], [6, 7], [5, 7, 5]]
    assert TREE.children == [{5: 0, 6: 1}, {7: 2, 8: 3}, {7: 4}, {5: 5}, {}, {}, {}]
    assert not TREE.is_chain


def test_a_chain_and_nothing_are_trees() -> None:
    chain, nothing = DraftTree.chain([3, 3, 3]), DraftTree.chain([])
    assert chain.parents == [-1, 0, 1] and chain.depths == [1, 2, 3] and chain.is_chain
    assert (
        len(nothing) == nothing.depth == 0 and nothing.is_chain and nothing.prefix(0) == [] and nothing == DraftTree()
    )


@pytest.mark.parametrize(
    ("tokens", "parents", "q", "message"),
    [
        ([1, 2], [-1], None, "2 tokens have 1 parents"),
        ([1, 2], [1, -1], None, "precede"),
        ([1], [-2], None, "precede"),
        ([1, 2, 2], [-1, 0, 0], None, "the same token"),
        ([1, 2], [-1, -1], torch.ones(2, 4), "only a chain"),
        ([1, 2], [-1, 0], torch.ones(1, 4), "only a chain"),
    ],
)
def test_what_is_no_tree_is_refused(tokens: list[int], parents: list[int], q: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftTree(tokens, parents, q)


Path = tuple[int, ...]
Scores = Callable[[Path], Tensor]  # a head in the form of a function: tokens on a path -> scores [vocab] after it


def scores_of(seed: int, vocab: int, ties: bool) -> Scores:
    model = Model(seed, vocab)
    return lambda path: -model(path).abs().round() if ties else (model(path) * 1.5).log_softmax(dim=-1)


def grow(scores: Scores, vocabulary: Tensor, grower: TreeGrower) -> list[Frontier]:
    """Drive a grower as the engine does, and check what it says of the nodes that are to be read."""
    frontiers: list[Frontier] = []
    paths: list[Path] = []  # of all nodes that were read; from the grower's places
    last: list[Path] = [()]  # of the rows of scores
    frontier = grower.grow(scores(())[None], vocabulary)
    while frontier is not None:
        frontiers.append(frontier)
        new = []
        for token, row, parent in zip(frontier.tokens, frontier.rows, frontier.parents, strict=True):
            above = paths[parent] if parent >= 0 else ()
            assert last[row] == above
            new.append((*above, token))
        paths += new
        assert grower.read_parents == [parent for frontier in frontiers for parent in frontier.parents]
        last = new
        frontier = grower.grow(torch.stack([scores(path) for path in new]), vocabulary)
    return frontiers


def best_nodes(scores: Scores, vocabulary: list[int], top_k: int, depth: int, size: int) -> list[Path]:
    """EAGLE-2 as it is published, nothing left out: expand the best `top_k` of each depth, rerank all candidates."""
    candidates: list[tuple[Path, float]] = []
    frontier: list[tuple[Path, float]] = [((), 0.0)]
    for _ in range(depth):
        found = []
        for path, value in frontier:
            best = scores(path).topk(min(top_k, len(vocabulary)))
            for index, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                found.append(((*path, vocabulary[index]), value + score))
        candidates += found
        frontier = sorted(found, key=lambda candidate: -candidate[1])[:top_k]
    return [path for path, _ in sorted(candidates, key=lambda candidate: -candidate[1])[:size]]


@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(1, 6),
    top_k=st.integers(1, 5),
    depth=st.integers(1, 4),
    size=st.integers(1, 20),
    ties=st.booleans(),
)
@settings(max_examples=300)
def test_growth_keeps_the_best_nodes(seed: int, vocab: int, top_k: int, depth: int, size: int, ties: bool) -> None:
    scores, vocabulary = scores_of(seed, vocab, ties), list(range(100, 100 + 3 * vocab, 3))
    grower = TreeGrower(top_k, depth, size)
    frontiers = grow(scores, torch.tensor(vocabulary), grower)
    tree = grower.tree()
    assert [tuple(tree.prefix(node + 1)) for node in range(len(tree))] == best_nodes(
        scores, vocabulary, top_k, depth, size
    )
    assert len(tree) <= size and tree.depth <= depth
    # what cannot have children in the tree is not read
    assert len(frontiers) < depth and all(len(frontier.tokens) <= min(top_k, size - 1) for frontier in frontiers)


def test_a_sure_token_does_not_come_before_its_parent() -> None:
    sure = torch.tensor([[0.0, -torch.inf]])
    grower = TreeGrower(top_k=2, depth=3, size=3)
    while grower.grow(sure, torch.tensor([8, 9])) is not None:
        pass
    assert grower.tree() == DraftTree.chain([8, 8, 8])  # and what is impossible is no candidate
