"""The engine: its queue, refusals and reports, requests that end one by one, its thread and its clients'."""

import asyncio
import itertools
import math
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from http_testing import GatedEngine, eventually
from oracle import Case, Oracle, all_free, engine_of, submit
from tiny_targets import texts_of, tiny

from draft.errors import UserError
from serving.engine import Completion, Engine, EngineStopped, Overloaded, Request, SamplingParams, Speculation, Token
from serving.engine.drafting import HeadProposer
from serving.engine.estimates import Curve
from serving.engine.request import RequestQueue
from serving.engine.step import ActiveRequest

TARGET = tiny("llama")
HEAD = make_tiny_head(TARGET)
CHAIN: dict[str, Any] = {"speculation": "chain", "speculation_length": 4}


def params(count: int = 8, **fields: Any) -> SamplingParams:
    return SamplingParams(count, **{"ignore_eos": True, **fields})


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def answers(requests: Iterable[Request]) -> list[list[int]]:
    return [request.result(timeout=120).token_ids for request in requests]


def alone(prompts: Sequence[list[int]], each: Any) -> list[list[int]]:
    """The answers of an engine without speculation, one prompt after the other."""
    return [answer.token_ids for answer in Engine(TARGET, max_batch=1, speculation="off").generate(prompts, each)]


# the queue


def test_requests_wait_for_a_slot_and_are_served_in_their_order():
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


def test_a_long_prompt_does_not_stall_those_that_stream():
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


def test_the_queue_is_bounded():
    def refused(words, attempt):
        with pytest.raises(Overloaded, match=words):
            attempt()

    engine = Engine(TARGET, max_batch=2, max_waiting=3)
    requests = [engine.submit([50], params()) for _ in range(5)]  # two of them will run
    refused("5 requests wait already, and max_waiting is 3 beyond the 2 for", lambda: engine.submit([50], params()))
    refused("5 requests", engine.check_room)
    engine.step()
    refused("3 requests wait already, and max_waiting is 3$", lambda: engine.submit([50], params()))
    requests[4].cancel()  # whoever is cancelled takes no place
    last = engine.submit([50], params(1))
    engine.step()
    cancelled = requests[4].result(timeout=0)
    assert (cancelled.finish_reason, cancelled.tokens, cancelled.stats.emitted) == ("cancelled", [], 0)
    finish(engine)
    assert [len(ids) for ids in answers([*requests, last])] == [8, 8, 8, 8, 0, 1]
    tokens = Engine(TARGET, max_batch=1, max_waiting=2, max_waiting_tokens=30)
    first = tokens.submit([50] * 40, params())  # the first always gets in
    refused("48 tokens wait already, 9 more came, and max_waiting_tokens is 30", lambda: tokens.submit([50], params()))
    # several join together or not at all
    refused("1 requests wait.*, 3 more came, and max", lambda: tokens.submit_all([[50]] * 3, [params(2)] * 3))
    with pytest.raises(UserError):
        tokens.submit_all([[50], []], [params(2)] * 2)
    assert tokens.waiting == 1
    tokens.step()
    rest = tokens.submit_all([[50], [51]], [params(2), params(3)])
    finish(tokens)
    assert [len(ids) for ids in answers([first, *rest])] == [8, 2, 3]


# cancelling


@pytest.mark.parametrize("speculation", ["off", "chain", "tree", "auto"])
def test_cancelling_frees_the_slot_at_the_next_step(speculation):
    engine = Engine(TARGET, HEAD, max_batch=2, speculation=speculation, prefill_chunk=4)
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
    prompt = engine.submit(list(range(3, 43)), params(4))
    engine.step()
    prompt.cancel()  # while it is read
    engine.step()
    assert prompt.result(timeout=0).tokens == [] and prompt.result().finish_reason == "cancelled"
    expected = alone([[50, 60], [51, 60], [70]], [params(24), params(24), params(3)])
    assert answers([first, second, third]) == [expected[0][:read], *expected[1:]]
    proposer = engine.proposer
    assert all_free(engine.models.runner.cache)
    assert speculation == "off" or (isinstance(proposer, HeadProposer) and all_free(proposer.runner.cache))


