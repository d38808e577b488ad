"""One request: the client's handle of it, its options, its answer while that grows, and what it gives back."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from draft.errors import UserError
from draft.evaluation.tau import acceptance_length
from serving.engine.sampling import SamplingParams

MAX_SPECULATION_LENGTH = 32  # beyond any acceptance length that a head reaches
# tokens before the one to be decoded that may change its text: tokenizers with a word-start marker need one
_CONTEXT = 6
_UNFINISHED = 3  # the most tokens that wait for a character's last byte, since it has up to 4
_NUMBERS = itertools.count()


class Overloaded(Exception):
    """The queue is full."""


class EngineStopped(Exception):
    """The engine has ended, or gave this request up to end: nothing more will be generated."""


@dataclass(frozen=True)
class Speculation:
    """A request's options of speculation. They change its speed, and never the distribution of its text.

    Raises:
        UserError: for a number of tokens out of range.
    """

    enabled: bool = True
    num_tokens: int | None = None  # the most that are drafted at a time; None: as the engine does. 0 is off
    rule: str | None = None  # None: the engine's

    def __post_init__(self) -> None:
        if self.num_tokens is not None:
            check_speculation_length(self.num_tokens)


def check_speculation_length(length: int) -> int:
    if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= MAX_SPECULATION_LENGTH:
        raise UserError(
            f"speculation_length = {length!r}: it must be a whole number from 0 (off) to {MAX_SPECULATION_LENGTH}."
        )
    return length


@dataclass(frozen=True)
class Times:
    """When things happened to a request, in seconds of time.monotonic(); 0 is not yet."""

    submitted: float
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


class Request:
    """One request: `async for` follows it, `result()` waits for it, `cancel()` gives it up at the next step."""

    def __init__(self, prompt_ids: list[int], params: SamplingParams, speculation: Speculation) -> None:
        self.number = next(_NUMBERS)
        self.context = contextvars.copy_context()  # the client's, for log lines about this request
        self.prompt_ids, self.params, self.speculation = prompt_ids, params, speculation
        self.times = Times(submitted=time.monotonic())
        self.arrivals: list[float] = []  # when tokens came, some at a time: seconds of time.monotonic()
        self.future: Future[Completion] = Future()
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._released: list[Token] = []
        self._last: list[Token] = []  # the tokens that come with the completion
        self._listener: Callable[[], None] | None = None

    # the client's side

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end. Raises EngineStopped when the engine ends first, or whatever went wrong."""
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Give up: the slot is free after the engine's current step; the completion has what there was."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def done(self) -> bool:
        return self.future.done()

    async def __aiter__(self) -> AsyncIterator[Token | Completion]:
        """Yield each token when it is decided, and the completion at the end. One iteration a request.

        Leaving the iteration early cancels the request.
        """
        async with aclosing(self.bursts()) as bursts:
            async for tokens, completion in bursts:
                for token in tokens:
                    yield token
                if completion is not None:
                    yield completion

    async def bursts(self) -> AsyncGenerator[tuple[list[Token], Completion | None]]:
        """Yield tokens together that have come together; the last of them come with the completion."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(changed.set)

        self._listener = wake
        self.future.add_done_callback(lambda _: wake())
        try:
            while True:
                tokens, done = self._take()
                if done and (self.future.exception() is None or not tokens):
                    yield tokens, self.future.result()
                    return
                if tokens:  # what came before an error comes before it
                    yield tokens, None
                if done:
                    continue
                await changed.wait()
                changed.clear()
        finally:
            self._listener = None
            self.cancel()

    def _take(self) -> tuple[list[Token], bool]:
        """Return the tokens that have come, and True when they are the last."""
        with self._lock:
            done = self.done
            tokens, self._released = self._released, []
            if done:  # nobody sees the last tokens without the completion
                tokens, self._last = tokens + self._last, []
            return tokens, done

    # the engine's side

    def release(self, tokens: list[Token]) -> None:
        """Hand out tokens whose text is certain."""
        if not tokens:
            return
        with self._lock:
            self._released.extend(tokens)
            self.arrivals.append(time.monotonic())
        listener = self._listener  # which the client's thread takes away
        if listener is not None:
            listener()

    def stamp(self, **times: float) -> None:
        """Set fields of `times`."""
        self.times = replace(self.times, **times)

    def finish(self, completion: Completion, tokens: Sequence[Token] = ()) -> None:
        """End the request; tokens: those that were not released before."""
        now = time.monotonic()
        self.stamp(finished=now)
        if tokens:
            self._last = list(tokens)
            self.arrivals.append(now)
        with suppress(InvalidStateError):
            self.future.set_result(completion)  # under no lock: its callbacks may look at the request

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        self.stamp(finished=time.monotonic())
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass
class Token:
    """One token of an answer."""

    id: int
    text: str  # what it adds to the text ("" while a character is incomplete); a special token's name
    logprob: float | None  # natural log of the target's own probability: before penalties, temperature and truncation
    special: bool  # special tokens are not in the answer's text
    accepted_position: int | None  # 0-based draft position, or None: supplied by the target itself
    top: list[tuple[int, float]] | None = None  # the most probable ids and their logprobs, falling
    rejected: int | None = None  # what the head had drafted here, the first of several, where the target chose another
    drafted: int = 0  # tokens in a row that had been drafted for the verification which decided this one


@dataclass
class Completion:
    """The answer to one request."""

    prompt_ids: list[int]
    token_ids: list[int]  # an EOS token included, and a stop id where the request keeps it
    tokens: list[Token]
    text: str  # special tokens left out
    finish_reason: str  # "length", "eos_token", "stop_sequence", or "cancelled"
    seed: int | None  # None for a greedy request without one: nothing was random
    stats: SpeculationStats
    stop_reason: str | int | None = None  # the stop string, or the stop id, that ended it


@dataclass
class SpeculationStats:
    """Counts of one request's speculation. Only tokens that are in the answer count as emitted or accepted.

    A verification is one pass of the target after the prefill; without speculation it has no drafted tokens and
    emits one token.
    """

    verifications: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0  # by verifications: the bonus token included, the one that the prefill gave excluded
    drafted_per_position: list[int] = field(default_factory=list)  # index: draft position
    accepted_per_position: list[int] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)  # of each verification: drafted in a row, accepted
    prefill_seconds: float = 0.0  # the prompt through the target, up to the first token
    decode_seconds: float = 0.0  # the steps that follow; the head reads the prompt in the first of them that drafts

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted / verifications; nan when there was no verification."""
        return acceptance_length(self.emitted, self.verifications)

    def count(self, depth: int, drafted: int, accepted: int, emitted: int) -> None:
        """Add one verification: of `drafted` tokens, up to `depth` in a row, with the tokens accepted and emitted."""
        self.verifications += 1
        self.steps.append((depth, accepted))
        self.drafted += drafted
        self.accepted += accepted
        self.emitted += emitted
        for counts, until in ((self.drafted_per_position, depth), (self.accepted_per_position, accepted)):
            counts.extend([0] * (depth - len(counts)))
            for position in range(until):
                counts[position] += 1

    def settle(self, tokens: list[Token]) -> None:
        """Count again the answer's `tokens`, after a stop string took back some of those that had been emitted."""
        verified = tokens[1:]  # the first is the prefill's
        positions = [token.accepted_position for token in verified if token.accepted_position is not None]
        self.emitted, self.accepted = len(verified), len(positions)
        self.accepted_per_position = [positions.count(p) for p in range(len(self.drafted_per_position))]
        left = len(verified)
        for index, (depth, accepted) in enumerate(self.steps):
            self.steps[index] = (depth, min(accepted, left))
            left = max(0, left - accepted - 1)


