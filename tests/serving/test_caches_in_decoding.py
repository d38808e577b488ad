"""After rejected drafts and changes of plans, the cache of the target holds what a fresh pass gives."""

from __future__ import annotations

import pytest
import torch
from exactness import ALL, build, params
from oracle import Case, submit
from tiny_targets import CONTEXT, texts_of

from draft.target import Target
from serving.engine import Engine, SamplingParams


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
