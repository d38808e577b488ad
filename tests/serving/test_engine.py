"""The engine's contract: its queue, its refusals and reports, and that requests end one by one."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from oracle import Case, Oracle, engine_of, submit
from small_engines import CHAIN, HEAD, TARGET, all_free, alone, answers, finish, params
from tiny_targets import texts_of

from draft.errors import UserError
from serving.engine import Engine, Overloaded, Speculation
from serving.engine.drafting import HeadProposer

# the queue


def test_requests_wait_for_a_slot_and_are_served_in_their_order() -> None:
    engine = Engine(TARGET, max_batch=2)
    requests = [engine.submit([50 + i], params(4 + i)) for i in range(5)]
    assert (engine.running, engine.waiting) == (0, 5)
    engine.step()
    assert (engine.running, engine.waiting) == (2, 3)
    finished = []
    while engine.step():
        assert engine.running <= 2
        finished += [i for i, request in enumerate(requests) if request.done and i not in finished]
    assert [*finished, 4][:5] == [0, 1, 2, 3, 4] and all(request.done for request in requests)
    for times in (request.times for request in requests):
        assert 0 < times.submitted <= times.started <= times.first_token <= times.finished
    assert not engine.step() and engine.cache_usage == 0


def test_a_request_joins_those_that_run() -> None:
    engine = Engine(TARGET, HEAD, max_batch=4, **CHAIN)
    first = engine.submit([50], params(30))
    for _ in range(3):
        engine.step()
    second = engine.submit([60, 61], params(2))
    finish(engine)
    assert second.times.finished < first.times.finished
    assert answers([first, second]) == alone([[50], [60, 61]], [params(30), params(2)])


def test_a_long_prompt_does_not_stall_those_that_stream() -> None:
    engine = Engine(TARGET, max_batch=2, prefill_chunk=4)
    streaming = engine.submit([50], params(20))
    engine.step()
    long = engine.submit(list(range(3, 43)), params(2))
    for read in range(4, 40, 4):
        before = len(engine._active[0].answer.tokens)
        engine.step()
        assert engine._active[1].read == read and len(engine._active[0].answer.tokens) == before + 1
    finish(engine)
    assert [len(ids) for ids in answers([streaming, long])] == [20, 2]


def test_the_queue_is_bounded() -> None:
    engine = Engine(TARGET, max_batch=2, max_waiting=3)
    for _ in range(5):  # two of them will run
        engine.submit([50], params())
    with pytest.raises(Overloaded, match="5 requests wait already, and max_waiting is 3 beyond the 2 for"):
        engine.submit([50], params())
    with pytest.raises(Overloaded):
        engine.check_room()
    engine.step()
    with pytest.raises(Overloaded, match="3 requests wait already, and max_waiting is 3$"):
        engine.submit([50], params())
    finish(engine)
    engine.submit([50], params())
    tokens = Engine(TARGET, max_batch=1, max_waiting_tokens=30)
    tokens.submit([50] * 40, params())  # the first always gets in
    with pytest.raises(Overloaded, match="48 tokens wait already, 9 more came, and max_waiting_tokens is 30"):
        tokens.submit([50], params())


def test_several_join_together_or_not_at_all() -> None:
    engine = Engine(TARGET, max_batch=1, max_waiting=2, max_waiting_tokens=30)
    first = engine.submit([50], params(8))
    with pytest.raises(Overloaded, match="1 requests wait already, 3 more came, and max_waiting is 2"):
        engine.submit_all([[50]] * 3, [params(2)] * 3)
    with pytest.raises(Overloaded, match="9 tokens wait already, 22 more came"):
        engine.submit_all([[50]] * 2, [params(10)] * 2)
    with pytest.raises(UserError):
        engine.submit_all([[50], []], [params(2)] * 2)
    assert engine.waiting == 1
    rest = engine.submit_all([[50], [51]], [params(2), params(3)])
    finish(engine)
    assert [len(ids) for ids in answers([first, *rest])] == [8, 2, 3]


# cancelling


def test_a_cancelled_request_does_not_take_a_place_in_the_queue() -> None:
    engine = Engine(TARGET, max_batch=1, max_waiting=1)
    running = engine.submit([50], params(20))
    engine.step()
    waiting = engine.submit([60], params())
    waiting.cancel()
    other = engine.submit([70], params(1))
    engine.step()
    cancelled = waiting.result(timeout=0)
    assert (cancelled.finish_reason, cancelled.tokens, cancelled.stats.emitted) == ("cancelled", [], 0)
    assert not running.done and not other.done
    finish(engine)
    assert [len(ids) for ids in answers([running, other])] == [20, 1]


@pytest.mark.parametrize("speculation", ["off", "chain", "tree", "auto"])
def test_cancelling_frees_the_slot_at_the_next_step(speculation: str) -> None:
    engine = Engine(TARGET, HEAD, max_batch=2, speculation=speculation)
    first, second = (engine.submit([50 + i, 60], params(24)) for i in range(2))
    third = engine.submit([70], params(3))
    for _ in range(4):
        engine.step()
    assert engine.waiting == 1
    first.cancel()
    engine.step()
    assert first.done and engine.running == 1
    completion, read = first.result(), len(first.result().token_ids)
    assert completion.finish_reason == "cancelled" and 3 <= read < 24 and completion.stats.emitted == read - 1
    engine.step()
    assert engine.running == 2 and engine.waiting == 0
    finish(engine)
    expected = alone([[50, 60], [51, 60], [70]], [params(24), params(24), params(3)])
    assert answers([first, second, third]) == [expected[0][:read], *expected[1:]]
    proposer = engine.models.proposer
    assert all_free(engine.models.runner.cache)
    assert speculation == "off" or (isinstance(proposer, HeadProposer) and all_free(proposer.runner.cache))


def test_cancelling_while_the_prompt_is_read() -> None:
    engine = Engine(TARGET, HEAD, max_batch=1, prefill_chunk=4)
    request = engine.submit(list(range(3, 43)), params(4))
    engine.step()
    request.cancel()
    engine.step()
    assert request.result(timeout=0).tokens == [] and request.result().finish_reason == "cancelled"
    assert engine.generate([[50]], params(3))[0].finish_reason == "length"


def test_an_interrupted_generate_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, step, count = Engine(TARGET), Engine.step, itertools.count()

    def interrupted(self: Engine) -> bool:
        if next(count) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[50]], params(40))
    (answer,) = engine.generate([[51]], params(3))
    assert (len(answer.token_ids), engine.running) == (3, 0)


# reports


def test_counts_are_consistent() -> None:
    engine = engine_of(TARGET, Oracle(TARGET, errors=0.2), speculation="chain", speculation_length=4)
    request = submit(engine, Case.greedy(texts_of(TARGET)[0], 5, params(30)))
    finish(engine)
    stats = request.result().stats
    assert stats.emitted == 29 == stats.accepted + stats.verifications
    assert stats.acceptance_length == 29 / stats.verifications > 1
    assert sum(stats.drafted_per_position) == stats.drafted and sum(stats.accepted_per_position) == stats.accepted
    assert len(stats.drafted_per_position) == len(stats.accepted_per_position) == 4
    positions = [token.accepted_position for token in request.result().tokens]
    assert positions[0] is None  # the prefill's
    assert [positions.count(index) for index in range(4)] == stats.accepted_per_position
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    single = Engine(TARGET, HEAD, **CHAIN).generate([[50, 51]], params(1))[0].stats  # one token takes no decoding
    assert (single.verifications, single.emitted, single.drafted, single.decode_seconds) == (0, 0, 0, 0.0)
    assert math.isnan(single.acceptance_length) and single.prefill_seconds > 0


def test_stats_are_json_and_name_what_runs() -> None:
    engine = Engine(TARGET, HEAD, max_batch=2, **CHAIN)
    engine.submit([50] * 9, params(9))
    engine.step()
    stats = json.loads(json.dumps(engine.stats()))
    assert (stats["running"], stats["waiting"], stats["mode"]) == (1, 0, "eager")
    assert stats["cache_usage"] == engine.cache_usage > 0
    finish(engine)
    speculation = engine.stats()["speculation"]
    assert speculation["plan"] == "chain 4" and sum(speculation["steps"].values()) > 0


# options


def test_a_requests_options() -> None:
    engine = Engine(TARGET, HEAD, max_batch=4, **CHAIN)
    options = [Speculation(enabled=False), *(Speculation(num_tokens=count) for count in (0, 2, 9))]
    requests = [engine.submit([50], params(12), each) for each in options]
    finish(engine)
    (plain,) = Engine(TARGET).generate([[50]], params(12))  # needs no head
    assert answers(requests) == [plain.token_ids] * 4
    assert plain.stats.drafted == 0 and plain.stats.acceptance_length == 1 and plain.seed is None
    # no request drafts more than the engine was built for
    assert [len(request.result().stats.drafted_per_position) for request in requests] == [0, 0, 2, 4]


@pytest.mark.parametrize("speculation", ["auto", "chain", "tree"])
def test_a_speculation_length_of_0_is_off(speculation: str) -> None:
    engine = Engine(TARGET, HEAD, speculation=speculation, speculation_length=0)
    (answer,) = engine.generate([[50]], params(5))
    assert answer.stats.drafted == 0 and engine.stats()["speculation"]["plan"] == "off"


def head_of_another_shape() -> Any:
    head = make_tiny_head(TARGET)
    head.config.hidden_size = 64
    return head


@pytest.mark.parametrize(
    ("words", "build"),
    [
        ("'always'.*auto, chain, tree, off", lambda: Engine(TARGET, HEAD, speculation="always")),
        ("speculation_length = -1.*0.*32", lambda: Engine(TARGET, HEAD, speculation_length=-1)),
        ("4.*more nodes than its depth, 5", lambda: Engine(TARGET, HEAD, speculation="tree", tree_size=4)),
        ("'typical'.*shared-noise, rejection", lambda: Engine(TARGET, HEAD, rule="typical")),
        ("compiled.*float64", lambda: Engine(TARGET, HEAD, mode="compiled")),
        ("max_length = 73.*2 to 72", lambda: Engine(TARGET, HEAD, max_length=73)),
        ("tree_size = '16'", lambda: Engine(TARGET, HEAD, tree_size="16")),
        ("64.*32", lambda: Engine(TARGET, head_of_another_shape())),
        ("33", lambda: Speculation(num_tokens=33)),
        ("empty", lambda: Engine(TARGET).submit([], params())),
        ("70.*5.*72.*2", lambda: Engine(TARGET).submit([5] * 70, params(5))),
        ("259.*258", lambda: Engine(TARGET).generate([[5], [5, 259]], params())),
        ("Hello.*token ids", lambda: Engine(TARGET).submit("Hello", params())),
        ("stop_ids.*259", lambda: Engine(TARGET).submit([5], params(stop_ids=(259,)))),
        ("logit_bias.*259", lambda: Engine(TARGET).submit([5], params(logit_bias={259: 1.0}))),
    ],
)
def test_what_makes_no_sense_is_refused(words: str, build: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match=words):
        build()


# other precisions


def test_a_head_of_another_dtype_drafts() -> None:
    (one,) = Engine(TARGET, make_tiny_head(TARGET).to(torch.float32), **CHAIN).generate([[50]], params(6))
    assert [one.token_ids] == alone([[50]], params(6)) and one.stats.drafted > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_decode(dtype: torch.dtype) -> None:
    target = make_tiny_target(dtype=dtype, max_length=64)
    for speculation in ("chain", "tree"):
        engine = Engine(target, make_tiny_head(target), speculation=speculation, mode="eager")
        for rule in ("shared-noise", "rejection"):
            options = [params(6, temperature=temperature, seed=0, logprobs=0) for temperature in (0.0, 1.0)]
            for completion in engine.generate([[50, 60]] * 2, options, Speculation(rule=rule)):
                assert len(completion.token_ids) == 6
                assert all(math.isfinite(token.logprob or 0.0) for token in completion.tokens)
