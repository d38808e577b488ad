"""The engine's thread and its clients': failures, streams, and nobody who waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from http_testing import GatedEngine, eventually
from small_engines import CHAIN, HEAD, TARGET, finish, params

from draft.errors import UserError
from draft.target import Target
from serving.engine import (
    Completion,
    Engine,
    EngineStopped,
    Overloaded,
    Request,
    SamplingParams,
    Speculation,
    Token,
)
from serving.engine.costs import Curve
from serving.engine.request import RequestQueue
from serving.engine.step import ActiveRequest


@pytest.fixture
def threaded() -> Iterator[Engine]:
    engine = Engine(TARGET, HEAD, max_batch=3)
    engine.start()
    yield engine
    engine.close()


# failures


def test_a_step_that_fails_ends_its_requests_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(TARGET, HEAD, max_batch=2, **CHAIN)
    requests = [engine.submit([50 + i], params(6)) for i in range(3)]
    for _ in range(2):
        engine.step()
    honest = engine.models.runner.forward

    def broken(batch: Any) -> Any:
        monkeypatch.setattr(engine.models.runner, "forward", honest)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.models.runner, "forward", broken)
    finish(engine)
    for request in requests[:2]:
        with pytest.raises(RuntimeError, match="out of memory"):
            request.result(timeout=0)
    alone = Engine(TARGET, max_batch=1).generate([[52], [50]], params(6))
    assert requests[2].result().token_ids == alone[0].token_ids
    assert engine.generate([[50]], params(6))[0].token_ids == alone[1].token_ids
    assert engine.cache_usage == 0


def test_a_failure_in_the_thread_is_the_requests_and_the_thread_goes_on(
    threaded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threaded._decoder, "step", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        threaded.submit([50], params()).result(timeout=60)
    monkeypatch.undo()
    assert threaded.alive and len(threaded.submit([50], params()).result(timeout=60).token_ids) == 8


def test_a_dead_thread_leaves_nobody_waiting(threaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def die() -> bool:
        raise SystemExit

    request = threaded.submit([50], params(2))
    request.result(timeout=60)
    monkeypatch.setattr(threaded, "step", die)
    with pytest.raises(EngineStopped):
        threaded.submit([50], params()).result(timeout=60)
    threaded._thread.join(60)  # type: ignore[union-attr]
    assert not threaded.alive
    with pytest.raises(EngineStopped):
        threaded.submit([50], params())


@pytest.mark.parametrize("where", ["completion", "release", "step"])
def test_a_request_whose_end_goes_wrong_does_not_hang(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The thread dies of it, and all that it had end; step: its slot cannot be freed after a failed one."""
    engine = Engine(TARGET, max_batch=3)
    at_the_end = where == "completion"
    monkeypatch.setattr(
        ActiveRequest if at_the_end else engine.models.runner.cache, where if at_the_end else "release", bad
    )
    if where == "step":
        monkeypatch.setattr(engine._decoder, "step", bad)
    requests = [engine.submit([50 + index], params(2)) for index in range(3)]
    engine.start()
    for request in requests:
        with pytest.raises(EngineStopped):
            request.result(timeout=60)


def bad(*_: Any) -> Any:
    raise RuntimeError("out of luck")


def test_a_thread_that_dies_while_it_takes_a_request_up_ends_it(
    threaded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_request: Request) -> Any:
        raise SystemExit

    monkeypatch.setattr(threaded, "_activate", die)
    with pytest.raises(EngineStopped):
        threaded.submit([50], params()).result(timeout=60)


# the queue