def test_an_interrupted_generate_leaves_nothing_behind(monkeypatch):
    engine, step, count = Engine(TARGET), Engine.step, itertools.count()

    def interrupted(self):
        if next(count) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[50]], params(40))
    (answer,) = engine.generate([[51]], params(3))
    assert (len(answer.token_ids), engine.running) == (3, 0)


# reports


def test_counts_are_consistent():
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


# options


def test_a_requests_options():
    engine = Engine(TARGET, HEAD, max_batch=4, **CHAIN)
    options = [Speculation(enabled=False), *(Speculation(num_tokens=count) for count in (0, 2, 9))]
    requests = [engine.submit([50], params(12), each) for each in options]
    finish(engine)
    (plain,) = Engine(TARGET, speculation="off").generate([[50]], params(12))  # needs no head
    assert answers(requests) == [plain.token_ids] * 4
    assert plain.stats.drafted == 0 and plain.stats.acceptance_length == 1 and plain.seed is None
    # no request drafts more than the engine was built for
    assert [len(request.result().stats.drafted_per_position) for request in requests] == [0, 0, 2, 4]
    for speculation in ("auto", "chain", "tree"):
        off = Engine(TARGET, HEAD, speculation=speculation, speculation_length=0)
        assert off.generate([[50]], params(5))[0].stats.drafted == 0
        assert off.stats()["speculation"]["plan"] == "off"


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
        ("64.*32", lambda: Engine(TARGET, make_tiny_head(make_tiny_target(hidden_size=64)))),
        ("33", lambda: Speculation(num_tokens=33)),
        ("empty", lambda: Engine(TARGET).submit([], params())),
        ("70.*5.*72.*2", lambda: Engine(TARGET).submit([5] * 70, params(5))),
        ("259.*258", lambda: Engine(TARGET).generate([[5], [5, 259]], params())),
        ("Hello.*token ids", lambda: Engine(TARGET).submit("Hello", params())),
        ("stop_ids.*259", lambda: Engine(TARGET).submit([5], params(stop_ids=(259,)))),
        ("logit_bias.*259", lambda: Engine(TARGET).submit([5], params(logit_bias={259: 1.0}))),
    ],
)
def test_what_makes_no_sense_is_refused(words, build):
    with pytest.raises(UserError, match=words):
        build()


# other precisions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_decode(dtype):
    target = make_tiny_target(dtype=dtype, max_length=64)
    for speculation in ("chain", "tree"):
        head = make_tiny_head(target).to(torch.float32)  # which may be of another dtype
        engine = Engine(target, head, speculation=speculation, mode="eager")
        for rule in ("shared-noise", "rejection"):
            options = [params(6, temperature=temperature, seed=0, logprobs=0) for temperature in (0.0, 1.0)]
            for completion in engine.generate([[50, 60]] * 2, options, Speculation(rule=rule)):
                assert len(completion.token_ids) == 6
                assert all(math.isfinite(token.logprob or 0.0) for token in completion.tokens)


# the thread


@pytest.fixture
def threaded():
    engine = Engine(TARGET, HEAD, max_batch=3)
    engine.start()
    yield engine
    engine.close()


def bad(*_: Any) -> Any:
    raise RuntimeError("out of luck")


def die(*_: Any) -> Any:
    raise SystemExit


# failures


def test_a_step_that_fails_ends_its_requests_and_no_others(monkeypatch):
    engine = Engine(TARGET, HEAD, max_batch=2, **CHAIN)
    requests = [engine.submit([50 + i], params(6)) for i in range(3)]
    for _ in range(2):
        engine.step()
    honest = engine.models.runner.forward

    def broken(batch):
        monkeypatch.setattr(engine.models.runner, "forward", honest)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.models.runner, "forward", broken)
    finish(engine)
    for request in requests[:2]:
        with pytest.raises(RuntimeError, match="out of memory"):
            request.result(timeout=0)
    again = engine.generate([[50]], params(6))[0]
    assert [requests[2].result().token_ids, again.token_ids] == alone([[52], [50]], params(6))
    assert engine.cache_usage == 0


