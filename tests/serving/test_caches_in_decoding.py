"""After drafts that fell and plans that changed, the caches of target and head hold what a fresh pass gives."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_head
from exactness import ALL, build, params
from oracle import Case, Fickle, submit
from tiny_targets import CONTEXT, texts_of, tiny

from draft.target import Target
from serving.engine import Engine, SamplingParams
from serving.engine.acceptance import Plan
from serving.engine.drafting import HeadProposer, HeadState
from serving.engine.model import HeadRunner


@torch.inference_mode()
def fresh(target: Target, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [heads, tokens, width] of each layer, after reading the tokens in one piece."""
    engine = Engine(target, max_batch=1, prefill_chunk=CONTEXT, max_length=CONTEXT, speculation="off")
    engine.submit(ids, SamplingParams(CONTEXT - len(ids)))
    engine.step()
    cache = engine.models.runner.cache
    return [(keys[0, :, : len(ids)], values[0, :, : len(ids)]) for keys, values in cache.layers]


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("mode", ["chain", "tree of 4", "tree of 32", "auto"])
def test_the_cache_after_rollbacks_is_that_of_a_fresh_pass(family: str, mode: str) -> None:
    engine = build(family, mode, errors=0.2, max_batch=3, prefill_chunk=16)
    cases = [Case.greedy(text, text.written, params(40)) for text in texts_of(engine.target)[3:6]]
    for case in cases:
        submit(engine, case)
    engine.step()
    while min(len(row.answer.tokens) for row in engine._active) < 8:
        engine.step()
    cache = engine.models.runner.cache
    for row in engine._active:
        ids = (row.answer.prompt_ids + [token.id for token in row.answer.tokens])[:-1]
        assert cache.lengths[row.slot] == len(ids)
        for (keys, values), (fresh_keys, fresh_values) in zip(cache.layers, fresh(engine.target, ids), strict=True):
            torch.testing.assert_close(keys[row.slot, :, : len(ids)], fresh_keys, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(values[row.slot, :, : len(ids)], fresh_values, rtol=1e-12, atol=1e-12)
    assert engine._active and all(row.stats.accepted for row in engine._active)


@pytest.mark.parametrize("family", ["llama", "gemma2, windows of 5 in half of the layers, bounded scores"])
@torch.inference_mode()
def test_the_head_catches_up_on_all_that_it_missed(family: str) -> None:
    """Plans change at every step; what the head knows is what it knows after reading all true states at once."""
    target, head = tiny(family), make_tiny_head(tiny(family))
    engine = Engine(target, head, max_batch=3, prefill_chunk=5, speculation_length=8, tree_size=32)
    engine.controller = engine._decoder.controller = Fickle([Plan.chain(2), Plan.chain(5), Plan(3, 16)], seed=1)
    prompts = [[9, 8], [50, 60, 70, 80, 90, 100], list(range(3, 20))]
    for prompt in prompts:
        engine.submit(prompt, params(40, temperature=1.5, seed=4))
    looked, pauses = 0, 0
    while engine.step():
        for row in engine._active:
            state = row.drafting
            assert isinstance(state, HeadState) and state.slot is not None
            pauses += state.backlog > 2
            read = engine.models.proposer.runner.cache.lengths[state.slot]  # type: ignore[union-attr]
            known = row.answer.prompt_ids[: row.read + 1] + [token.id for token in row.answer.tokens]
            assert read + state.backlog == (row.read if row.reading else len(known) - 1)
            if read and looked < 60:
                looked += 1
                _looks_like_a_fresh_head(engine, state, known, read)
    assert looked == 60 and pauses > 5


def _looks_like_a_fresh_head(engine: Engine, state: HeadState, ids: list[int], read: int) -> None:
    target, proposer = engine.target, engine.models.proposer
    assert isinstance(proposer, HeadProposer)
    cache = proposer.runner.cache
    states = target.forward(torch.tensor([ids[:read]]), layers=proposer.layers).auxiliary
    assert states is not None
    other = HeadProposer(
        HeadRunner(target, proposer.runner.head, slots=1, capacity=CONTEXT, kernel=proposer.runner.layer.kernel),
        proposer.layers,
    )
    new = other.join()
    other.observe(new, ids[1 : read + 1], states[0])
    assert other.catch_up([new]) == read
    for (ours,), (theirs,) in zip(zip(cache.layers[0]), zip(other.runner.cache.layers[0]), strict=True):
        torch.testing.assert_close(ours[state.slot, :, :read], theirs[0, :, :read], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.hidden, new.hidden, rtol=1e-9, atol=1e-9)
