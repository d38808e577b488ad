"""The law of speculative text, enumerated exactly and by drawing; each with controls that must fail."""

import math
from collections.abc import Callable

import enumeration
import pytest
import torch
from enumeration import (
    HEAD,
    PROCESSING,
    SHAPES,
    TARGET,
    VOCABULARY,
    Script,
    ScriptedPlan,
    chains,
    confident,
    copies,
    distance,
    head_law,
    trees,
    with_tails,
)
from torch import Tensor
from toy_decoding import Model, Text, decode, drafted_chain, drafted_tree

from serving.engine import verification
from serving.engine.noise import Purpose
from serving.engine.sampling import Processor, SamplingParams
from serving.engine.verification import RULES, DraftTree, Rejection, Rule, SeededSampler, SharedNoise, make_rule


@pytest.mark.parametrize("processing", list(PROCESSING))
@pytest.mark.parametrize("k", [1, 2])
def test_rejection_of_chains_is_exact(processing, k, monkeypatch):
    params = PROCESSING[processing]
    assert distance(monkeypatch, Rejection(params, 0), params, chains(k), params) < 1e-12


@pytest.mark.parametrize("processing", list(PROCESSING))
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("name", list(RULES))
def test_trees_are_exact(name, shape, processing, monkeypatch):
    # for shared noise these are trees that the noise has no part in; where it has, the text is that of plain decoding
    # token by token, which test_verification.py holds
    params = PROCESSING[processing]
    assert distance(monkeypatch, make_rule(name, params, 0), params, trees(shape, params), params) < 1e-12


def test_what_is_drafted_may_depend_on_what_was_emitted(monkeypatch):
    params = PROCESSING["plain"]
    nothing: ScriptedPlan = lambda tokens, _: DraftTree()  # noqa: E731
    by_last = {(0,): trees("tree", params), (1,): nothing, (2,): chains(1)}

    def plan(tokens, script):
        return by_last.get(tokens[-1:], chains(2))(tokens, script)

    assert distance(monkeypatch, Rejection(params, 0), params, plan, params) < 1e-12


# between the confidences after the two tokens that a chain may begin with
FLOOR = sum(float(head_law((token,), 0.8).max()) for token in VOCABULARY.tolist()) / 2
COPYING: dict[str, ScriptedPlan] = {
    "copies": copies(2),
    "a chain and a copy": with_tails(chains(1), 1),
    "chains that end where the head is unsure": confident(2, FLOOR),
    "and copies behind them": with_tails(confident(2, FLOOR), 2),
}


@pytest.mark.parametrize("processing", list(PROCESSING))
@pytest.mark.parametrize("name", COPYING)
def test_rejection_of_copies_is_exact(name, processing, monkeypatch):
    params = PROCESSING[processing]
    assert distance(monkeypatch, Rejection(params, 0), params, COPYING[name], params) < 1e-12


def test_the_plans_of_copies_copy_and_end_chains():
    script = Script([])
    assert copies(2)((), script) == DraftTree()  # the prompt's tokens are all different
    assert copies(2)((0,), script).copied == 1
    lengths = {len(confident(2, FLOOR)((), Script([first]))) for first in range(2)}
    assert lengths == {1, 2}


def copied_where_the_head_disagrees(tokens: Text, script: Script) -> DraftTree:
    drawn, copied = chains(1)(tokens, script), copies(1)(tokens, script)
    return copied if len(copied) and copied.tokens != drawn.tokens else drawn


def cut_by_the_drawn_token(tokens: Text, script: Script) -> DraftTree:
    drawn = chains(2)(tokens, script)
    sure = [
        bool(q[token] >= 0.5) for q, token in zip(drawn.q if drawn.q is not None else [], drawn.tokens, strict=True)
    ]
    length = sure.index(False) if False in sure else len(sure)
    return DraftTree.chain(drawn.tokens[:length], drawn.q[:length] if drawn.q is not None and length else None)


