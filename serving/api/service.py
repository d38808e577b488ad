"""State that the routes share: the engine, the limits, the metrics, and the stage of the server's life."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from draft.errors import UserError
from serving.api.errors import ApiError, echo, unavailable
from serving.api.metrics import PREFIX, Metrics
from serving.api.openai_schemas import MAX_CHOICES
from serving.api.schemas import Speculative
from serving.engine import Engine, Speculation
from serving.engine.answer import special_ids

GENERATING = {"/", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"}
_LAST_EVENTS_SECONDS = 5.0  # for clients to take the last events when the server ends


@dataclass(frozen=True)
class Limits:
    """Limits on a client's requests."""

    max_new_tokens: int | None = None  # None: as many as the context holds
    max_body_bytes: int = 2_000_000
    body_seconds: float = 30.0  # from the headers to the last byte of the body
    request_seconds: float | None = 600.0  # from the receipt of a request to the end of its answer
    stalled_seconds: float = 60.0  # that a client may take none of its stream's bytes


@dataclass(frozen=True)
class Names:
    """Names of the prompt and of the number of tokens to generate in one API."""

    prompt: str
    max_tokens: str


class Service:
    """One server's state: loading (no engine yet), ready, draining, ended."""

    def __init__(
        self,
        limits: Limits,
        *,
        head_name: str | None = None,
        strict_model_name: bool = False,
        metrics_prefix: str = PREFIX,
    ) -> None:
        self.limits = limits
        self.head_name = head_name and public_name(head_name)
        self.strict_model_name = strict_model_name
        self.created = int(time.time())
        self.in_flight = 0  # HTTP requests, without those of /health, /ready and /metrics
        self.draining = False
        self.metrics: Metrics | None = None
        self._metrics_prefix = metrics_prefix
        self._engine: Engine | None = None
        self._endings: set[asyncio.Future[ApiError]] = set()  # of the generations that run
        # one thread: a tokenizer may not be set up by two at once
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def attach(self, engine: Engine) -> None:
        """Start the engine, which makes the service ready."""
        engine.start()
        self.metrics = Metrics(engine, prefix=self._metrics_prefix, model_name=public_name(engine.target.name))
        self._engine = engine

    @property
    def engine(self) -> Engine:
        """The engine. Raises ApiError 503 while it is loaded."""
        if self._engine is None:
            raise unavailable("the model is being loaded")
        return self._engine

    @property
    def loaded(self) -> bool:
        return self._engine is not None

    @property
    def alive(self) -> bool:
        """True while a restart would not help: the engine's thread runs, or is yet to come."""
        return self._engine is None or self._engine.alive

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

    @property
    def speculation_length(self) -> int:
        """Tokens drafted at a time, at most; 0 without speculation."""
        engine = self.engine
        return engine.speculation_length if engine.head is not None and engine.speculation != "off" else 0

    def speculation(self, requested: Speculative | None) -> Speculation:
        """Return a request's options, with the server's speculation length as the cap and the default."""
        requested = requested or Speculative()
        length = self.speculation_length if requested.num_tokens is None else requested.num_tokens
        length = 0 if requested.enabled is False else min(length, self.speculation_length)
        return Speculation(enabled=length > 0, num_tokens=length, rule=requested.rule)

    def check_open(self) -> Engine:
        """Return the engine. Raises ApiError, Overloaded or EngineStopped where any request would be refused."""
        engine = self.engine
        if self.draining:
            raise unavailable("the server is shutting down")
        engine.check_room()
        return engine

    def on_answer(self, path: str, status: int) -> None:
        """Count an answer by its status; 0: there was none."""
        if self.metrics is not None and path in GENERATING:
            self.metrics.failed(status)

    # prompts

    async def encode(
        self, text: str, names: Names, *, special_tokens: bool = True, end_only: bool = False
    ) -> list[int]:
        """Return the token ids of a text, or, with end_only, of an end of it that may fill the context.

        Raises:
            ApiError: for a text that must exceed the context, before it is tokenised, or that has no tokens.
        """
        limit = self.engine.max_length * self.longest_token
        if len(text) > limit:
            if not end_only:
                raise self._too_long(f"{len(text)} characters", names)
            text = text[-limit:]
        ids = (await self.tokenize(text, add_special_tokens=special_tokens)).input_ids
        if not ids:
            raise ApiError("validation", f"`{names.prompt}` must have at least 1 token. Given: 0", field=names.prompt)
        return ids

    async def tokenize(self, text: str, **options: bool) -> Any:
        """Run the tokenizer off the event loop: two megabytes of text take a second."""
        tokenizer = self.engine.target.tokenizer
        return await asyncio.get_running_loop().run_in_executor(
            self._encoder, lambda: tokenizer(text, verbose=False, **options)
        )

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, at most: a byte-level vocabulary spells each byte as a character."""
        return max(map(len, self.engine.target.tokenizer.get_vocab()))

    def render(self, messages: list[dict[str, str]], field: str) -> str:
        """Return messages as text under the target's chat template, up to where its answer begins.

        Raises:
            UserError: there is no template. ApiError: it does not take these messages.
        """
        try:
            return self.engine.target.render_chat(messages, add_generation_prompt=True)
        except UserError:
            raise
        except Exception as error:  # a template is a program: it may raise anything at what it does not expect
            message = "the model's chat template does not take these messages; check the order of their roles"
            raise ApiError("validation", message, field=field) from error

    def check_ids(self, ids: list[int], field: str) -> None:
        """Raises ApiError for ids outside the vocabulary."""
        last = self.engine.target.vocab_size - 1
        for token_id in ids:
            if token_id > last:
                message = f"`{field}` has token id {echo(token_id)}: the model's go from 0 to {last}"
                raise ApiError("validation", message, field=field)

    def new_tokens(self, requested: int | None, prompt_tokens: int, default: int | None, names: Names) -> int:
        """Return the number of tokens to generate; default: None is the room that is left.

        Raises:
            ApiError: it exceeds the server's limit or the context, with the numbers.
        """
        context, limit, field = self.engine.max_length, self.max_new_tokens, names.max_tokens
        room = context - prompt_tokens
        if room < 1:
            raise self._too_long(str(prompt_tokens), names)
        if requested is None:
            return min(limit, room, default or room)
        if requested > limit:
            raise ApiError("validation", f"`{field}` must be <= {limit}. Given: {echo(requested)}", field=field)
        if requested > room:
            message = (
                f"`{names.prompt}` tokens + `{field}` must be <= {context}. "
                f"Given: {prompt_tokens} `{names.prompt}` tokens and {requested} `{field}`"
            )
            raise ApiError("validation", message, field=field, code="context_length_exceeded")
        return requested

    def _too_long(self, given: str, names: Names) -> ApiError:
        message = f"`{names.prompt}` must have less than {self.engine.max_length} tokens. Given: {given}"
        return ApiError("validation", message, field=names.prompt, code="context_length_exceeded")

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

    def ending(self) -> asyncio.Future[ApiError]:
        """Return a future that is resolved when the server ends what still runs; its caller cancels it."""
        future: asyncio.Future[ApiError] = asyncio.get_running_loop().create_future()
        self._endings.add(future)
        future.add_done_callback(self._endings.discard)
        return future

    async def drain(self, seconds: float) -> None:
        """Take no more requests, let those that run finish for that long, then end them with an error."""
        self.draining = True
        await self._until_idle(seconds)
        for future in list(self._endings):
            if not future.done():
                future.set_result(unavailable("the server is shutting down"))
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
        self._encoder.shutdown(wait=False, cancel_futures=True)


def public_name(name: str) -> str:
    """Return a name that reveals nothing of the machine's folders: a path's last part; hub ids stay whole."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else name
