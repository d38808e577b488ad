"""What the target writes: prompts of its own, and the answers to prompts, turn by turn."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from draft.data.dataset import Parts, Response, Row, conversation_id, hashed
from draft.data.examples import Message, first_prompt, next_prompt, up_to_user_turn
from draft.data.generate import Endpoint, Question
from draft.data.prompts import SELF_PROMPTED, Prompt, user_turn, written_prompt
from draft.data.responses import generate_responses
from draft.data.shards import Shard
from draft.errors import UserError
from draft.target import Target

log = logging.getLogger(__name__)

SELF_PROMPTS = 500  # when the user does not say how many
_SELF_PROMPT_TOKENS = 80
_SELF_PROMPT_TOP_P = 0.95  # the tail of a prompt's distribution is noise; responses are never cut
_SELF_PROMPT_ROUNDS = 10
_TOO_MANY = 8  # conversations refused by an endpoint, and none answered


@dataclass
class Settings:
    """The arguments that decide what the data set holds."""

    num_prompts: int | None
    keep_responses: bool
    max_new_tokens: int
    max_length: int
    greedy_share: float
    held_out_share: float
    seed: int


@dataclass(frozen=True)
class Chat:
    """A prompt as messages, and the place that its conversation came from."""

    where: str
    messages: list[Message]
    later: bool  # whether it goes on after an answer of the target's


@dataclass
class Writer:
    """The target with a store of what it has written: an interrupted run goes on where it stopped."""

    target: Target
    settings: Settings
    parts: Parts
    batch_size: int
    show: bool  # a progress bar
    shard: Shard | None = None  # whose conversations are answered; None: all
    endpoint: Endpoint | None = None  # that answers in the target's place
    counts: Counter[str] = field(default_factory=Counter)

    def write(
        self,
        stage: str,
        prompts: dict[int, list[int]],
        temperatures: dict[int, float],
        what: str,
        max_new_tokens: int,
        top_p: float = 1.0,
        chats: dict[int, Chat] | None = None,
    ) -> dict[int, Response]:
        """What the target writes after each prompt, by index; what an interrupted run stored is not written again.

        chats: the same prompts as an endpoint is asked; without, the target itself writes in any case. Those of their
        later turns that the endpoint refuses are missing from the answer.
        """
        done = {index: response for index, response in self.parts.load(stage).items() if index in prompts}
        todo = [index for index in prompts if index not in done]
        if not todo:
            return done
        with _Meter(f"writing {what}", len(todo), max_new_tokens, self.show) as meter, _flushed(self.parts, stage):
            asked, heats = [prompts[index] for index in todo], [temperatures[index] for index in todo]
            keys = [f"{stage}:{index}" for index in todo]
            if self.endpoint is not None and chats is not None:
                told = [chats[index] for index in todo]
                responses = self._from_endpoint(asked, told, heats, keys, max_new_tokens, meter)
            else:
                responses = self._from_target(asked, heats, keys, max_new_tokens, top_p, meter)
            for place, response in responses:
                done[todo[place]] = response
                self.parts.add(stage, todo[place], response)
                meter.finished(len(response.ids))
        return done

    def _from_target(
        self, asked: list[list[int]], heats: list[float], keys: list[str], longest: int, top_p: float, meter: _Meter
    ) -> Iterator[tuple[int, Response]]:
        for place, ids in generate_responses(
            self.target,
            asked,
            max_new_tokens=longest,
            temperature=heats,
            top_p=top_p,
            batch_size=self.batch_size,
            seed=self.settings.seed,
            max_length=self.settings.max_length,
            keys=keys,
            progress=meter.wrote,
        ):
            yield place, Response(ids)

    def _from_endpoint(
        self,
        asked: list[list[int]],
        chats: list[Chat],
        heats: list[float],
        keys: list[str],
        longest: int,
        meter: _Meter,
    ) -> Iterator[tuple[int, Response]]:
        assert self.endpoint is not None
        questions = [
            Question(
                where=chat.where,
                key=key,
                prompt=ids,
                messages=chat.messages,
                limit=min(longest, self.settings.max_length - len(ids)),
                temperature=heat,
                later=chat.later,
            )
            for ids, chat, heat, key in zip(asked, chats, heats, keys, strict=True)
        ]
        for place, response in self.endpoint.answer(questions):
            if response is not None:
                meter.wrote(len(response.ids))
                yield place, response


def self_prompts(writer: Writer) -> list[Prompt]:
    """Let the target write user turns of its own until there are enough different ones."""
    before, after = user_turn(writer.target)
    wanted = writer.settings.num_prompts or SELF_PROMPTS
    texts: dict[str, str] = {}  # by a form in which near-copies coincide
    for number in range(_SELF_PROMPT_ROUNDS):
        candidates = dict.fromkeys(range((wanted - len(texts)) * 3 // 2 + 8), before)
        written = writer.write(
            f"prompts-{number}",
            candidates,
            dict.fromkeys(candidates, 1.0),
            "prompts",
            _SELF_PROMPT_TOKENS,
            _SELF_PROMPT_TOP_P,
        )
        for index in sorted(written):
            text = written_prompt(writer.target, written[index].ids, after)
            key = " ".join(text.lower().split()) if text else ""
            if text is None or key in texts:
                writer.counts["self_prompts_refused"] += 1
            elif len(texts) < wanted:
                texts[key] = text
        if len(texts) == wanted:
            break
    if not texts:
        raise UserError(
            f"target {writer.target.name!r} wrote no usable prompts of its own; give some with --prompts FILE."
        )
    if len(texts) < wanted:
        log.warning("the target wrote %d different usable prompts of %d wanted", len(texts), wanted)
    return [self_prompt(text) for text in texts.values()]


def self_prompt(text: str) -> Prompt:
    return Prompt(SELF_PROMPTED, messages=[{"role": "user", "content": text}])


def answered(writer: Writer, prompts: list[Prompt]) -> list[Row]:
    """Every user turn answered by the target, one turn of all conversations after the other."""
    target, settings = writer.target, writer.settings
    rows: dict[int, Row] = {}
    for index, prompt in enumerate(prompts):
        try:
            ids = first_prompt(target, prompt.messages)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from error
        rows[index] = Row(conversation_id(ids), ids, [False] * len(ids), len(ids), 0.0, 1.0, prompt.source)
    by_hash = sorted(rows, key=lambda index: hashed(settings.seed, "mix", rows[index].id, index))
    for index in by_hash[round(settings.greedy_share * len(rows)) :]:
        rows[index] = replace(rows[index], temperature=1.0)
    if writer.shard is not None:
        rows = {index: row for index, row in rows.items() if writer.shard.holds(index)}
    turns = {index: sum(message["role"] == "user" for message in prompts[index].messages) for index in rows}
    said_before: dict[int, list[str]] = {index: [] for index in rows}
    for turn in range(max(turns.values(), default=0)):
        asked = {index: rows[index].ids for index in rows if turns[index] > turn}
        if turn:
            asked = {index: next_prompt(target, ids, prompts[index].messages, turn) for index, ids in asked.items()}
        rows = _without_long(writer, rows, {index for index, ids in asked.items() if len(ids) >= settings.max_length})
        asked = {index: ids for index, ids in asked.items() if index in rows}
        heats = {index: float(rows[index].temperature or 0) for index in asked}
        chats = {index: _chat(prompts[index], turn, said_before[index]) for index in asked}
        said = writer.write(f"responses-{turn}", asked, heats, "responses", settings.max_new_tokens, chats=chats)
        _end_refused(writer, turns, asked.keys() - said.keys(), said, turn)
        cut = {index for index, response in said.items() if _is_cut(target, settings, asked[index], response.ids)}
        for index, response in said.items():
            said_before[index].append(target.decode(response.ids))
            silent = [False] * (len(asked[index]) - len(rows[index].mask))
            rows[index] = replace(
                rows[index],
                ids=asked[index] + response.ids,
                mask=rows[index].mask + silent + [True] * len(response.ids),
                retokenised=rows[index].retokenised or response.retokenised,
            )
        rows = _without_long(writer, rows, cut)
    return list(rows.values())


def _chat(prompt: Prompt, turn: int, said: list[str]) -> Chat:
    """The conversation up to user turn `turn`, with what was said in answer to those before."""
    answers = iter(said)
    messages = [
        {**message, "content": next(answers)} if message["role"] == "assistant" else message
        for message in up_to_user_turn(prompt.messages, turn)
    ]
    return Chat(prompt.where or "a prompt of the target's own", messages, later=turn > 0)


def _end_refused(
    writer: Writer, turns: dict[int, int], refused: set[int], said: dict[int, Response], turn: int
) -> None:
    """Let conversations end before a turn that the endpoint refused: what was said in them until then is whole.

    Raises:
        UserError: it refuses all of them, so that the fault is not in what they say.
    """
    if not refused:
        return
    turns |= dict.fromkeys(refused, turn)
    writer.counts["cut_short"] += len(refused)
    if not said and len(refused) >= _TOO_MANY:
        raise UserError(
            f"the endpoint refuses turn {turn + 1} of all {len(refused)} conversations that have one; see the warnings "
            "above, and give another --endpoint, or prompts of fewer turns."
        )
    log.warning("the endpoint refused turn %d of %d conversations", turn + 1, len(refused))


def _is_cut(target: Target, settings: Settings, prompt: list[int], response: list[int]) -> bool:
    """Whether only the maximal length of a conversation ended the response."""
    ended = not response or response[-1] in target.eos_token_ids or len(response) == settings.max_new_tokens
    return not ended and len(prompt) + len(response) >= settings.max_length


def _without_long(writer: Writer, rows: dict[int, Row], long: set[int]) -> dict[int, Row]:
    writer.counts["too_long"] += len(long)
    return {index: row for index, row in rows.items() if index not in long}


@contextmanager
def _flushed(parts: Parts, stage: str) -> Iterator[None]:
    """Store what is there when the block ends, also where Ctrl-C or an error ends it."""
    try:
        yield
    finally:
        parts.flush(stage)


class _Meter:
    """A progress bar with tokens per second and the time left, judged by the mean length of the finished responses."""

    def __init__(self, what: str, rows: int, longest: int, show: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
        )
        self._progress = Progress(*columns, disable=not show)
        self._task = self._progress.add_task(what, total=rows, pace="")
        self._rows, self._longest = rows, longest
        self._tokens = self._done = self._done_tokens = 0
        self._start = time.monotonic()

    def __enter__(self) -> _Meter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def wrote(self, tokens: int) -> None:
        self._tokens += tokens
        rate = self._tokens / max(1e-6, time.monotonic() - self._start)
        mean = self._done_tokens / self._done if self._done else self._longest
        left = int(max(0.0, mean * self._rows - self._tokens) / rate)
        self._progress.update(self._task, pace=f"{rate:.0f} tokens/s, {left // 60}:{left % 60:02d} left")

    def finished(self, tokens: int) -> None:
        self._done += 1
        self._done_tokens += tokens
        self._progress.advance(self._task)