def test_the_thread_goes_on_after_a_failure(threaded, monkeypatch):
    monkeypatch.setattr(threaded._decoder, "step", bad)
    for wait in (lambda request: request.result(timeout=60), lambda request: asyncio.run(collected(request))):
        with pytest.raises(RuntimeError, match="out of luck"):
            wait(threaded.submit([50], params()))
    monkeypatch.undo()
    with pytest.raises(UserError, match="started already"):
        threaded.start()
    assert threaded.alive and len(threaded.submit([50], params()).result(timeout=60).token_ids) == 8


@pytest.mark.parametrize("where", ["step", "_activate"])
def test_a_dead_thread_leaves_nobody_waiting(threaded, monkeypatch, where):
    threaded.submit([50], params(2)).result(timeout=60)
    monkeypatch.setattr(threaded, where, die)
    with pytest.raises(EngineStopped):
        threaded.submit([50], params()).result(timeout=60)
    threaded._thread.join(60)  # type: ignore[union-attr]
    assert not threaded.alive
    with pytest.raises(EngineStopped):
        threaded.submit([50], params())


@pytest.mark.parametrize("where", ["completion", "release", "step", "lost slots"])
def test_a_request_whose_end_goes_wrong_does_not_hang(monkeypatch, where):
    """The thread dies of it, and all that it had end; step: its slot cannot be freed after a failed one."""
    engine = Engine(TARGET, max_batch=3)
    if where == "completion":
        monkeypatch.setattr(ActiveRequest, "completion", bad)
    elif where == "lost slots":  # the thread would spin
        assert [engine.models.runner.cache.acquire() for _ in range(3)]
    else:
        monkeypatch.setattr(engine.models.runner.cache, "release", bad)
    if where == "step":
        monkeypatch.setattr(engine._decoder, "step", bad)
    requests = [engine.submit([50 + index], params(2)) for index in range(3)]
    engine.start()
    for request in requests:
        with pytest.raises(EngineStopped):
            request.result(timeout=60)


@pytest.mark.parametrize("where", ["_activate", "join"])
def test_a_request_that_cannot_be_taken_up_fails_alone(monkeypatch, where):
    """Its slot is free again, also where it was the head that could not take it up."""
    engine = Engine(TARGET, HEAD, max_batch=1, **CHAIN)
    first, second = engine.submit([50], params(3)), engine.submit([51], params(3))
    owner: Any = engine if where == "_activate" else engine.proposer
    inner, calls = getattr(owner, where), iter([bad])
    monkeypatch.setattr(owner, where, lambda *arguments: next(calls, inner)(*arguments))
    finish(engine)
    with pytest.raises(RuntimeError, match="out of luck"):
        first.result(0)
    assert len(second.result(0).token_ids) == 3 and all_free(engine.models.runner.cache)


def test_tokens_are_handed_out_once_all_requests_have_theirs(monkeypatch):
    """Whoever wakes up takes Python's lock, and the engine would wait for it between two requests."""
    engine = Engine(TARGET, HEAD, max_batch=2, **CHAIN)
    first, second = engine.submit([50], params(4)), engine.submit([51], params(4))
    known: list[int] = []
    monkeypatch.setattr(first, "release", lambda tokens: known.append(len(engine._active[1].answer.tokens)))
    engine.step()
    assert known == [1] and engine._active[1].request is second
    finish(engine)


@pytest.mark.parametrize(("tokens", "drafts"), [(2, False), (3, True)])
def test_a_request_too_short_for_drafts_prepares_for_none(tokens, drafts):
    engine = Engine(TARGET, HEAD, speculation="auto")
    engine.submit([50], params(tokens))
    engine.step()
    [active] = engine._active
    assert (active.drafting is not None, active.lookup is not None) == (drafts, drafts)
    finish(engine)


