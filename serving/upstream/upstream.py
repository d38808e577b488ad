"""A server upstream as the API's backend: its requests are forwarded by token ids, and come back as the engine's do."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from draft.errors import UserError
from draft.heads.checkpoint import head_config, head_sha256
from draft.target import TextTarget, load_text_target, read_chat_template
from serving.backend import DraftCounts, Unavailable
from serving.engine.answer import GrowingAnswer, special_ids
from serving.engine.engine import check_prompt
from serving.engine.request import (
    MAX_SPECULATION_LENGTH,
    Completion,
    EngineStopped,
    Overloaded,
    Request,
    Speculation,
)
from serving.engine.sampling import SEED_LIMIT, SamplingParams
from serving.engine.self_check import AcceptanceWatch
from serving.upstream.connection import Connection
from serving.upstream.dialects import BadAnswer, read_chunk, speculation_stats

log = logging.getLogger(__name__)


class Upstream:
    """A `serving.backend.Backend` over another server: token by token, with the texts and reasons of the engine.

    It has a thread of its own, like the engine: `start` gives it one, `connect` waits for the first contact. A server
    that cannot be reached is tried again, at growing intervals; `ready` is False until it answers. A request is sent
    again only where its connection was refused, which is before anything of it was sent.
    """

    rule = None
    dtype = None
    weights = ""
    device = "upstream"
    speculation = "upstream"
    tree_size = None
    lookup_length = 0
    limit_note = ""
    max_waiting = 0  # all are passed on: the queue is the other server's
    max_waiting_tokens = None
    cache_tokens = float("nan")

    def __init__(
        self,
        url: str,
        target: TextTarget,
        *,
        key: str | None = None,
        head: Any = None,
        head_name: str | None = None,
        max_requests: int = 272,
        poll_seconds: float = 5.0,
    ) -> None:
        """
        url: of the server, with or without `/v1`. key: for `Authorization: Bearer`. head, head_name: of the draft
        head that it was started with, as of `serving.backend.Backend`. max_requests: passed on at once. poll_seconds:
        between readings of its health and figures.

        Raises:
            UserError: for a URL that is none.
        """
        self.connection = Connection(url, target, key, poll_seconds)
        self.target, self.head, self.head_name, self.max_batch = target, head, head_name, max_requests
        self._special_ids = special_ids(target.tokenizer, target.eos_token_ids)
        self._closed = False
        self._passed_on: set[_Forwarded] = set()  # requests that have not ended
        self._lock = threading.Lock()  # of that set
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looping = threading.Event()
        self._thread: threading.Thread | None = None

    # its thread

    def start(self) -> None:
        """Begin to reach for the server; a second call changes nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="upstream", daemon=True)
            self._thread.start()
            self._looping.wait()

    def connect(self, check: Callable[[], None] = lambda: None) -> None:
        """Start, and wait for the server; check: called meanwhile, and raises to give up.

        Raises:
            UserError: it serves another target, or is of a kind that is not known.
        """
        self.start()
        while True:
            with suppress(TimeoutError):
                return self.connection.contact.result(0.2)
            check()

    def close(self) -> None:
        """End; whoever still waits gets EngineStopped."""
        self._closed = True
        self._call(lambda: self._main.cancel())
        if self._thread is not None:
            self._thread.join(10.0)
        for request in self._requests():
            self._passed_on.discard(request)
            request.fail(EngineStopped("the server ends"))

    def _run(self) -> None:
        async def run() -> None:
            self._loop, self._main = asyncio.get_running_loop(), asyncio.ensure_future(self.connection.attend())
            self._looping.set()
            await self._main

        with suppress(asyncio.CancelledError):
            asyncio.run(run())  # which cancels what still runs

    def _call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the thread, in the order of these calls; nothing once it has ended."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(function, *arguments)

    # requests

    def check_room(self, tokens: int = 0, requests: int = 1) -> None:
        if not self.alive:
            raise EngineStopped("the server ends")
        if not self.ready:
            raise Unavailable(self.connection.reason, self.connection.retry)
        if len(self._passed_on) + requests > self.max_batch:
            raise Overloaded(f"{len(self._passed_on)} requests are passed on already, of at most {self.max_batch}")

    def submit_all(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        speculation: Speculation | None = None,
    ) -> list[Request]:
        server, vocab_size = self.connection.server, self.target.vocab_size
        for prompt, each in zip(prompts, params, strict=True):
            check_prompt(prompt, vocab_size, self.max_length, each.max_new_tokens)
            each.check_vocabulary(vocab_size)
            if server is not None:
                server.check(each)
        requests = []
        for prompt, each in zip(prompts, params, strict=True):
            answer = GrowingAnswer(prompt, each, self.target.tokenizer, self.target.eos_token_ids, self._special_ids)
            requests.append(_Forwarded(list(prompt), each, speculation or Speculation(), answer, self._abandon))
        with self._lock:
            self.check_room(requests=len(requests))
            self._passed_on.update(requests)
        for request in requests:
            self._call(self._begin, request)
        return list(requests)

    def _requests(self) -> list[_Forwarded]:
        with self._lock:
            return list(self._passed_on)

    def _begin(self, request: _Forwarded) -> None:
        request.task = asyncio.ensure_future(self._exchange(request))
        request.task.add_done_callback(partial(self._ended, request))

    def _abandon(self, request: _Forwarded) -> None:
        """End the exchange with the server, whose connection is closed. Any thread may call it."""
        self._call(lambda: request.task and request.task.cancel())

    async def _exchange(self, request: _Forwarded) -> dict[str, Any] | None:
        """Pass a request on, and its tokens back; returns the server's figures of its speculation.

        The server has the stop strings, too, and ends at the same token. One that goes on is left.
        """
        server, answer, params, times = self.connection.server, request.answer, request.params, request.times
        assert server is not None
        times.started = time.monotonic()
        if params.seed is None and params.temperature > 0 and server.reproduces:
            request.seed = secrets.randbelow(SEED_LIMIT)  # drawn here, so that the answer can name it
            params = params.model_copy(update={"seed": request.seed})
        body = server.body(self.connection.model, request.prompt_ids, params, request.speculation, self.longest_draft)
        figures = None
        async with aclosing(self.connection.events(body)) as events:
            async for event in events:
                chunk = read_chunk(event, params.logprobs)
                if chunk.tokens and answer.finish_reason is not None:
                    return None
                for token_id, logprob, top in chunk.tokens:
                    if answer.finish_reason is None:  # a step of speculation may bring more
                        answer.append(token_id, logprob, top)
                if chunk.tokens and not times.first_token:
                    times.first_token = time.monotonic()
                if answer.finish_reason is None and chunk.finish_reason is not None:
                    self._end_as(answer, chunk.finish_reason, chunk.stop_reason)
                if answer.finish_reason is None:  # the last ones come with the completion
                    request.release(answer.release())
                figures = chunk.speculation or figures
        if answer.finish_reason is None:
            raise BadAnswer("the answer has no end")
        return figures

    def _end_as(self, answer: GrowingAnswer, reason: str, matched: str | int | None) -> None:
        """End an answer for the server's reason, where its tokens did not show one."""
        if reason not in ("stop", "length"):
            raise BadAnswer(f"the answer ended for the reason {reason!r}")
        stopped = matched is not None and matched not in self.target.eos_token_ids
        answer.finish_reason = "length" if reason == "length" else "stop_sequence" if stopped else "eos_token"
        answer.stop_reason = matched if reason == "stop" and stopped else None

    def _ended(self, request: _Forwarded, task: asyncio.Future[dict[str, Any] | None]) -> None:
        """End a request by its answer or an error: the one place where all pass once they are done."""
        with self._lock:
            self._passed_on.discard(request)
        answer, figures = request.answer, None
        if self._closed:
            request.fail(EngineStopped("the server ends"))
            return
        if task.cancelled():
            answer.cancel()
        elif (error := task.exception()) is not None:
            if not isinstance(error, (UserError, Overloaded, Unavailable)):
                request.context.run(log.error, "a request failed upstream: %s", error, exc_info=error)
            request.fail(error)
            return
        else:
            figures = task.result()
        stats = speculation_stats(figures, max(0, len(answer.tokens) - 1))
        if figures is not None and "head" in figures:  # draft-serve names it, vLLM does not
            stats.head, stats.head_fingerprint = figures["head"], figures.get("head_fingerprint")
        elif self.head is not None:
            stats.head, stats.head_fingerprint = self.head_name, self.head.fingerprint
        completion = Completion(
            request.prompt_ids,
            [token.id for token in answer.tokens],
            answer.tokens,
            answer.text,
            answer.finish_reason or "cancelled",
            request.seed,
            stats,
            answer.stop_reason,
        )
        request.finish(completion, answer.release())

    # limits and figures

    @property
    def alive(self) -> bool:
        return not self._closed and (self._thread is None or self._thread.is_alive())

    @property
    def ready(self) -> bool:
        return self.connection.ready

    @property
    def max_length(self) -> int:
        return self.connection.max_length

    def default_new_tokens(self, prompt_tokens: int) -> int:
        return self.max_length - prompt_tokens

    @property
    def speculative_fields(self) -> frozenset[str]:
        server = self.connection.server
        return server.speculative if server is not None else frozenset()

    @property
    def head_length(self) -> int:
        return self.longest_draft

    @property
    def longest_draft(self) -> int:
        return min(self.connection.figures.longest_draft, MAX_SPECULATION_LENGTH)  # a server may draft more

    @property
    def watch(self) -> AcceptanceWatch:
        return self.connection.watch

    def draft_counts(self) -> DraftCounts:
        return self.connection.figures.counts

    @property
    def running(self) -> int:
        return sum(request.times.first_token > 0 for request in self._requests())

    @property
    def waiting(self) -> int:
        return sum(request.times.first_token == 0 for request in self._requests())

    @property
    def cache_usage(self) -> float:
        return self.connection.figures.cache_usage

    def stats(self) -> dict[str, Any]:
        counts, server = self.draft_counts(), self.connection.server
        drafts = counts.drafts or float("nan")
        return {
            "running": self.running,
            "waiting": self.waiting,
            "cache_usage": self.cache_usage,
            "mode": "upstream",
            "server": server and server.name,
            "ready": self.ready,
            "speculation": {
                "drafts": counts.drafts,
                "drafted": counts.drafted,
                "accepted": counts.accepted,
                "acceptance_length": counts.acceptance_length,
                "acceptance_per_position": [accepted / drafts for accepted in counts.accepted_per_position],
            },
        }