def withheld(tokens: Text, script: Script) -> DraftTree:
    tree = chains(1)(tokens, script)
    return DraftTree() if 2 in tree.tokens else tree


def as_if_drawn(left: Tensor, token: int) -> float:
    return min(1.0, float(left[token] / left.sum()) / 0.5)


TOP_K, PLAIN = PROCESSING["top-k"], PROCESSING["plain"]
CHAIN, TREE, TAIL = chains(2), trees("tree", PLAIN), with_tails(chains(1), 1)
# the right parameters, those that the rule has, what is drafted, and what is broken in the rule
MISTAKES: dict[str, tuple[SamplingParams, SamplingParams, ScriptedPlan, dict[str, Callable]]] = {
    "p that is not warped": (TOP_K, SamplingParams(temperature=0.7), CHAIN, {}),
    "p of another temperature": (TOP_K, SamplingParams(temperature=1.1, top_k=2), CHAIN, {}),
    "q of another temperature": (TOP_K, TOP_K, chains(2, reported=0.3), {}),
    "drafts that are withheld for what they are": (TOP_K, TOP_K, withheld, {}),
    "copies where the head's token disagrees": (PLAIN, PLAIN, copied_where_the_head_disagrees, {}),
    "chains that end by the drawn token": (PLAIN, PLAIN, cut_by_the_drawn_token, {}),
    "copies behind a chain judged as if drawn": (PLAIN, PLAIN, TAIL, {"candidate_acceptance": as_if_drawn}),
    "a rejected copy stays possible": (PLAIN, PLAIN, TAIL, {"without": lambda left, token: left}),
    "no residual": (TOP_K, TOP_K, CHAIN, {"residual": lambda p, q: p}),
    "acceptance without q": (TOP_K, TOP_K, CHAIN, {"draft_acceptance": lambda p, q, token: float(p[token])}),
    "p of a tree that is not warped": (PLAIN, SamplingParams(temperature=1.0), TREE, {}),
    "no renormalisation": (PLAIN, PLAIN, TREE, {"candidate_acceptance": lambda left, token: float(left[token])}),
    "what fell stays possible": (PLAIN, PLAIN, TREE, {"without": lambda left, token: left}),
    "candidates judged as if drawn from a q": (PLAIN, PLAIN, TREE, {"candidate_acceptance": as_if_drawn}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_enumeration_notices_mistakes(mistake, monkeypatch):
    params, used, plan, broken = MISTAKES[mistake]
    for name, function in broken.items():
        monkeypatch.setattr(verification, name, function)
    assert distance(monkeypatch, Rejection(params, 0), used, plan, params) > 1e-3


# how much is accepted


def test_chains_are_accepted_with_one_minus_the_distance_of_p_and_q():
    p, q = (Model(seed, 5)(()).softmax(dim=0) for seed in (7, 8))
    accepted = sum(q[x].item() * verification.draft_acceptance(p, q, x) for x in range(5))
    assert accepted == pytest.approx(1 - (p - q).abs().sum().item() / 2, abs=1e-12)
    assert verification.residual(p, q).sum().item() == pytest.approx(1, abs=1e-12)
    assert verification.residual(p, p).equal(p)


def test_shared_noise_accepts_drafts_as_often_as_it_can():
    # two races with the same clocks: P(both choose i) = 1 / sum_j max(p_j / p_i, q_j / q_i) (arXiv 2408.07978)
    target, head, params, seeds = Model(7, 5), Model(8, 5), SamplingParams(temperature=1.0), 600
    p, q = (model(()).softmax(dim=0) for model in (target, head))
    expected = sum(1 / torch.maximum(p / p[i], q / q[i]).sum().item() for i in range(5))
    accepted = 0
    for seed in range(seeds):
        rule = SharedNoise(params, seed)
        chain = drafted_chain(rule, head, torch.arange(5), (), 1)
        accepted += len(rule.verify(target(())[None].repeat(2, 1), chain, 0, Processor(params, [], 5)).path)
    assert abs(accepted - seeds * expected) < 4 * math.sqrt(seeds * expected * (1 - expected))


# by drawing, with the real random numbers


def deviation(rule_of_seed: Callable[[int], Rule], params: SamplingParams, shape: str, seeds: int) -> list[float]:
    """Deviation of the first two tokens from their law; then, as controls, from laws that are off."""

    def text(rule: Rule) -> Text:
        def plan(tokens: Text) -> DraftTree:
            if shape == "chain":
                return drafted_chain(rule, HEAD, VOCABULARY, tokens, 1)
            return drafted_tree(rule, HEAD, VOCABULARY, tokens, top_k=2, depth=2, size=3)

        return decode(rule, TARGET, params, plan, 2)

    samples = [text(rule_of_seed(seed)) for seed in range(seeds)]
    others = (SamplingParams(temperature=params.temperature), SamplingParams(temperature=1.4, top_p=params.top_p))
    return [enumeration.deviations_of(samples, enumeration.law_of_target(law, 2)) for law in (params, *others)]


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("name", list(RULES))
def test_sampled_texts_follow_the_target(name, shape):
    params = SamplingParams(temperature=0.8, top_p=0.8)
    own, *others = deviation(lambda seed: make_rule(name, params, seed), params, shape, seeds=400)
    assert own < 4 < 5 < min(others)


def replaced(rule_of_seed: Callable[[int], Rule]) -> float:
    """Deviation of one token where every other draft is 2 and never right: what replaces it is 0 or 1, as likely."""
    p, q = torch.tensor([0.75, 0.25, 0.0]).double(), torch.tensor([0.5, 0.0, 0.5]).double()
    vocabulary = torch.arange(3)
    samples = []
    for seed in range(300):
        rule = rule_of_seed(seed)
        ids, drawn_from = rule.draft(q.log()[None], vocabulary, [0])
        tree = DraftTree.chain(ids.tolist(), drawn_from)
        verdict = rule.verify(p.log().repeat(2, 1), tree, 0, Processor(SamplingParams(temperature=1.0), [], 3))
        samples.append((tree.tokens[0] if verdict.path else verdict.bonus,))
    return enumeration.deviations_of(samples, {(token,): p[token].item() for token in range(3)})


def test_what_replaces_a_draft_does_not_depend_on_it(monkeypatch):
    params = SamplingParams(temperature=1.0)

    class Argmax(Rejection):
        def draft(self, logits, vocabulary, positions):
            _, q = super().draft(logits, vocabulary, positions)
            return vocabulary[logits.argmax(dim=-1)], q  # judged as if it had been drawn

    class Purposes:  # what replaces a draft is chosen by the noise that drafted it
        CHOICE, DRAFT, ACCEPT = Purpose.CHOICE, Purpose.CHOICE, Purpose.ACCEPT

    assert replaced(lambda seed: Rejection(params, seed)) < 4
    assert replaced(lambda seed: Argmax(params, seed)) > 5
    monkeypatch.setattr(verification, "Purpose", Purposes)
    monkeypatch.setattr(verification, "draft_seed", lambda seed, first_position: seed)
    assert replaced(lambda seed: Rejection(params, seed)) > 5


@pytest.mark.parametrize("changing", ["seed", "position", "candidate"])
def test_decisions_differ_in_each_of_their_keys(changing):
    key = {"seed": 1, "position": 2, "candidate": 3}
    keys = [{**key, changing: value} for value in range(200)]
    accepted = [SeededSampler(k["seed"]).accepts(0.3, k["position"], k["candidate"]) for k in keys]
    assert 30 < sum(accepted) < 90
    if changing != "candidate":
        drawn = [SeededSampler(k["seed"]).draw(torch.tensor([0.3, 0.7]).log(), k["position"]) for k in keys]
        assert 110 < sum(drawn) < 170
