"""The rules on chains and trees: what is accepted, what must not matter, and the text of shared noise.

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

from serving.engine.noise import choose
from serving.engine.sampling import SamplingParams
from serving.engine.verification import (
    RULES,
    DraftTree,
    Greedy,
    Rejection,
    Rule,
    SharedNoise,
    Verdict,
    draft_acceptance,
    follow,
    greedy_choices,
    make_rule,
)

VOCAB = 7
VOCABULARY = torch.tensor([0, 2, 3, 4, 6])  # the head lacks tokens
CASES = int(os.environ.get("EXACTNESS_CASES", "150"))  # of each property


def random_tree(seed: int) -> DraftTree:
    """Any tree at all; no head would grow most of them."""
    source = random.Random(seed)
    tokens: list[int] = []
    parents: list[int] = []
    for _ in range(source.randint(0, 9)):
        parent, token = source.randint(-1, len(tokens) - 1), source.randrange(VOCAB)
        if (parent, token) not in zip(parents, tokens, strict=True):
            tokens.append(token)
            parents.append(parent)
    return DraftTree(tokens, parents)


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


@given(
    tree=st.integers(0, 10**6).map(random_tree), choices=st.lists(st.integers(0, VOCAB - 1), min_size=10, max_size=10)
)
def test_the_longest_path_that_equals_the_choices_is_accepted(tree: DraftTree, choices: list[int]) -> None:
    verdict = follow(tree, choices.__getitem__)

    def chosen(node: int) -> bool:
        return all(choices[tree.parents[n] + 1] == tree.tokens[n] for n in tree.path(node))

    longest = max((tree.path(node) for node in range(len(tree)) if chosen(node)), key=len, default=[])
    assert verdict == Verdict(longest, choices[longest[-1] + 1 if longest else 0])


def test_greedy_choices_are_the_largest_logits() -> None:
    assert greedy_choices(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])) == [1, 0]


@pytest.mark.parametrize("temperatures", [(0.0,), (0.3, 1.0, 1.7)], ids=["greedy", "shared noise"])
def test_speculation_does_not_change_the_text(temperatures: tuple[float, ...]) -> None:
    accepted = 0

    @given(params=requests(temperatures), seed=st.integers(0, 2**63 - 1))
    @settings(max_examples=CASES)
    def check(params: SamplingParams, seed: int) -> None:
        nonlocal accepted
        target = Model(seed, VOCAB)
        head = Model(seed ^ 1, VOCAB, like=target, likeness=0.8)
        rule, verifications = make_rule("shared-noise", params, seed), 0
        plan = plan_of(rule, head, seed)

        def counted(tokens: Text) -> DraftTree:
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
def test_a_verdict_is_a_path_of_possible_tokens(params: SamplingParams, seed: int) -> None:
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
def test_rows_off_the_path_do_not_matter(name: str, seed: int) -> None:
    params, target = SamplingParams(temperature=0.9, top_k=4), Model(seed, VOCAB)
    rule = make_rule(name, params, seed)
    tree = plan_of(rule, Model(seed + 1, VOCAB, like=target, likeness=0.8), seed)(())
    logits, processor = rows_of(target, (), tree), new_processor(params, VOCAB)
    verdict = rule.verify(logits, tree, 0, processor)
    looked_at = torch.tensor([0, *(node + 1 for node in verdict.path)])
    void = torch.full_like(logits, torch.nan).index_copy(0, looked_at, logits[looked_at])
    assert rule.verify(void, tree, 0, processor) == verdict


@pytest.mark.parametrize("name", list(RULES))
def test_a_head_that_is_the_target_is_always_right(name: str) -> None:
    target, params = Model(5, VOCAB), SamplingParams(temperature=0.8)
    for seed in range(25):
        rule = make_rule(name, params, seed)
        chain = drafted_chain(rule, target, torch.arange(VOCAB).flip(0), (1, 2), 4)
        verdict = rule.verify(rows_of(target, (1, 2), chain), chain, 2, new_processor(params, VOCAB))
        assert verdict.path == [0, 1, 2, 3]


def test_without_drafts_both_rules_choose_alike() -> None:
    target, params = Model(5, VOCAB), SamplingParams(temperature=0.8)
    for seed in range(25):
        first, second = (decode(rule(params, seed), target, params, nothing, 4) for rule in RULES.values())
        assert first == second


def test_what_replaces_a_draft_is_drawn_by_its_position() -> None:
    params, position = SamplingParams(temperature=1.0), 7
    logits = torch.tensor([[-99.0, 99.0, -99.0], [0.3, 0.0, -99.0], [0.0, 0.0, 0.0]])
    chain = DraftTree.chain([1, 2], torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))  # right for sure, and wrong
    for drafts in (chain, DraftTree([1, 2], [-1, 0])):
        for seed in range(25):
            verdict = Rejection(params, seed).verify(logits, drafts, position, new_processor(params, 3))
            assert verdict == Verdict([0], int(choose(logits[1:2].log_softmax(dim=-1), seed, [position + 1])))


def test_temperature_zero_is_greedy_under_both_rules() -> None:
    for name in RULES:
        assert isinstance(make_rule(name, SamplingParams(temperature=0.0), 0), Greedy)


def test_rounding_makes_no_impossible_draft_acceptable() -> None:
    p, q = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])
    assert (
        draft_acceptance(p, q, 0) == 0.0
        and draft_acceptance(p, q, 1) == 1.0
        and draft_acceptance(q, p.flip(0), 1) == 0.0
    )


def test_a_candidate_that_is_certain_but_for_rounding_is_accepted() -> None:
    params, tree = SamplingParams(temperature=1.0), DraftTree([1, 0], [-1, -1])
    logits = torch.tensor([[-200.0, 50.0, -200.0]]).repeat(3, 1)
    for seed in range(20):
        assert Rejection(params, seed).verify(logits, tree, 0, new_processor(params, 3)) == Verdict([0], 1)


@pytest.mark.parametrize("rule", [Greedy, SharedNoise, Rejection])
def test_scores_are_log_probabilities(rule: type[Greedy] | type[SharedNoise] | type[Rejection]) -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    scores = rule(SamplingParams(temperature=0.7), 1).candidate_scores(logits, VOCABULARY, [4, 4, 5])
    assert scores.shape == (3, 5) and scores.dtype == torch.float32
    assert scores.exp().sum(dim=-1).allclose(torch.ones(3)) and (scores <= 0).all()


def test_a_frontier_shares_the_noise_of_its_position() -> None:
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


def test_scores_with_noise_make_the_best_trees() -> None:
    params, vocab = SamplingParams(temperature=1.0), 20
    accepted = dict.fromkeys((SharedNoise, RankedWithoutNoise, WithoutNoise), 0)
    for seed in range(60):
        target = Model(seed, vocab)
        head = Model(seed + 1000, vocab, like=target, likeness=0.6)
        for rule_type in accepted:
            rule = rule_type(params, seed)
            tree = drafted_tree(rule, head, torch.arange(vocab), (), top_k=3, depth=4, size=8)
            accepted[rule_type] += len(
                rule.verify(rows_of(target, (), tree), tree, 0, new_processor(params, vocab)).path
            )
    assert accepted[SharedNoise] > 1.3 * max(accepted[RankedWithoutNoise], accepted[WithoutNoise])
