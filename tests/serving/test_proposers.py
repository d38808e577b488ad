"""The proposals of a head are those that training taught it: against passes from scratch, in float64."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import make_tiny_head
from tiny_targets import CONTEXT, texts_of, tiny
from torch import Tensor

from serving.engine import Engine, SamplingParams, drafting
from serving.engine.drafting import AtOnceProposer, HeadProposer, Job
from serving.engine.kv_cache import torch_attention
from serving.engine.setup import make_proposer
from serving.engine.verification import DraftTree, Rule, make_rule

TARGET = tiny("llama")
TEXT = texts_of(TARGET)[0]
GREEDY = make_rule("shared-noise", SamplingParams(), 0)
HEAD: Any = None  # each test runs with a head of each architecture
STATES: Any = None  # [tokens, layers * hidden], the target's, that it reads
STEP_BY_STEP = pytest.mark.parametrize("head", ["eagle3", "eagle"], indirect=True)
AT_ONCE = pytest.mark.parametrize("head", ["medusa"], indirect=True)


@pytest.fixture(autouse=True, params=["eagle3", "eagle", "medusa"])
def head(request, monkeypatch):
    options = {"num_heads": 4} if request.param == "medusa" else {}
    head = make_tiny_head(TARGET, architecture=request.param, **options)
    with torch.inference_mode():
        states = TARGET.forward(torch.tensor([TEXT.tokens]), layers=head.auxiliary_layers(TARGET)).auxiliary
        monkeypatch.setitem(globals(), "HEAD", head)
        monkeypatch.setitem(globals(), "STATES", states[0])
        yield


def proposer_of() -> Any:
    layers = HEAD.auxiliary_layers(TARGET)
    return make_proposer(TARGET, HEAD, layers, 3, CONTEXT, torch_attention)


def observe(proposer: Any, state: Any, start: int, end: int) -> Any:
    """The target has read tokens start..end-1 of the text."""
    proposer.observe(state, TEXT.tokens[start + 1 : end + 1], STATES[start:end])
    return state


def logits_after(read: int, drafted: Sequence[int]) -> Tensor:
    """[draft_vocab]: the head's after `read` tokens of the text and some drafts, from scratch, a token at a time."""
    if HEAD.architecture == "medusa":
        return HEAD.logits(HEAD(STATES[read - 1], len(drafted)), len(drafted))
    hidden = HEAD.combine(STATES[None, :read])
    ids = TEXT.tokens[1 : read + 1]
    for token in [*drafted, None]:
        embeds = TARGET.embedding(torch.tensor([ids]))
        output = HEAD(embeds, hidden, torch.arange(len(ids))[None])[:, -1:]
        if token is None:
            break
        hidden, ids = torch.cat([hidden, output], dim=1), [*ids, token]
    return HEAD.logits(output)[0, 0]


def same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


