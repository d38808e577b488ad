"""The rules on chains and trees: what is accepted, what must not matter, and the text of shared noise; tree growth.

That the laws are exact is the subject of test_distribution.py.
"""

import os
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_decoding import Model, Text, decode, drafted_chain, drafted_tree, new_processor, nothing, rows_of

from serving.engine import verification
from serving.engine.drafting import Frontier, TreeGrower
from serving.engine.noise import choose
from serving.engine.sampling import SamplingParams
from serving.engine.verification import RULES, DraftTree, Greedy, Rejection, Rule, SharedNoise, Verdict, make_rule

VOCAB = 7
VOCABULARY = torch.tensor([0, 2, 3, 4, 6])  # the head lacks tokens
CASES = int(os.environ.get("EXACTNESS_CASES", "150"))  # of each property


def random_tree(seed: int) -> DraftTree:
    """Any tree at all; no head would grow most of them."""
    source = random.Random(seed)
    nodes: list[tuple[int, int]] = []
    for _ in range(source.randint(0, 9)):
        node = source.randint(-1, len(nodes) - 1), source.randrange(VOCAB)
        nodes += [node] * (node not in nodes)
    return DraftTree([token for _, token in nodes], [parent for parent, _ in nodes])


@st.composite
def requests(draw: st.DrawFn, temperatures: tuple[float, ...]) -> SamplingParams:
    """Every processor that a request can ask for, alone and together."""

    def maybe(value: st.SearchStrategy[float], off: float) -> float:
        return draw(value) if draw(st.booleans()) else off

    return SamplingParams(
        temperature=draw(st.sampled_from(temperatures)),
        top_k=draw(st.sampled_from([0, 1, 3])),
        top_p=maybe(st.floats(0.3, 1.0), 1.0),
        min_p=maybe(st.floats(0.0, 0.4), 0.0),
        repetition_penalty=maybe(st.floats(0.5, 2.0), 1.0),
        presence_penalty=maybe(st.floats(-2, 2), 0.0),
        frequency_penalty=maybe(st.floats(-2, 2), 0.0),
        logit_bias=draw(st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-3, 3), max_size=2)),
        min_new_tokens=draw(st.integers(0, 3)),
    )


def plan_of(rule: Rule, head: Model, seed: int) -> Callable[[Text], DraftTree]:
    """Chains, grown trees, any trees and no drafts at all, in any order."""

    def plan(tokens: Text) -> DraftTree:
        source = random.Random(hash((seed, tokens)))
        kind, reach = source.choice(["chain", "tree", "any", "none"]), source.randint(1, 4)
        if kind == "chain":
            return drafted_chain(rule, head, VOCABULARY, tokens, reach)
        if kind == "tree":
            sizes = {"top_k": source.randint(1, 4), "depth": reach, "size": source.randint(1, 12)}
            return drafted_tree(rule, head, VOCABULARY, tokens, **sizes)
        return random_tree(source.randrange(10**6)) if kind == "any" else DraftTree()

    return plan


@given(seed=st.integers(0, 10**6), choices=st.lists(st.integers(0, VOCAB - 1), min_size=10, max_size=10))
def test_the_longest_path_that_equals_the_choices_is_accepted(seed, choices):
    tree = random_tree(seed)
    verdict = verification.follow(tree, choices.__getitem__)

    def chosen(node):
        return all(choices[tree.parents[n] + 1] == tree.tokens[n] for n in tree.path(node))

    longest = max((tree.path(node) for node in range(len(tree)) if chosen(node)), key=len, default=[])
    assert verdict == Verdict(longest, choices[longest[-1] + 1 if longest else 0])


@pytest.mark.parametrize("temperatures", [(0.0,), (0.3, 1.0, 1.7)], ids=["greedy", "shared noise"])
def test_speculation_does_not_change_the_text(temperatures):
    accepted = 0

    @given(params=requests(temperatures), seed=st.integers(0, 2**63 - 1))
    @settings(max_examples=CASES)
    def check(params, seed):
        nonlocal accepted
        target = Model(seed, VOCAB)
        head = Model(seed ^ 1, VOCAB, like=target, likeness=0.8)
        rule, verifications = make_rule("shared-noise", params, seed), 0
        plan = plan_of(rule, head, seed)

        def counted(tokens):
            nonlocal verifications
            verifications += 1
            return plan(tokens)

        text = decode(rule, target, params, counted, 6)
        assert text == decode(rule, target, params, nothing, 6)
        accepted += 6 - verifications

    check()
    assert accepted > CASES  # or nothing was tested


