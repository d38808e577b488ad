"""The engine's thread and its clients': failures, streams, and nobody who waits for ever."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import pytest
from http_testing import GatedEngine, eventually
from small_engines import CHAIN, HEAD, TARGET, alone, finish, params

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
    for wait in (lambda request: request.result(timeout=60), lambda request: asyncio.run(collected(request))):
        with pytest.raises(RuntimeError, match="out of luck"):
            wait(threaded.submit([50], params()))
    monkeypatch.undo()
    with pytest.raises(UserError, match="started already"):
        threaded.start()
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


@pytest.mark.parametrize("where", ["completion", "release", "step", "lost slots"])
def test_a_request_whose_end_goes_wrong_does_not_hang(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
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
    assert len(second.result(0).token_ids) == 2 and engine.models.runner.cache.free_slots == 1


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


@pytest.mark.parametrize("looks", range(4))
def test_whoever_is_cancelled_while_the_queue_is_sorted_is_answered(
    looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, request = RequestQueue(10, None), Request([50], params(), Speculation())
    queue.join([request], 0)
    answers = itertools.chain([False] * looks, itertools.repeat(True))  # to those who look whether it is cancelled
    monkeypatch.setattr(Request, "cancelled", property(lambda _: next(answers)))
    for _ in range(5):
        queue.drop_cancelled()
    assert request.result(0).finish_reason == "cancelled" and len(queue) == 0


def test_threads_that_generate_and_one_that_starts_the_engine_step_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(TARGET, max_batch=3)
    inner, stepping, begun, together = engine._decoder.step, threading.Lock(), threading.Event(), list[bool]()

    def step(requests: Any) -> None:
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


def test_a_stream_gives_each_token_once_and_the_completion_last(threaded: Engine) -> None:
    async def main() -> tuple[Request, list[list[Token | Completion]]]:
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


def test_what_follows_the_end_may_look_at_the_request() -> None:
    """A callback of the future runs in the engine's thread: under a lock it would wait for itself."""
    engine = Engine(TARGET)
    request, events = engine.submit([50], params(3)), list[Token | Completion]()
    request.future.add_done_callback(lambda _: events.extend(asyncio.run(collected(request))))
    stepper = threading.Thread(target=finish, args=(engine,), daemon=True)
    stepper.start()
    stepper.join(60)
    assert not stepper.is_alive() and len(events) == 4