class Undecided(Request):
    """Cancelled by somebody after so many looks at whether it is."""

    looks = 0

    @property
    def cancelled(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("looks", range(6))
def test_whoever_is_cancelled_while_the_queue_is_sorted_is_answered(looks: int) -> None:
    line = RequestQueue(10, None)
    given_up, undecided = (kind([50], params(), Speculation()) for kind in (Request, Undecided))
    line.join([given_up, undecided], 0)
    given_up.cancel()
    undecided.looks = looks  # type: ignore[attr-defined]
    line.drop_cancelled()
    assert given_up.result(0).finish_reason == "cancelled" and len(line) == (not undecided.done)
    line.drop_cancelled()
    assert line.next() in (None, undecided)
    assert len(line) == 0 and (undecided.done or undecided.future.running())


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
    assert [len(each.result(0).token_ids) for each in (first, *rest)] == [8, 2, 3]


# threads and streams


def test_many_threads_submit_at_once(threaded: Engine) -> None:
    answers: dict[int, Completion] = {}

    def ask(index: int) -> None:
        answers[index] = threaded.submit([50 + index % 4, 9], params(3 + index % 5)).result(timeout=120)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, answer in answers.items():
        longest = answers[next(i for i in range(20) if i % 4 == index % 4 and i % 5 == 4)]
        assert answer.token_ids == longest.token_ids[: 3 + index % 5] and len(answer.token_ids) == 3 + index % 5
    assert len(answers) == 20 and threaded.running == 0


def test_generate_goes_through_the_thread_where_there_is_one(threaded: Engine) -> None:
    alone = Engine(TARGET, max_batch=1).generate([[50], [51]], params(5))
    assert [c.token_ids for c in threaded.generate([[50], [51]], params(5))] == [c.token_ids for c in alone]


def test_closing_turns_everyone_away() -> None:
    engine = GatedEngine(TARGET, max_batch=1)  # whose gate stays shut: none is done before it is closed
    engine.start()
    requests = [engine.submit([50], params(60)) for _ in range(3)]
    eventually(lambda: engine.running == 1 and engine.waiting == 2)
    engine.close()
    for request in requests:
        with pytest.raises(EngineStopped):
            request.result(timeout=10)
    assert not engine.alive
    for ask in (lambda: engine.submit([50], params()), lambda: engine.generate([[50]], params()), engine.check_room):
        with pytest.raises(EngineStopped):
            ask()
    unstarted = Engine(TARGET, max_batch=1)
    request = unstarted.submit([50], params())
    unstarted.close()
    with pytest.raises(EngineStopped):
        request.result(timeout=0)


async def collected(request: Request) -> list[Token | Completion]:
    return [event async for event in request]


def test_a_stream_gives_each_token_once_and_the_completion_last(threaded: Engine) -> None:
    async def main() -> list[list[Token | Completion]]:
        each = [threaded.submit([50 + i], params(10 + i, temperature=2.0, seed=i)) for i in range(4)]
        return await asyncio.gather(*map(collected, each))

    for events in asyncio.run(main()):
        *tokens, completion = events
        assert isinstance(completion, Completion) and tokens == completion.tokens
        assert "".join(t.text for t in tokens if isinstance(t, Token) and not t.special) == completion.text


def test_a_stream_holds_back_what_a_stop_string_may_take(threaded: Engine) -> None:
    (whole,) = threaded.generate([[50]], params(20))
    stop = whole.text[6:9]
    request = threaded.submit([50], params(20, stop=(stop,), keep_stop=False))
    *tokens, completion = asyncio.run(collected(request))
    assert isinstance(completion, Completion) and completion.finish_reason == "stop_sequence"
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert "".join(token.text for token in tokens if isinstance(token, Token)) == completion.text


def test_leaving_a_stream_cancels_the_request(threaded: Engine) -> None:
    async def main() -> Request:
        request = threaded.submit([50], params(60))
        stream = aiter(request)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        return request

    assert asyncio.run(main()).result(timeout=60).finish_reason in ("cancelled", "length")


def test_a_stream_raises_what_ended_its_request(threaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threaded._decoder, "step", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(collected(threaded.submit([50], params())))


def test_a_request_that_cannot_be_taken_up_fails_alone(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_target, mode="eager", max_batch=1)
    inner = engine._activate

    def row(request: Request) -> Any:
        if request.prompt_ids == [7]:
            raise RuntimeError("no such luck")
        return inner(request)

    monkeypatch.setattr(engine, "_activate", row)
    params = SamplingParams(max_new_tokens=2, ignore_eos=True)
    bad, good = engine.submit([7], params), engine.submit([8], params)
    while engine.step():
        pass
    with pytest.raises(RuntimeError, match="no such luck"):
        bad.result(0)
    assert len(good.result(0).token_ids) == 2


def test_a_request_that_fails_when_it_joins_the_head_gives_its_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(TARGET, HEAD, max_batch=1, **CHAIN)
    monkeypatch.setattr(engine.models.proposer, "join", bad)
    request = engine.submit([50], params(2))
    assert not engine.step()
    with pytest.raises(RuntimeError, match="out of luck"):
        request.result(0)
    assert engine.models.runner.cache.free_slots == 1
    monkeypatch.undo()
    assert len(engine.generate([[50]], params(2))[0].token_ids) == 2


def test_an_engine_that_has_lost_its_slots_ends_instead_of_spinning() -> None:
    engine = Engine(TARGET, max_batch=1)
    engine.models.runner.cache.acquire()
    engine.start()
    with pytest.raises(EngineStopped):
        engine.submit([50], params(2)).result(timeout=60)
    assert not engine.alive


def test_an_engine_is_started_once(threaded: Engine) -> None:
    with pytest.raises(UserError, match="started already"):
        threaded.start()
    assert len(threaded.submit([50], params()).result(timeout=60).token_ids) == 8


def test_one_thread_steps_at_a_time_when_generate_and_start_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(TARGET, max_batch=2)
    inner, stepping, together = engine._decoder.step, threading.Lock(), list[bool]()

    def step(requests: Any) -> None:
        alone = stepping.acquire(blocking=False)
        together.append(not alone)
        if len(together) == 3:
            started.set()
        time.sleep(0.002)
        inner(requests)
        if alone:
            stepping.release()

    started = threading.Event()
    monkeypatch.setattr(engine._decoder, "step", step)
    answers: list[Completion] = []
    caller = threading.Thread(target=lambda: answers.extend(engine.generate([[50], [51]], params(40))))
    caller.start()
    assert started.wait(60)
    engine.start()
    other = engine.submit([52], params(40)).result(timeout=60)
    caller.join(60)
    engine.close()
    assert not any(together)
    alone = Engine(TARGET, max_batch=1).generate([[50], [51], [52]], params(40))
    assert [c.token_ids for c in [*answers, other]] == [c.token_ids for c in alone]


def test_what_follows_the_end_may_look_at_the_request() -> None:
    """A callback of the future runs in the engine's thread: under a lock it would wait for itself."""
    engine = Engine(TARGET)
    request, events = engine.submit([50], params(3)), list[Token | Completion]()
    request.future.add_done_callback(lambda _: events.extend(asyncio.run(collected(request))))
    stepper = threading.Thread(target=finish, args=(engine,), daemon=True)
    stepper.start()
    stepper.join(60)
    assert not stepper.is_alive() and len(events) == 4


def test_figures_are_of_one_moment(threaded: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that steps changes no figure of the controller while somebody reads them."""
    controller, inner, changed = threaded.controller, Curve.table, list[bool]()

    def table(curve: Curve) -> dict[str, float]:
        if not changed:
            writer = threading.Thread(target=lambda: controller.observe_target(99, 1.0))
            writer.start()
            writer.join(0.1)
            changed.append(not writer.is_alive())
        return inner(curve)

    monkeypatch.setattr(Curve, "table", table)
    assert "99" not in threaded.stats()["speculation"]["target_seconds"] and changed == [False]