def special_ids(tokenizer: Any, eos_ids: frozenset[int]) -> frozenset[int]:
    """Return the ids that are never in a text: the target's EOS, and the tokenizer's special tokens, named or added."""
    added = (token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    return eos_ids.union(tokenizer.all_special_ids, added)


class GrowingAnswer:
    """The answer of a request while it grows: its tokens, its text, and the reason for its end.

    Each token may end it, for the first of these reasons: it is an EOS id; it is a stop id; the text now has a stop
    string (of several the one that is complete first); the answer has max_new_tokens.

    With keep_stop the text ends with the stop string, and a token that brought more keeps the part before; a stop id
    stays with what it adds. Without, the text ends before the stop string, tokens that begin there or later are
    dropped with their logprobs, the one before keeps the text that is left of it; a stop id is dropped. Text of the
    prompt and of the first min_new_tokens tokens is no part of any stop string.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        tokenizer: Any,
        eos_ids: frozenset[int],
        special: frozenset[int],
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.tokens: list[Token] = []
        self.text = ""
        self.finish_reason: str | None = None  # "eos_token", "stop_sequence", "length" or "cancelled"
        self.stop_reason: str | int | None = None  # the string or the id, for "stop_sequence"
        self._eos_ids = frozenset() if params.ignore_eos else eos_ids
        self._special = special
        self._tokenizer = tokenizer
        self._detokenizer = _Detokenizer(tokenizer, [i for i in self.prompt_ids[-_CONTEXT:] if i not in special])
        self._stop_strings = StopStrings(params.stop)
        self._starts: list[int] = []  # of each token's text, in characters of the answer
        self._released = 0  # tokens
        self._last_shown = 0  # index of the last token that is not special

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer."""
        return len(self.prompt_ids) + len(self.tokens)

    @property
    def last_id(self) -> int:
        return self.tokens[-1].id

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self.params.max_new_tokens - len(self.tokens)

    def append(
        self,
        token_id: int,
        logprob: float | None = None,
        top: list[tuple[int, float]] | None = None,
        accepted_position: int | None = None,
        rejected: int | None = None,
        drafted: int = 0,
    ) -> None:
        """Add one token and decide whether the sequence ends with it; arguments as in `Token`."""
        is_eos, is_stop = token_id in self._eos_ids, token_id in self.params.stop_ids
        special, dropped = token_id in self._special, is_stop and not is_eos and not self.params.keep_stop
        hidden = special or dropped
        ends = is_eos or is_stop or self.remaining == 1
        added = self._detokenizer.add([] if hidden else [token_id], flush=ends)
        if hidden and added:  # the beginning of a character that will not be completed
            self.tokens[self._last_shown].text += added
        if not dropped:
            self._starts.append(len(self.text))
            name = (self._tokenizer.convert_ids_to_tokens(token_id) or "") if special else added
            self.tokens.append(Token(token_id, name, logprob, special, accepted_position, top, rejected, drafted))
        if not hidden:
            self._last_shown = len(self.tokens) - 1
        self.text += added
        if is_eos:
            self.finish_reason = "eos_token"
        elif is_stop:
            self.finish_reason, self.stop_reason = "stop_sequence", token_id
        elif (hidden or not self._find_stop_string(added)) and self.remaining == 0:
            self.finish_reason = "length"

    def cancel(self) -> None:
        """End the request with what it has."""
        self.finish_reason = self.finish_reason or "cancelled"

    def release(self) -> list[Token]:
        """Return the tokens that no stop string can take back any more, each once and in order; all after the end."""
        first, end = self._released, len(self.tokens)
        if self.finish_reason is None and self._detokenizer.pending:
            end = self._last_shown  # may be given what is left of a character
        if self.finish_reason is None and self.params.stop and not self.params.keep_stop:
            certain = len(self.text) - self._stop_strings.held
            ends = [*self._starts[1:], len(self.text)]  # of each token's text
            while end > first and (ends[end - 1] > certain or self._starts[end - 1] >= certain):
                end -= 1
        self._released = end
        return self.tokens[first:end]

    def _find_stop_string(self, added: str) -> bool:
        """Look for a stop string in the text that was added, and end the answer there."""
        if len(self.tokens) <= self.params.min_new_tokens:
            self._stop_strings.skip(added)
            return False
        match = self._stop_strings.feed(added)
        if match is None:
            return False
        self.finish_reason, self.stop_reason = "stop_sequence", match.stop
        end = match.end if self.params.keep_stop else match.start
        self.text = self.text[:end]
        while self._starts and self._starts[-1] >= end and len(self.tokens) > self.params.min_new_tokens:
            self._starts.pop()
            self.tokens.pop()
        if self.tokens and not self.tokens[-1].special:
            self.tokens[-1].text = self.text[self._starts[-1] :]
        return True


class _Detokenizer:
    """Text of a growing list of tokens, at a cost that does not grow: only the last few are decoded again.

    tokenizers' DecodeStream does not serve here: it waits for ever for the end of a character that never comes, at a
    growing cost, holds back a U+FFFD that the text really has, and cannot be made to give what it holds at the end.
    """

    def __init__(self, tokenizer: Any, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = context  # ids that may still matter to what follows
        self._read = len(context)  # ids[:read] have given their text, `before`
        self._before = self._decode(context)

    @property
    def pending(self) -> bool:
        """True while the last ids are the beginning of a character."""
        return self._read < len(self._ids)

    def add(self, ids: list[int], *, flush: bool) -> str:
        """Return the text that has become certain; a character whose bytes are not all there waits, unless `flush`."""
        self._ids += ids
        if self._read == len(self._ids):
            return ""
        text, end = self._decode(self._ids), len(self._ids)
        if not flush and text.endswith("\N{REPLACEMENT CHARACTER}"):
            if end - self._read <= _UNFINISHED:
                return ""
            end -= _UNFINISHED  # what came before can't be completed any more
            text = self._decode(self._ids[:end])
        added = text[len(self._before) :]
        self._before, self._read = text, end
        if end > 4 * _CONTEXT:
            del self._ids[: end - _CONTEXT]
            self._read = _CONTEXT
            self._before = self._decode(self._ids[:_CONTEXT])
        return added

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Match(NamedTuple):
    """A stop string and its place in the text, in characters."""

    start: int
    end: int
    stop: str


class StopStrings:
    """Finds the stop string that is complete first, whatever pieces the text comes in; of two, the longer one.

    Only the end of the text is kept and searched, in which a stop string may have begun.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = list(dict.fromkeys(stops))
        self._longest = max(map(len, self._stops), default=0)
        self._start, self._end = 0, ""  # of the text; where it begins, in characters

    @property
    def held(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        begins = (place for place in range(len(self._end)) if self._may_begin(self._end[place:]))
        return len(self._end) - next(begins, len(self._end))

    def _may_begin(self, end: str) -> bool:
        return any(len(end) < len(stop) and stop.startswith(end) for stop in self._stops)

    def skip(self, text: str) -> None:
        """Pass over text in which no stop string counts, not even its beginning."""
        self._start, self._end = self._start + len(self._end) + len(text), ""

    def feed(self, text: str) -> Match | None:
        """Read more text up to the first stop string that it completes."""
        text = self._end + text
        places = ((text.find(stop), stop) for stop in self._stops)
        found = [(place + len(stop), -len(stop), stop) for place, stop in places if place >= 0]
        if found:
            end, _, stop = min(found)
            return Match(self._start + end - len(stop), self._start + end, stop)
        passed = max(0, len(text) - self._longest + 1)
        self._start, self._end = self._start + passed, text[passed:]
        return None