@given(params=requests((0.5, 1.0)), seed=st.integers(0, 2**62))
@settings(max_examples=CASES)
def test_a_verdict_is_a_path_of_possible_tokens(params, seed):
    target = Model(seed, VOCAB)
    head = Model(seed + 1, VOCAB, like=target, likeness=0.8)
    rule = Rejection(params, seed)
    tree = plan_of(rule, head, seed)(())
    processor = new_processor(params, VOCAB)
    verdict = rule.verify(rows_of(target, (), tree), tree, 0, processor)
    assert verdict.path == (tree.path(verdict.path[-1]) if verdict.path else [])
    text = [*(tree.tokens[node] for node in verdict.path), verdict.bonus]
    for place, token in enumerate(text):
        logits = target(tuple(text[:place]))[None]
        assert processor.warp(processor.adjust(logits, [text[:place]]))[0, token] > -torch.inf


@pytest.mark.parametrize("name", list(RULES))
@given(seed=st.integers(0, 2**62))
@settings(max_examples=30)
def test_rows_off_the_path_do_not_matter(name, seed):
    params, target = SamplingParams(temperature=0.9, top_k=4), Model(seed, VOCAB)
    rule = make_rule(name, params, seed)
    tree = plan_of(rule, Model(seed + 1, VOCAB, like=target, likeness=0.8), seed)(())
    logits, processor = rows_of(target, (), tree), new_processor(params, VOCAB)
    verdict = rule.verify(logits, tree, 0, processor)
    looked_at = torch.tensor([0, *(node + 1 for node in verdict.path)])
    void = torch.full_like(logits, torch.nan).index_copy(0, looked_at, logits[looked_at])
    assert rule.verify(void, tree, 0, processor) == verdict


@pytest.mark.parametrize("name", list(RULES))
def test_a_head_that_is_the_target_is_always_right(name):
    target, params = Model(5, VOCAB), SamplingParams(temperature=0.8)
    assert isinstance(make_rule(name, SamplingParams(temperature=0.0), 0), Greedy)
    for seed in range(25):
        rule = make_rule(name, params, seed)
        # without drafts, both rules choose alike
        plain = decode(rule, target, params, nothing, 4)
        assert plain == decode(SharedNoise(params, seed), target, params, nothing, 4)
        chain = drafted_chain(rule, target, torch.arange(VOCAB).flip(0), (1, 2), 4)
        verdict = rule.verify(rows_of(target, (1, 2), chain), chain, 2, new_processor(params, VOCAB))
        assert verdict.path == [0, 1, 2, 3]


def test_what_replaces_a_draft_is_drawn_by_its_position():
    params, position = SamplingParams(temperature=1.0), 7
    logits = torch.tensor([[-99.0, 99.0, -99.0], [0.3, 0.0, -99.0], [0.0, 0.0, 0.0]])
    chain = DraftTree.chain([1, 2], torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))  # right for sure, and wrong
    for drafts in (chain, DraftTree([1, 2], [-1, 0])):
        for seed in range(25):
            verdict = Rejection(params, seed).verify(logits, drafts, position, new_processor(params, 3))
            assert verdict == Verdict([0], int(choose(logits[1:2].log_softmax(dim=-1), seed, [position + 1])))


def test_a_candidate_that_is_certain_but_for_rounding_is_accepted():
    params, tree = SamplingParams(temperature=1.0), DraftTree([1, 0], [-1, -1])
    logits = torch.tensor([[-200.0, 50.0, -200.0]]).repeat(3, 1)
    for seed in range(20):
        assert Rejection(params, seed).verify(logits, tree, 0, new_processor(params, 3)) == Verdict([0], 1)


def test_scores_are_log_probabilities_and_a_frontier_shares_the_noise_of_its_position():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for each in (Greedy, SharedNoise, Rejection):
        scores = each(SamplingParams(temperature=0.7), 1).candidate_scores(logits, VOCABULARY, [4, 4, 5])
        assert scores.shape == (3, 5) and scores.dtype == torch.float32
        assert scores.exp().sum(dim=-1).allclose(torch.ones(3)) and (scores <= 0).all()
    logits = torch.zeros(3, 5)
    rule = SharedNoise(SamplingParams(temperature=1.0), 1)
    first, second, other = rule.candidate_scores(logits, VOCABULARY, [4, 4, 5])
    assert first.equal(second) and not first.allclose(other)
    ids, _ = rule.draft(logits, VOCABULARY, [4, 4, 5])  # and a chain drafts the best candidate
    assert ids.tolist() == [int(VOCABULARY[row.argmax()]) for row in (first, second, other)]


class WithoutNoise(SharedNoise):
    def candidate_scores(self, logits: Tensor, vocabulary: Tensor, positions: object) -> Tensor:
        return logits.log_softmax(dim=-1)