def test_closing_turns_everyone_away():
    engine = GatedEngine(TARGET, max_batch=1)  # whose gate stays shut: none is done before it is closed
    engine.start()
    requests = [engine.submit([50], params(60)) for _ in range(3)]
    eventually(lambda: engine.running == 1 and engine.waiting == 2)
    engine.close()
    unstarted = Engine(TARGET, max_batch=1)
    requests.append(unstarted.submit([50], params()))
    unstarted.close()
    refused = [lambda: engine.submit([50], params()), lambda: engine.generate([[50]], params()), engine.check_room]
    for attempt in (*(partial(request.result, 10) for request in requests), *refused):
        with pytest.raises(EngineStopped):
            attempt()
    assert not engine.alive


# threads


@pytest.mark.parametrize("looks", range(4))
def test_whoever_is_cancelled_at_any_moment_is_answered(looks, monkeypatch):
    queue, requests = RequestQueue(10, None), [Request([50], params(), Speculation()) for _ in range(2)]
    queue.join(requests, 0)
    later = itertools.chain([False] * looks, itertools.repeat(True))  # to those who look at the second one
    monkeypatch.setattr(Request, "cancelled", property(lambda request: request is requests[0] or next(later)))
    for _ in range(5):
        queue.drop_cancelled()
    assert [request.result(0).finish_reason for request in requests] == ["cancelled"] * 2 and len(queue) == 0


def test_threads_that_generate_and_one_that_starts_the_engine_step_in_turn(monkeypatch):
    engine = Engine(TARGET, max_batch=3)
    inner, stepping, begun, together = engine._decoder.step, threading.Lock(), threading.Event(), list[bool]()

    def step(requests):
        together.append(not stepping.acquire(blocking=False))
        inner(requests)
        begun.set()
        if not together[-1]:
            stepping.release()

    monkeypatch.setattr(engine._decoder, "step", step)
    with ThreadPoolExecutor() as pool, closing(engine):
        counts = [3 + index % 5 for index in range(12)] + [40]
        calls = [pool.submit(engine.generate, [[50 + count % 4, 9]], params(count)) for count in counts]
        assert begun.wait(60)
        engine.start()
        got = [call.result(60)[0].token_ids for call in calls]
    assert not any(together) and engine.running == 0
    assert got == alone([[50 + count % 4, 9] for count in counts], [params(count) for count in counts])


def test_figures_are_of_one_moment(threaded, monkeypatch):
    """The thread that steps changes no figure of the controller while somebody reads them."""
    controller, inner, changed = threaded.controller, Curve.table, list[bool]()

    def table(curve, pace):
        if not changed:
            writer = threading.Thread(target=lambda: controller.observe_target(99, 1.0))
            writer.start()
            writer.join(0.1)
            changed.append(not writer.is_alive())
        return inner(curve, pace)

    monkeypatch.setattr(Curve, "table", table)
    assert "99" not in threaded.stats()["speculation"]["target_seconds"] and changed == [False]


# streams


async def collected(request: Request) -> list[Token | Completion]:
    return [event async for event in request]


def test_a_stream_gives_each_token_once_and_the_completion_last(threaded):
    async def main():
        left = threaded.submit([50], params(60))
        stream = aiter(left)
        assert isinstance(await anext(stream), Token)
        await stream.aclose()  # type: ignore[attr-defined]
        each = [threaded.submit([50 + i], params(10 + i, temperature=2.0, seed=i)) for i in range(4)]
        return left, await asyncio.wait_for(asyncio.gather(*map(collected, each)), 60)

    left, streams = asyncio.run(main())
    for *tokens, completion in streams:
        assert isinstance(completion, Completion) and tokens == completion.tokens
        assert "".join(token.text for token in completion.tokens if not token.special) == completion.text
    assert left.result(timeout=60).finish_reason in ("cancelled", "length")  # leaving a stream cancels its request


def test_what_follows_the_end_may_look_at_the_request():
    """A callback of the future runs in the engine's thread: under a lock it would wait for itself."""
    engine = Engine(TARGET)
    request, events = engine.submit([50], params(3)), list[Token | Completion]()
    request.future.add_done_callback(lambda _: events.extend(asyncio.run(collected(request))))
    stepper = threading.Thread(target=finish, args=(engine,), daemon=True)
    stepper.start()
    stepper.join(60)
    assert not stepper.is_alive() and len(events) == 4
