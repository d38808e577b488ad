"""Trees of drafts: what they may be, and that growth reads and keeps exactly the best nodes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serving.engine.drafting import Frontier, TreeGrower
from serving.engine.kv_cache import Segment
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
        ([1], [0], None, "precede"),
        ([1], [-2], None, "precede"),
        ([1, 2, 2], [-1, 0, 0], None, "the same token"),
        ([1, 2], [-1, -1], torch.ones(2, 4), "only a chain"),
        ([1, 2], [-1, 0], torch.ones(1, 4), "only a chain"),
    ],
)
def test_what_is_no_tree_is_refused(tokens: list[int], parents: list[int], q: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftTree(tokens, parents, q)


@st.composite
def parents_of_a_tree(draw: st.DrawFn) -> list[int]:
    return [draw(st.integers(-1, node - 1)) for node in range(draw(st.integers(0, 12)))]


@given(parents=parents_of_a_tree(), base=st.integers(0, 3), data=st.data())
def test_a_row_sees_the_root_its_ancestors_and_itself(parents: list[int], base: int, data: st.DataObject) -> None:
    """The verification of a tree, or its last rows where the first are in the cache."""
    tree = DraftTree(list(range(len(parents))), parents)
    count = data.draw(st.integers(1, len(parents) + 1))
    cached = len(parents) + 1 - count
    segment = Segment(0, base, base + cached, [7] * count, [-1, *(parent + 1 for parent in parents)])
    seen = segment.visible().tolist()
    assert len(seen) == count
    for row, sees in enumerate(seen, cached):
        assert {place for place, is_seen in enumerate(sees) if is_seen} == {
            0,
            row,
            *(node + 1 for node in tree.path(row - 1)),
        }


class Scores:
    """A head in the form of a function: tokens on a path -> scores [vocab] of what follows."""

    def __init__(self, seed: int, vocab: int, ties: bool = False) -> None:
        self.seed, self.vocab, self.ties = seed, vocab, ties

    def __call__(self, path: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, path)) % 2**62)
        if self.ties:
            return -torch.randint(3, (self.vocab,), generator=generator).double()
        return (torch.randn(self.vocab, generator=generator, dtype=torch.float64) * 2).log_softmax(dim=-1)


Values = dict[tuple[int, ...], float]


def grow(scores: Scores, vocabulary: Tensor, grower: TreeGrower) -> list[Frontier]:
    """Drive a grower as the engine does, and check what it says of the nodes that are to be read."""
    frontiers: list[Frontier] = []
    paths: list[tuple[int, ...]] = []  # of all nodes that were read; from the grower's places
    last: list[tuple[int, ...]] = [()]  # of the rows of scores
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


def best_nodes(scores: Scores, vocabulary: list[int], top_k: int, depth: int, size: int) -> list[tuple[int, ...]]:
    """EAGLE-2 as it is published, nothing left out: expand the best `top_k` of each depth, rerank all candidates."""
    candidates: list[tuple[tuple[int, ...], float]] = []
    frontier: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
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
    scores, vocabulary = Scores(seed, vocab, ties), list(range(100, 100 + 3 * vocab, 3))
    grower = TreeGrower(top_k, depth, size)
    frontiers = grow(scores, torch.tensor(vocabulary), grower)
    tree = grower.tree()
    assert [tuple(tree.prefix(node + 1)) for node in range(len(tree))] == best_nodes(
        scores, vocabulary, top_k, depth, size
    )
    assert len(tree) <= size and tree.depth <= depth
    # what cannot have children in the tree is not read
    assert len(frontiers) < depth and all(len(frontier.tokens) <= min(top_k, size - 1) for frontier in frontiers)


def test_one_child_each_makes_a_chain_of_the_likeliest() -> None:
    scores, vocabulary = Scores(3, 5), torch.tensor([4, 9, 2, 7, 0])
    grower = TreeGrower(top_k=1, depth=4, size=4)
    grow(scores, vocabulary, grower)
    path: tuple[int, ...] = ()
    expected = []
    for _ in range(4):
        # the table is asked for by target ids, as `grow` does
        expected.append(int(vocabulary[scores(path).argmax()]))
        path = (*path, expected[-1])
    assert grower.tree() == DraftTree.chain(expected)


def test_a_sure_token_does_not_come_before_its_parent() -> None:
    sure = torch.tensor([[0.0, -torch.inf]])
    grower = TreeGrower(top_k=2, depth=3, size=3)
    while grower.grow(sure, torch.tensor([8, 9])) is not None:
        pass
    assert grower.tree() == DraftTree.chain([8, 8, 8])  # and what is impossible is no candidate


def test_a_tree_of_one_node_needs_no_second_look() -> None:
    grower = TreeGrower(top_k=4, depth=5, size=1)
    assert grower.grow(torch.tensor([[-2.0, -1.0, -3.0]]), torch.tensor([5, 6, 7])) is None
    assert grower.tree() == DraftTree.chain([6])