class RankedWithoutNoise(SharedNoise):
    """Children are found by log q + g; nodes are ranked by their log q."""

    def candidate_scores(self, logits: Tensor, vocabulary: Tensor, positions: object) -> Tensor:
        found = super().candidate_scores(logits, vocabulary, positions).topk(3, dim=-1).indices  # type: ignore[arg-type]
        log_q = logits.log_softmax(dim=-1)
        return torch.full_like(log_q, -torch.inf).scatter(-1, found, log_q.gather(-1, found))


def test_scores_with_noise_make_the_best_trees():
    params, vocab = SamplingParams(temperature=1.0), 20
    accepted = dict.fromkeys((SharedNoise, RankedWithoutNoise, WithoutNoise), 0)
    for seed in range(60):
        target, processor = Model(seed, vocab), new_processor(params, vocab)
        head = Model(seed + 1000, vocab, like=target, likeness=0.6)
        for rule_type in accepted:
            rule = rule_type(params, seed)
            tree = drafted_tree(rule, head, torch.arange(vocab), (), top_k=3, depth=4, size=8)
            accepted[rule_type] += len(rule.verify(rows_of(target, (), tree), tree, 0, processor).path)
    assert accepted[SharedNoise] > 1.3 * max(accepted[RankedWithoutNoise], accepted[WithoutNoise])


# trees

#   root - 5 - 7 - 5
#        \   \ 8
#         6 - 7
TREE = DraftTree([5, 6, 7, 8, 7, 5], [-1, -1, 0, 0, 1, 2])


def test_a_tree_knows_its_shape():
    assert len(TREE) == 6 and TREE.depth == 3 and TREE.depths == [1, 1, 2, 2, 2, 3]
    assert TREE.path(5) == [0, 2, 5] and TREE.path(1) == [1] and TREE.path(-1) == []
    assert [TREE.prefix(row) for row in range(7)] == [[], [5], [6], [5, 7], [5, 8], [6, 7], [5, 7, 5]]
    assert TREE.children == [{5: 0, 6: 1}, {7: 2, 8: 3}, {7: 4}, {5: 5}, {}, {}, {}]
    assert not TREE.is_chain


def test_a_chain_and_nothing_are_trees():
    chain, nothing = DraftTree.chain([3, 3, 3]), DraftTree.chain([])
    assert chain.parents == [-1, 0, 1] and chain.depths == [1, 2, 3] and chain.is_chain
    assert len(nothing) == nothing.depth == 0 and nothing.is_chain and nothing == DraftTree()


@pytest.mark.parametrize(
    ("tokens", "parents", "q", "message"),
    [
        ([1, 2], [-1], None, "2 tokens have 1 parents"),
        ([1, 2], [1, -1], None, "precede"),
        ([1, 2, 2], [-1, 0, 0], None, "the same token"),
        ([1, 2], [-1, 0], torch.ones(1, 4), "only a chain"),
    ],
)
def test_what_is_no_tree_is_refused(tokens, parents, q, message):
    with pytest.raises(ValueError, match=message):
        DraftTree(tokens, parents, q)


Path = tuple[int, ...]
Scores = Callable[[Path], Tensor]  # a head in the form of a function: tokens on a path -> scores [vocab] after it


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
    st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 20), st.booleans()
)
@settings(max_examples=200)
def test_growth_keeps_the_best_nodes(seed, vocab, top_k, depth, size, ties):
    model = Model(seed, vocab)

    def scores(path):
        return -model(path).abs().round() if ties else (model(path) * 1.5).log_softmax(dim=-1)

    vocabulary = list(range(100, 100 + 3 * vocab, 3))
    grower = TreeGrower(top_k, depth, size)
    frontiers = grow(scores, torch.tensor(vocabulary), grower)
    tree = grower.tree()
    nodes = [tuple(tree.prefix(node + 1)) for node in range(len(tree))]
    assert nodes == best_nodes(scores, vocabulary, top_k, depth, size)
    assert len(tree) <= size and tree.depth <= depth
    # what cannot have children in the tree is not read
    assert len(frontiers) < depth and all(len(frontier.tokens) <= min(top_k, size - 1) for frontier in frontiers)


def test_a_sure_token_does_not_come_before_its_parent():
    sure = torch.tensor([[0.0, -torch.inf]])
    grower = TreeGrower(top_k=2, depth=3, size=3)
    while grower.grow(sure, torch.tensor([8, 9])) is not None:
        pass
    assert grower.tree() == DraftTree.chain([8, 8, 8])  # and what is impossible is no candidate
