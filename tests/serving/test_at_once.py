"""Proposals of a head that knows all positions at once: against its own passes, and against enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import make_tiny_head
from tiny_targets import CONTEXT, texts_of, tiny
from torch import Tensor

from serving.engine import Engine, SamplingParams
from serving.engine.drafting import AtOnceProposer, AtOnceState, Job
from serving.engine.kv_cache import torch_attention
from serving.engine.setup import make_proposer
from serving.engine.verification import make_rule

TARGET = tiny("llama")
HEAD = make_tiny_head(TARGET, architecture="medusa", num_heads=4)
TEXT = texts_of(TARGET)[0]
LAYERS = (TARGET.output_layer,)
STATES = TARGET.forward(torch.tensor([TEXT.tokens]), layers=LAYERS).auxiliary[0].detach()  # type: ignore[index]
GREEDY = make_rule("shared-noise", SamplingParams(), 0)


def proposer_of() -> AtOnceProposer:
    places = {"slots": 1, "capacity": CONTEXT, "kernel": torch_attention}
    proposer = make_proposer(TARGET, HEAD, LAYERS, **places)
    assert isinstance(proposer, AtOnceProposer)
    return proposer


def observe(proposer: AtOnceProposer, state: AtOnceState, start: int, end: int) -> None:
    """The target has read tokens start..end-1 of the text."""
    proposer.observe(state, TEXT.tokens[start + 1 : end + 1], STATES[start:end])


def logits_after(read: int) -> Tensor:
    """[positions, draft_vocab]: the head's on the state of the last token read."""
    return torch.stack([HEAD.logits(HEAD(STATES[read - 1], step), step) for step in range(4)])


@torch.inference_mode()
def test_chains_are_the_first_choices_of_each_position() -> None:
    proposer = proposer_of()
    state, other = proposer.join(), proposer.join()
    observe(proposer, other, 0, 11)
    read = 0
    for size, length in ((7, 4), (1, 1), (4, 3)):
        observe(proposer, state, read, read + size)
        read += size
        jobs = [Job(state, length, 0, GREEDY), Job(other, 2, 0, GREEDY)]
        for job, tree, count in zip(jobs, proposer.propose(jobs), (read, 11), strict=True):
            assert tree.is_chain and tree.q is None
            assert tree.tokens == logits_after(count)[: job.length].argmax(-1).tolist()


@torch.inference_mode()
def test_shared_noise_is_that_of_the_tokens_positions() -> None:
    proposer = proposer_of()
    state = proposer.join()
    observe(proposer, state, 0, 9)
    rule = make_rule("shared-noise", SamplingParams(temperature=0.9), 7)
    (tree,) = proposer.propose([Job(state, 4, 0, rule)])
    for step, logits in enumerate(logits_after(9)):
        token, _ = rule.draft(logits[None], HEAD.vocabulary, [10 + step])  # token 9 is known
        assert tree.tokens[step] == int(token)


@pytest.mark.parametrize(("depth", "nodes"), [(3, 12), (4, 25), (1, 5), (2, 200)])
@torch.inference_mode()
def test_a_tree_has_the_likeliest_paths_of_the_product(depth: int, nodes: int) -> None:
    proposer = proposer_of()
    state = proposer.join()
    observe(proposer, state, 0, 9)
    (tree,) = proposer.propose([Job(state, depth, nodes, GREEDY)])
    best = logits_after(9)[:depth].log_softmax(-1).topk(8)
    paths = {
        tuple(int(best.indices[level, choice]) for level, choice in enumerate(choices)): sum(
            float(best.values[level, choice]) for level, choice in enumerate(choices)
        )
        for size in range(1, depth + 1)
        for choices in itertools.product(range(8), repeat=size)
    }
    expected = sorted(paths, key=lambda path: -paths[path])[:nodes]
    assert {tuple(tree.prefix(row)) for row in range(1, len(tree) + 1)} == set(expected)


@torch.inference_mode()
def test_rejection_gets_each_positions_own_distribution() -> None:
    proposer = proposer_of()
    state = proposer.join()
    observe(proposer, state, 0, 6)
    rule = make_rule("rejection", SamplingParams(temperature=0.7), 5)
    (chain,) = proposer.propose([Job(state, 3, 0, rule)])
    (tree,) = proposer.propose([Job(state, 3, 9, rule)])
    assert tree.q is None and chain.q is not None and chain.q.shape == (3, TARGET.vocab_size)
    expected = torch.zeros_like(chain.q)
    expected[:, HEAD.vocabulary] = (logits_after(6)[:3] / 0.7).softmax(-1)
    torch.testing.assert_close(chain.q, expected)


@torch.inference_mode()
def test_nothing_but_the_last_state_is_kept() -> None:
    proposer = proposer_of()
    state = proposer.join()
    for start, end in ((0, 50), (50, 51)):
        observe(proposer, state, start, end)
        assert state.auxiliary is not None and state.auxiliary.untyped_storage().nbytes() == 32 * 8


def test_no_more_is_asked_than_the_head_has_positions_for() -> None:
    engine = Engine(TARGET, HEAD, speculation="chain", speculation_length=9)
    (answer,) = engine.generate([[9, 8, 7]], SamplingParams(30, ignore_eos=True))
    assert engine.speculation_length == 4
    assert len(answer.stats.drafted_per_position) == 4