class Recorder:
    """A rule that keeps the logits it is shown, and drafts and scores as given."""

    def __init__(self, tokens: Sequence[int] = (), scores: Rule = GREEDY) -> None:
        self.tokens, self.scores = list(tokens), scores
        self.logits, self.positions = list[Tensor](), list[int]()

    def draft(self, logits: Tensor, vocabulary: Tensor, positions: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        self.positions += positions
        self.logits += list(logits)
        return torch.tensor(self.tokens[len(self.logits) - len(logits) : len(self.logits)]), None

    def candidate_scores(self, logits: Tensor, vocabulary: Tensor, positions: Sequence[int]) -> Tensor:
        self.positions += positions
        self.logits += list(logits)
        return self.scores.candidate_scores(logits, vocabulary, positions)


def test_chains_read_what_training_time_test_read():
    """After blocks of any size, and beside another sequence."""
    proposer = proposer_of()
    state, other = proposer.join(), proposer.join()
    observe(proposer, other, 0, 11)
    done = 0
    for size, length in ((7, 4), (1, 1), (4, 4), (3, 2)):
        observe(proposer, state, done, done + size)
        done += size
        rules = [Recorder([9, 20, 4, 100][:n]) for n in (length, 3)]
        trees = proposer.propose([Job(state, length, 0, rules[0]), Job(other, 3, 0, rules[1])])
        for tree, rule, read in zip(trees, rules, (done, 11), strict=True):
            assert tree == DraftTree.chain(rule.tokens)
            assert rule.positions == [read + 1 + step for step in range(len(rule.tokens))]
            for step, logits in enumerate(rule.logits):
                assert same(logits, logits_after(read, rule.tokens[:step]))


def test_a_node_of_a_tree_reads_its_own_path_only():
    proposer = proposer_of()
    state, other = (observe(proposer, proposer.join(), 0, read) for read in (9, 4))
    rules = [Recorder(), Recorder()]
    trees = proposer.propose([Job(state, 4, 12, rules[0]), Job(other, 3, 20, rules[1])])
    for tree, rule, read, depth in zip(trees, rules, (9, 4), (4, 3), strict=True):
        assert len(tree) == (12 if depth == 4 else 20) and 1 < tree.depth <= depth
        for row, children in enumerate(tree.children):
            if children:
                logits = logits_after(read, tree.prefix(row))
                assert any(same(logits, seen) for seen in rule.logits)
                best = HEAD.vocabulary[logits.topk(8).indices].tolist()
                assert list(children) == best[: len(children)]  # the likeliest, in their order
        assert rule.positions[0] == read + 1 and max(rule.positions) <= read + depth


def test_rejection_gets_the_distributions_that_it_drew_from():
    proposer = proposer_of()
    state, other = (observe(proposer, proposer.join(), 0, read) for read in (6, 3))
    rule = make_rule("rejection", SamplingParams(temperature=0.7), 5)
    chain, short = proposer.propose([Job(state, 3, 0, rule), Job(other, 1, 0, rule)])
    (tree,) = proposer.propose([Job(state, 3, 9, rule)])
    assert tree.q is None and len(short.q) == 1 and len(chain.q) == 3
    for step in range(3):
        expected = torch.zeros(TARGET.vocab_size, dtype=torch.float64)
        expected[HEAD.vocabulary] = (logits_after(6, chain.tokens[:step]) / 0.7).softmax(-1)
        torch.testing.assert_close(chain.q[step], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["shared-noise", "rejection"])
def test_a_chain_ends_where_the_head_is_unsure_before_the_draw(name):
    """And is the beginning of the one without a floor: the same draws, distributions and confidences."""
    proposer = proposer_of()
    state, other = (observe(proposer, proposer.join(), 0, read) for read in (6, 3))
    calibration = tuple((place + 0.5) / 16 for place in range(16))
    lengths = set()
    for seed in range(6):
        rule = make_rule(name, SamplingParams(temperature=0.5), seed)
        length = 4 if HEAD.architecture == "medusa" else 5
        (whole,) = proposer.propose([Job(state, length, 0, rule, 0.0, calibration)])
        for step, confidence in enumerate(whole.confidences):
            q = (logits_after(6, whole.tokens[:step]) / 0.5).softmax(-1)
            assert confidence == pytest.approx(q.max().item(), rel=1e-6)
        survival = [calibration[min(15, int(each * 16))] for each in whole.confidences]
        for floor in (0.0, 0.9, *(1.001 * math.prod(survival[: n + 1]) for n in range(1, length))):
            expected = next((n for n in range(1, length) if math.prod(survival[: n + 1]) < floor), length)
            jobs = [Job(state, length, 0, rule, floor, calibration), Job(other, 2, 0, rule)]
            chain, beside = proposer.propose(jobs)
            assert chain.tokens == whole.tokens[:expected] and len(beside) == 2 and beside.confidences == []
            assert chain.confidences == pytest.approx(whole.confidences[:expected])
            assert chain.q is None or chain.q.allclose(whole.q[:expected])
            lengths.add(expected)
    assert lengths == set(range(1, length + 1))


def test_proposing_leaves_no_trace():
    proposer, fresh = proposer_of(), proposer_of()
    state, untouched = observe(proposer, proposer.join(), 0, 6), fresh.join()
    for nodes in (0, 16, 0, 8):
        proposer.propose([Job(state, 4, nodes, GREEDY)])
    observe(proposer, state, 6, 13)
    observe(fresh, untouched, 0, 13)
    for nodes in (0, 16):
        assert proposer.propose([Job(state, 4, nodes, GREEDY)]) == fresh.propose([Job(untouched, 4, nodes, GREEDY)])


@STEP_BY_STEP
@pytest.mark.parametrize("limit", [1, 3, 7, 512])
def test_catching_up_in_parts_is_catching_up_at_once(limit, monkeypatch):
    monkeypatch.setattr(drafting, "READ_LIMIT", limit)
    proposer = proposer_of()
    states = [proposer.join() for _ in range(3)]
    for state, ends in zip(states, ([0, 10], [0, 3, 4, 5, 11], []), strict=True):
        for start, end in zip(ends, ends[1:], strict=False):
            observe(proposer, state, start, end)
    assert proposer.catch_up(states) == 21 and all(not state.backlog and not state.auxiliary for state in states)
    assert proposer.catch_up(states) == 0
    assert [proposer.runner.cache.lengths[state.slot] for state in states] == [10, 11, 0]
    for state, read in zip(states, (10, 11), strict=False):
        assert same(HEAD.logits(state.hidden)[0], logits_after(read, []))


class Zigzag(Recorder):
    """Scores that make as many nodes be read as possible: sharp for three levels, then flat, again and again."""

    first = 0

    def candidate_scores(self, logits: Tensor, vocabulary: Tensor, positions: Sequence[int]) -> Tensor:
        self.logits += list(logits)
        flat = (positions[0] - self.first) % 5 == 4
        scores = torch.full_like(logits, -0.7 if flat else -3.0)
        if not flat:
            scores[:, 0] = -0.01
        return scores - torch.arange(logits.shape[1]) * 1e-6


@STEP_BY_STEP
def test_a_tree_at_the_end_of_the_context_fits_however_it_grows():
    engine = Engine(TARGET, HEAD, speculation="tree", tree_size=32, speculation_length=20, max_length=60)
    proposer = engine.proposer
    assert isinstance(proposer, HeadProposer)
    for left in (12, 21):
        rule = Zigzag()
        rule.first = 60 - left + 1
        (tree,) = proposer.propose([Job(observe(proposer, proposer.join(), 0, 60 - left), left - 2, 32, rule)])
        assert len(tree) == 32
    assert len(rule.logits) > 50


@AT_ONCE
def test_a_head_without_a_cache_keeps_the_last_state_and_drafts_as_far_as_it_can():
    proposer = proposer_of()
    assert isinstance(proposer, AtOnceProposer)
    state = proposer.join()
    for start, end in ((0, 50), (50, 51)):
        observe(proposer, state, start, end)
        assert state.auxiliary is not None and state.auxiliary.untyped_storage().nbytes() == 32 * 8
    engine = Engine(TARGET, HEAD, speculation="chain", speculation_length=9)
    (answer,) = engine.generate([[9, 8, 7]], SamplingParams(30, ignore_eos=True))
    assert engine.head_length == len(answer.stats.drafted_per_position) == 4
