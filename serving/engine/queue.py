"""The line of requests that wait for a slot: bounded, first come first served, and safe to use from any thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

from serving.engine.request import Completion, EngineStopped, Overloaded, Request, SpeculationStats


class Line:
    """Requests in the order in which they came."""

    def __init__(self, max_requests: int, max_tokens: int | None) -> None:
        """What may wait behind those for which there is a slot: requests, and tokens of their prompts and answers."""
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.closed = False
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def check_room(self, tokens: int, free_slots: int, requests: int = 1) -> None:
        """Raises Overloaded or EngineStopped when so many requests, of so many tokens, would be turned away now."""
        if self.closed:
            raise EngineStopped("the engine has ended")
        waiting = [request for request in list(self._waiting) if not request.cancelled]
        if len(waiting) + requests > self.max_requests + free_slots:
            more = f" beyond the {free_slots} for which there is a slot" if free_slots else ""
            came = f", {requests} more came" if requests > 1 else ""
            told = f"{len(waiting)} requests wait already{came}, and max_waiting is {self.max_requests}{more}"
            raise Overloaded(told)
        queued = sum(map(_tokens, waiting))
        if self.max_tokens is not None and waiting and queued + tokens > self.max_tokens:
            raise Overloaded(
                f"{queued} tokens wait already, {tokens} more came, and max_waiting_tokens is {self.max_tokens}"
            )

    def join(self, requests: Sequence[Request], free_slots: int) -> None:
        """To the end of the line, all or none; raises as `check_room`."""
        with self._changed:
            self.check_room(sum(map(_tokens, requests)), free_slots, len(requests))
            self._waiting.extend(requests)
            self._changed.notify()

    def join_all(self, requests: Iterable[Request]) -> None:
        """The same for many, whose number is the caller's own affair. Raises EngineStopped."""
        with self._changed:
            if self.closed:
                raise EngineStopped("the engine has ended")
            self._waiting.extend(requests)
            self._changed.notify()

    def next(self) -> Request | None:
        """The first request that is still wanted, taken out of the line; those before it that are not are answered."""
        while True:
            with self._changed:
                if not self._waiting:
                    return None
                request = self._waiting.popleft()
            if request.cancelled:
                _answer_cancelled(request)
            elif request.future.set_running_or_notify_cancel():
                return request

    def drop_cancelled(self) -> None:
        """Answer the requests that were given up while they waited, wherever they stand."""
        if not any(request.cancelled for request in list(self._waiting)):
            return
        with self._changed:
            kept, given_up = deque[Request](), list[Request]()
            for request in self._waiting:  # asked once: a client may cancel at any time
                (given_up if request.cancelled else kept).append(request)
            self._waiting = kept
        for request in given_up:
            _answer_cancelled(request)

    def wait(self) -> None:
        """Until somebody joins, or the line is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.closed)

    def close(self) -> list[Request]:
        """Nobody joins any more; returns those who still waited."""
        with self._changed:
            self.closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        return left


def _tokens(request: Request) -> int:
    return len(request.prompt_ids) + request.params.max_new_tokens


def _answer_cancelled(request: Request) -> None:
    request.finish(Completion(request.prompt_ids, [], [], "", "cancelled", None, SpeculationStats()))
