"""The engine's thread and its clients': failures, streams, and nobody who waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from http_testing import GatedEngine, eventually
from small_engines import CHAIN, HEAD, TARGET, all_free, alone, finish, params

from draft.errors import UserError
from serving.engine import Completion, Engine, EngineStopped, Request, Speculation, Token
from serving.engine.estimates import Curve
from serving.engine.request import RequestQueue
from serving.engine.step import ActiveRequest


@pytest.fixture
def threaded() -> Iterator[Engine]:
    engine = Engine(TARGET, HEAD, max_batch=3)
    engine.start()
    yield engine
    engine.close()


def bad(*_: Any) -> Any:
    raise RuntimeError("out of luck")


def die(*_: Any) -> Any:
    raise SystemExit


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
    again = engine.generate([[50]], params(6))[0]
    assert [requests[2].result().token_ids, again.token_ids] == alone([[52], [50]], params(6))
    assert engine.cache_usage == 0


def test_a_failure_in_the_thread_is_the_requests_and_the_thread_goes_on(
    threaded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threaded._decoder, "step", bad)
    with pytest.raises(RuntimeError, match="out of luck"):
        threaded.submit([50], params()).result(timeout=60)
    with pytest.raises(RuntimeError, match="out of luck"):
        asyncio.run(collected(threaded.submit([50], params())))
    monkeypatch.undo()
    assert threaded.alive and len(threaded.submit([50], params()).result(timeout=60).token_ids) == 8


@pytest.mark.parametrize("where", ["step", "_activate"])
def test_a_dead_thread_leaves_nobody_waiting(threaded: Engine, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    threaded.submit([50], params(2)).result(timeout=60)
    monkeypatch.setattr(threaded, where, die)
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
    if where == "completion":
        monkeypatch.setattr(ActiveRequest, "completion", bad)
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
def test_a_request_that_cannot_be_taken_up_fails_alone(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Its slot is free again, also where it was the head that could not take it up."""
    engine = Engine(TARGET, HEAD, max_batch=1, **CHAIN)
    first, second = engine.submit([50], params(2)), engine.submit([51], params(2))
    owner: Any = engine if where == "_activate" else engine.models.proposer
    inner, calls = getattr(owner, where), iter([bad])
    monkeypatch.setattr(owner, where, lambda *arguments: next(calls, inner)(*arguments))
    finish(engine)
    with pytest.raises(RuntimeError, match="out of luck"):
        first.result(0)
    assert len(second.result(0).token_ids) == 2 and all_free(engine.models.runner.cache)


def test_an_engine_that_has_lost_its_slots_ends_instead_of_spinning() -> None:
    engine = Engine(TARGET, max_batch=1)
    engine.models.runner.cache.acquire()
    engine.start()
    with pytest.raises(EngineStopped):
        engine.submit([50], params(2)).result(timeout=60)
    assert not engine.alive


def test_closing_turns_everyone_away() -> None:
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


class Undecided(Request):
    """A request that somebody cancels after so many looks at whether it is."""

    looks = 0

    @property
    def cancelled(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("looks", range(6))
def test_whoever_is_cancelled_while_the_queue_is_sorted_is_answered(looks: int) -> None:
    queue = RequestQueue(10, None)
    given_up, undecided = (kind([50], params(), Speculation()) for kind in (Request, Undecided))
    queue.join([given_up, undecided], 0)
    given_up.cancel()
    undecided.looks = looks  # type: ignore[attr-defined]
    queue.drop_cancelled()
    assert given_up.result(0).finish_reason == "cancelled" and len(queue) == (not undecided.done)
    queue.drop_cancelled()
    assert queue.next() in (None, undecided)
    assert len(queue) == 0 and (undecided.done or undecided.future.running())


def test_many_threads_generate_at_once(threaded: Engine) -> None:
    got: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        got[index] = threaded.generate([[50 + index % 4, 9]], params(3 + index % 5))[0].token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    longest = alone([[50 + index, 9] for index in range(4)], params(7))
    assert got == {index: longest[index % 4][: 3 + index % 5] for index in range(20)} and threaded.running == 0


def test_an_engine_is_started_once(threaded: Engine) -> None:
    with pytest.raises(UserError, match="started already"):
        threaded.start()
    assert len(threaded.submit([50], params()).result(timeout=60).token_ids) == 8


def test_one_thread_steps_at_a_time_when_generate_and_start_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(TARGET, max_batch=2)
    inner, stepping, together = engine._decoder.step, threading.Lock(), list[bool]()
    started = threading.Event()

    def step(requests: Any) -> None:
        single = stepping.acquire(blocking=False)
        together.append(not single)
        if len(together) == 3:
            started.set()
        time.sleep(0.002)
        inner(requests)
        if single:
            stepping.release()

    monkeypatch.setattr(engine._decoder, "step", step)
    got: list[Completion] = []
    caller = threading.Thread(target=lambda: got.extend(engine.generate([[50], [51]], params(40))))
    caller.start()
    assert started.wait(60)
    engine.start()
    other = engine.submit([52], params(40)).result(timeout=60)
    caller.join(60)
    engine.close()
    assert not any(together)
    assert [c.token_ids for c in [*got, other]] == alone([[50], [51], [52]], params(40))


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


# streams


async def collected(request: Request) -> list[Token | Completion]:
    return [event async for event in request]


def shown(tokens: list[Token | Completion]) -> str:
    return "".join(token.text for token in tokens if isinstance(token, Token) and not token.special)


def test_a_stream_gives_each_token_once_and_the_completion_last(threaded: Engine) -> None:
    async def main() -> list[list[Token | Completion]]:
        each = [threaded.submit([50 + i], params(10 + i, temperature=2.0, seed=i)) for i in range(4)]
        return await asyncio.gather(*map(collected, each))

    for *tokens, completion in asyncio.run(main()):
        assert isinstance(completion, Completion) and tokens == completion.tokens
        assert shown(tokens) == completion.text


def test_a_stream_holds_back_what_a_stop_string_may_take(threaded: Engine) -> None:
    (whole,) = threaded.generate([[50]], params(20))
    stop = whole.text[6:9]
    request = threaded.submit([50], params(20, stop=(stop,), keep_stop=False))
    *tokens, completion = asyncio.run(collected(request))
    assert isinstance(completion, Completion) and completion.finish_reason == "stop_sequence"
    assert shown(tokens) == completion.text == whole.text[: whole.text.index(stop)]


def test_leaving_a_stream_cancels_the_request(threaded: Engine) -> None:
    async def main() -> Request:
        request = threaded.submit([50], params(60))
        stream = aiter(request)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        return request

    assert asyncio.run(main()).result(timeout=60).finish_reason in ("cancelled", "length")


def test_what_follows_the_end_may_look_at_the_request() -> None:
    """A callback of the future runs in the engine's thread: under a lock it would wait for itself."""
    engine = Engine(TARGET)
    request, events = engine.submit([50], params(3)), list[Token | Completion]()
    request.future.add_done_callback(lambda _: events.extend(asyncio.run(collected(request))))
    stepper = threading.Thread(target=finish, args=(engine,), daemon=True)
    stepper.start()
    stepper.join(60)
    assert not stepper.is_alive() and len(events) == 4
