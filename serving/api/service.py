"""State that the routes share: the engine, the limits, the metrics, and the stage of the server's life."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from draft.target import TemplateRefusal
from serving.api.errors import ApiError, echo, unavailable
from serving.api.metrics import Metrics
from serving.api.openai_schemas import MAX_CHOICES
from serving.api.schemas import Speculative
from serving.backend import Backend
from serving.engine import Speculation
from serving.engine.answer import special_ids
from serving.names import public_name
from serving.server import STALLED_SECONDS

if TYPE_CHECKING:
    from serving.api.captured import Capturing

GENERATING = {"/", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"}
_LAST_EVENTS_SECONDS = 5.0  # for clients to take the last events when the server ends


@dataclass(frozen=True)
class Limits:
    """Limits on a client's requests."""

    max_new_tokens: int | None = None  # None: as many as the context holds
    max_body_bytes: int = 2_000_000
    body_seconds: float = 30.0  # from the headers to the last byte of the body
    request_seconds: float | None = 600.0  # from the receipt of a request to the end of its answer
    stalled_seconds: float = STALLED_SECONDS


class Service:
    """One server's state: loading (no engine yet), ready, unavailable, draining, ended."""

    def __init__(self, limits: Limits, strict_model_name: bool, metrics_prefix: str) -> None:
        self.limits = limits
        self.capture: Capturing | None = None
        self.strict_model_name = strict_model_name
        self.created = int(time.time())
        self.in_flight = 0  # HTTP requests, without those of /health, /ready and /metrics
        self.draining = False
        self.metrics: Metrics | None = None
        self._metrics_prefix = metrics_prefix
        self._engine: Backend | None = None
        self.endings: set[Callable[[ApiError], None]] = set()  # each ends a generation that runs
        # one thread: a tokenizer may not be set up by two at once
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self.loader = ThreadPoolExecutor(1, thread_name_prefix="heads")  # one head at a time is loaded

    def attach(self, engine: Backend) -> None:
        """Start the engine, which makes the service ready; UserError where its answers cannot be captured."""
        name = public_name(engine.target.name)
        if self.capture is not None:
            self.capture.start(engine, name)
        engine.start()
        self.metrics = Metrics(engine, prefix=self._metrics_prefix, model_name=name)
        if self.capture is not None:
            self.capture.count(self.metrics.registry, self._metrics_prefix)
        self._engine = engine

    @property
    def engine(self) -> Backend:
        """The engine. Raises ApiError 503 while it is loaded."""
        if self._engine is None:
            raise unavailable("the model is being loaded")
        return self._engine

    @property
    def stage(self) -> str:
        """The stage of the server's life; only when it is `unhealthy`, a restart would help."""
        if self._engine is not None and not self._engine.alive:
            return "unhealthy"
        if self.draining:
            return "draining"
        return "loading" if self._engine is None else "ready" if self._engine.ready else "unavailable"

    @property
    def model_name(self) -> str:
        return public_name(self.engine.target.name)

    @property
    def max_new_tokens(self) -> int:
        return self.limits.max_new_tokens or self.engine.max_length

    @property
    def max_choices(self) -> int:
        """Sequences of one request: more than fit into an idle engine and its queue would never be taken."""
        return min(MAX_CHOICES, self.engine.max_batch + self.engine.max_waiting)

    def speculation(self, requested: Speculative | None) -> Speculation:
        """Return a request's options, with the most tokens that the engine drafts as the cap and the default."""
        requested = requested or Speculative()
        if (taken := self.engine.speculative_fields) is not None:
            for name, value in requested.model_dump(exclude_none=True).items():
                if name not in taken and (name, value) not in (("enabled", True), ("origin", False)):
                    message = f"`speculative.{name}` has no effect on the server that answers here; leave it out"
                    raise ApiError("validation", message, field=f"speculative.{name}")
        most = self.engine.longest_draft
        length = most if requested.num_tokens is None else requested.num_tokens
        length = 0 if requested.enabled is False else min(length, most)
        return Speculation(enabled=length > 0, num_tokens=length, rule=requested.rule, head=requested.head)

    def check_open(self) -> Backend:
        """Return the engine. Raises ApiError, Overloaded, EngineStopped or Unavailable where any would be refused."""
        engine = self.engine
        if self.draining:
            raise unavailable("the server is shutting down")
        engine.check_room()
        return engine

    # prompts

    async def encode(self, text: str, field: str, *, end_only: bool = False, **options: bool) -> Any:
        """Return the tokenizer's encoding of a text, or, with end_only, of an end of it that may fill the context.

        Raises:
            ApiError: for a text that must exceed the context, before it is tokenised, or that has no tokens.
        """
        limit = self.engine.max_length * self.longest_token
        if len(text) > limit:
            if not end_only:
                raise self._too_long(f"{len(text)} characters", field)
            text = text[-limit:]
        # off the event loop: two megabytes of text take a second
        work = partial(self.engine.target.tokenizer, text, verbose=False, **options)
        encoded = await asyncio.get_running_loop().run_in_executor(self._encoder, work)
        if not encoded.input_ids:
            raise ApiError("validation", f"`{field}` must have at least 1 token. Given: 0", field=field)
        return encoded

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, at most: a byte-level vocabulary spells each byte as a character."""
        return max(map(len, self.engine.target.tokenizer.get_vocab()))

    def render(self, messages: list[dict[str, str]], field: str) -> str:
        """Return messages as text under the target's chat template, up to where its answer begins.

        A developer's message is a system prompt where the template does not know that role.

        Raises:
            UserError: there is no template, or it leaves out what users say. ApiError: it does not take these messages.
        """
        target = self.engine.target
        with suppress(TemplateRefusal):  # of a user's turn alone, as by templates that demand a system prompt
            target.check_template()
        if "developer" not in target.template_for():
            messages = [each | {"role": "system"} if each["role"] == "developer" else each for each in messages]
        try:
            return target.render_chat(messages, add_generation_prompt=True)
        except TemplateRefusal as error:
            message = "the model's chat template does not take these messages; check the order of their roles"
            raise ApiError("validation", message, field=field) from error

    def check_ids(self, ids: list[int], field: str) -> None:
        """Raises ApiError for ids outside the vocabulary."""
        last = self.engine.target.vocab_size - 1
        if max(ids, default=0) > last:
            message = f"`{field}` has token id {echo(max(ids))}: the model's go from 0 to {last}"
            raise ApiError("validation", message, field=field)

    def new_tokens(
        self, requested: int | None, prompt_tokens: int, default: int | None, prompt_field: str, field: str
    ) -> int:
        """Return the number of tokens to generate; default: None is the room that is left,
        and at most the sequence's part of the cache.

        Raises:
            ApiError: it exceeds the server's limit or the context, with the numbers.
        """
        context, limit = self.engine.max_length, self.max_new_tokens
        room = context - prompt_tokens
        if room < 1:
            raise self._too_long(str(prompt_tokens), prompt_field)
        if requested is None:
            return min(limit, default or self.engine.default_new_tokens(prompt_tokens), room)
        if requested > limit:
            note = "" if self.limits.max_new_tokens else self.engine.limit_note
            raise ApiError("validation", f"`{field}` must be <= {limit}{note}. Given: {echo(requested)}", field=field)
        if requested > room:
            message = (
                f"`{prompt_field}` tokens + `{field}` must be <= {context}{self.engine.limit_note}. "
                f"Given: {prompt_tokens} `{prompt_field}` tokens and {requested} `{field}`"
            )
            raise ApiError("validation", message, field=field, code="context_length_exceeded")
        return requested

    def _too_long(self, given: str, field: str) -> ApiError:
        limit = f"{self.engine.max_length} tokens{self.engine.limit_note}"
        message = f"`{field}` must have less than {limit}. Given: {given}"
        return ApiError("validation", message, field=field, code="context_length_exceeded")

    def token_text(self, token_id: int) -> tuple[str, bool]:
        """Return a token's text, and True if it is special; a piece of a character shows as U+FFFD."""
        target = self.engine.target
        if token_id in self._special:
            return target.tokenizer.convert_ids_to_tokens(token_id) or "", True
        return target.decode([token_id]), False

    @cached_property
    def _special(self) -> frozenset[int]:
        return special_ids(self.engine.target.tokenizer, self.engine.target.eos_token_ids)

    # the end

    async def drain(self, seconds: float) -> None:
        """Take no more requests, let those that run finish for that long, then end them with an error."""
        self.draining = True
        await self._until_idle(seconds)
        for end in list(self.endings):
            end(unavailable("the server is shutting down"))
        await self._until_idle(_LAST_EVENTS_SECONDS)

    async def _until_idle(self, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while self.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """Close the engine; whoever still waits gets EngineStopped."""
        self.draining = True
        if self._engine is not None:
            self._engine.close()
        if self.capture is not None:
            self.capture.close()
        for executor in (self._encoder, self.loader):
            executor.shutdown(wait=False, cancel_futures=True)