class _Forwarded(Request):
    """A request that another server answers."""

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        speculation: Speculation,
        answer: GrowingAnswer,
        abandon: Callable[[_Forwarded], None],
    ) -> None:
        super().__init__(prompt_ids, params, speculation)
        self.answer = answer
        self.seed = params.seed
        self.task: asyncio.Future[dict[str, Any] | None] | None = None
        self._abandon = abandon

    def cancel(self) -> None:
        """Give up: the exchange with the server ends at once."""
        super().cancel()
        if not self.done:
            self._abandon(self)


def load_upstream(
    url: str,
    target: str,
    head: tuple[str, str] | None,
    *,
    key: str | None = None,
    chat_template: Path | None = None,
    max_requests: int,
    check: Callable[[], None] = lambda: None,
) -> Upstream:
    """Return a server upstream that answers; target and head: those that it serves, of which no weights are read.

    head: its name and folder. check: called while it is waited for, and raises to give up.

    Raises:
        UserError: as `load_text_target` and `Upstream.connect`.
    """
    texts = load_text_target(target, None if chat_template is None else read_chat_template(chat_template))
    shape, fingerprint = None, None
    if head is not None:
        kind, values = head_config(head[1])
        with suppress(UserError):  # weights in other files than ours have none
            fingerprint = head_sha256(head[1])
        shape = SimpleNamespace(
            stored_as=kind.stored_as, config=kind.config_class.from_dict(values), fingerprint=fingerprint
        )
    name = head[0] if head is not None else None
    upstream = Upstream(url, texts, key=key, head=shape, head_name=name, max_requests=max_requests)
    upstream.connect(check)
    return upstream
