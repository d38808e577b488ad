"""The memory of the KV cache: what fits into it, who waits for it, and that all of it comes back.

LOAD_REQUESTS=2000 in the environment sends as many, with prompts of up to 8,000 tokens.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from oracle import all_free
from tiny_targets import tiny

from draft.errors import UserError
from draft.memory import free_memory
from serving.engine import Engine, Request, SamplingParams, Speculation
from serving.engine.drafting import HeadProposer
from serving.engine.kv_cache import LayerShape
from serving.engine.memory import fit_cache, in_words
from serving.engine.step import BESIDE_STREAMS

CPU = torch.device("cpu")
TARGET = tiny("llama")
HEAD = make_tiny_head(TARGET)
CHAIN: dict[str, Any] = {"speculation": "chain", "speculation_length": 4}
SHAPES = [LayerShape(2, 8, 4, torch.bfloat16, CPU)] * 3  # 144 bytes a token
LONG = make_tiny_target(dtype=torch.float32, max_length=4096)
OVERHANG = 33  # places for drafts: 8 for each of 4, and one
REQUESTS = int(os.environ.get("LOAD_REQUESTS", 150))


def params(count: int = 8, **fields: Any) -> SamplingParams:
    return SamplingParams(count, **{"ignore_eos": True, **fields})


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def answers(requests: Iterable[Request]) -> list[list[int]]:
    return [request.result(timeout=0).token_ids for request in requests]


def alone(prompts: Sequence[list[int]], each: Any) -> list[list[int]]:
    """The answers of an engine without speculation, one prompt after the other."""
    return [answer.token_ids for answer in Engine(TARGET, max_batch=1, speculation="off").generate(prompts, each)]


def block_bytes(engine: Engine) -> int:
    return engine.models.cache_size.block_bytes


# what fits


def test_the_cache_takes_what_is_needed_or_what_fits() -> None:
    whole = fit_cache(SHAPES, slots=4, capacity=100, least=1)
    assert (whole.blocks, whole.block_bytes, whole.capacity, whole.tokens) == (28, 16 * 144, 100, 448)
    part = fit_cache(SHAPES, slots=4, capacity=100, least=1, memory=5 * 16 * 144 + 9)
    assert (part.blocks, part.capacity, str(part)) == (5, 80, "11.5 kB, 80 tokens")
    endless = fit_cache(SHAPES, slots=16, capacity=10**12, least=1)  # from what is free on this machine
    assert 0 < endless.blocks * endless.block_bytes < 0.9 * free_memory(CPU) * 1.1
    with pytest.raises(UserError, match=r"14\.4 kB, of which a sequence takes 2\.3 kB for each 16 tokens.*16\.1 kB"):
        fit_cache(SHAPES, slots=1, capacity=200, least=100, memory=14_400)
    with pytest.raises(
        UserError, match="memory is 1e[+]06 TB, and .* are free on cpu; give --kv-cache-memory a smaller"
    ):
        fit_cache(SHAPES, slots=1, capacity=100, least=1, memory=10**18)


@pytest.mark.parametrize(("size", "words"), [(999, "999 B"), (9_140_000_000, "9.14 GB"), (512_000_000, "512 MB")])
def test_sizes_in_words(size: int, words: str) -> None:
    assert in_words(size) == words


def test_a_context_beyond_the_memory_is_served_as_far_as_it_goes() -> None:
    target = make_tiny_target(dtype=torch.float32, max_length=10_485_760)
    engine = Engine(target, make_tiny_head(target), max_batch=16, **CHAIN)
    assert engine.max_length > 4096
    room = 70 * block_bytes(engine)
    small = Engine(target, make_tiny_head(target), max_batch=4, kv_cache_memory=room, mode="eager", **CHAIN)
    assert small.max_length == 70 * 16 - OVERHANG
    with pytest.raises(
        UserError, match=rf"exceed the context of 1087, which is what the KV cache holds \({small.models.cache_size}\)"
    ):
        small.submit([5] * 1000, params(88))
    assert len(small.generate([[5] * 1000], params(3))[0].token_ids) == 3
    # without a limit of their own, so many as are served at once share the cache
    assert small.default_new_tokens(100) == 17 * 16 - OVERHANG - 100
    assert small.default_new_tokens(1083) == 4 and small.default_new_tokens(260) == (17 * 16 - OVERHANG) // 2
    with pytest.raises(UserError, match="at least"):
        Engine(target, max_length=2000, kv_cache_memory=room, mode="eager")


# who waits


def test_requests_wait_for_blocks_in_their_order_and_a_large_one_is_not_overtaken() -> None:
    memory = 9 * block_bytes(Engine(TARGET, max_batch=4))
    engine = Engine(TARGET, max_batch=4, speculation_length=4, kv_cache_memory=memory)
    small, large = [engine.submit([50 + i], params(10)) for i in range(3)], [engine.submit([60] * 8, params(50))]
    later = [engine.submit([70], params(3))]
    engine.step()
    assert (engine.running, engine.waiting) == (3, 2) and engine.cache_usage == 1.0
    while not large[0].times.started:
        assert not later[0].times.started
        engine.step()
    assert sum(request.done for request in small) >= 2  # their blocks were not enough for it one by one
    finish(engine)
    each = [params(10)] * 3 + [params(50), params(3)]
    assert answers([*small, *large, *later]) == alone([[50], [51], [52], [60] * 8, [70]], each)
    assert all_free(engine.models.runner.cache)


def test_blocks_come_back_however_a_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(TARGET, HEAD, max_batch=3, prefill_chunk=8, **CHAIN)
    assert isinstance(engine.proposer, HeadProposer)
    caches = engine.models.runner.cache, engine.proposer.runner.cache
    honest, text = engine.models.runner.forward, alone([[50]], params(12))[0]
    for round_ in range(3):
        length = engine.submit([50], params(12))
        stopped = engine.submit([50], params(12, stop_ids=(text[5],)))
        plain = engine.submit([50], params(12), Speculation(enabled=False))
        reading, waiting = engine.submit([60] * 40, params(9)), engine.submit([61], params(9))
        for request in (reading, waiting)[: round_ + 1]:
            while request is reading and not request.times.started:
                engine.step()
            request.cancel()
        finish(engine)
        assert all(request.done for request in (length, stopped, plain, reading, waiting))
        assert answers([length, plain]) == [text, text] and all(map(all_free, caches))
        failing = engine.submit([50] * 9, params(5))
        monkeypatch.setattr(engine.models.runner, "forward", lambda batch: 1 / 0)
        engine.step()
        monkeypatch.setattr(engine.models.runner, "forward", honest)
        with pytest.raises(ZeroDivisionError):
            failing.result(timeout=0)
        assert all(map(all_free, caches)) and engine.cache_usage == 0


# load


def test_short_prompts_are_read_beside_a_long_one() -> None:
    engine = Engine(LONG, max_batch=4, prefill_chunk=32, speculation="off")
    stream, long = engine.submit([50], params(200)), engine.submit([51] * 2000, params(2))
    for _ in range(2):
        engine.step()
    short = [engine.submit([52 + i] * 16, params(2)) for i in range(2)]
    before = len(engine._active[0].answer.tokens)
    for passed in range(1, 6):
        read = engine._active[1].read
        engine.step()
        assert engine._active[1].read >= read + 16 and len(engine._active[0].answer.tokens) == before + passed
    assert all(request.done for request in short) and not long.times.first_token
    stream.cancel()
    finish(engine)


def test_a_stream_is_not_held_up_by_whole_chunks() -> None:
    engine = Engine(LONG, max_batch=2, prefill_chunk=256, speculation="off")
    long = engine.submit([51] * 2000, params(2))
    engine.step()
    assert engine._active[0].read == 256  # nobody streams
    stream, read = engine.submit([50], params(200)), []
    while len(read) < 5:
        before = engine._active[0].read
        engine.step()
        if engine._active[1].answer.tokens:
            read.append(engine._active[0].read - before)
    assert set(read[1:]) == {BESIDE_STREAMS}
    for request in (long, stream):
        request.cancel()
    finish(engine)


def test_the_head_reads_a_long_prompt_along_where_others_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(LONG, make_tiny_head(LONG), max_batch=2, prefill_chunk=32, **CHAIN)
    proposer, read = engine.proposer, list[int]()
    assert isinstance(proposer, HeadProposer)
    catch_up = proposer.catch_up
    monkeypatch.setattr(proposer, "catch_up", lambda states: read.append(catch_up(states)) or read[-1])
    requests = [engine.submit([50], params(100)), engine.submit([51] * 900, params(4))]
    while not requests[1].done:
        engine.step()
    assert sum(read) >= 900 and max(read) <= 32 + 2 * 5  # a chunk, and what each verification accepted
    requests[0].cancel()
    finish(engine)


def test_many_requests_of_all_lengths_and_random_cancellation() -> None:
    rng = random.Random(0)
    longest = 1500 if REQUESTS < 2000 else 8000
    target = make_tiny_target(dtype=torch.float32, max_length=2 * longest)
    memory = 2 * longest * 640  # for two of the longest: the others wait, in turns for memory and for one of 8 slots
    engine = Engine(target, make_tiny_head(target), max_batch=8, prefill_chunk=512, kv_cache_memory=memory)
    assert isinstance(engine.proposer, HeadProposer)
    caches = engine.models.runner.cache, engine.proposer.runner.cache
    assert engine.max_length < target.max_length
    requests: list[Request] = []
    while engine.step() or len(requests) < REQUESTS:
        while engine.waiting < 20 and len(requests) < REQUESTS:
            prompt = [3 + rng.randrange(250)] * int((longest - 60) ** rng.random())
            sampled = {"temperature": 1.0, "seed": len(requests)} if rng.random() < 0.3 else {}
            speculation = Speculation(num_tokens=rng.choice([None, 0, 2]))
            requests.append(engine.submit(prompt, params(rng.randrange(1, 8), **sampled), speculation))
        if rng.random() < 0.3:
            rng.choice(requests[-20:]).cancel()
    reasons = [request.result(timeout=0).finish_reason for request in requests]
    assert {"length", "cancelled"} == set(reasons) and all(map(all_free, caches))
