"""`draft-train prepare`: from conversations to a data set of the target's responses to them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from draft.data.dataset import (
    SPLITS,
    Dataset,
    Parts,
    Plan,
    Response,
    Row,
    Shard,
    assign_splits,
    conversation_id,
    hashed,
    missing_shards,
    open_dataset,
    write_dataset,
)
from draft.data.examples import Message, encode_kept, first_prompt, next_prompt, tokenise, up_to_user_turn
from draft.data.generate import Endpoint, EndpointError, EndpointSettings, LocalServer, Question
from draft.data.prompts import SELF_PROMPTED, Prompt, load_prompts, user_turn, written_prompt
from draft.errors import UserError, plain_console
from draft.files import read_json, write_json
from draft.launcher import ServerEnded
from draft.target import Target

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
GREEDY_SHARE = 0.5
_SELF_PROMPTS = 500  # when the user does not say how many
_SELF_PROMPT_TOKENS = 80
_SELF_PROMPT_TOP_P = 0.95  # the tail of a prompt's distribution is noise; responses are never cut
_SELF_PROMPT_ROUNDS = 10
_TOO_MANY = 8  # conversations refused by an endpoint, and none answered


@dataclass
class Settings:
    """The arguments that decide the contents of the data set."""

    num_prompts: int | None
    keep_responses: bool
    max_new_tokens: int
    max_length: int
    greedy_share: float
    held_out_share: float
    seed: int


def prepare(
    target: Target,
    out: str | Path,
    *,
    prompts: Sequence[str | Path] | None = None,
    num_prompts: int | None = None,
    column: str | None = None,
    keep_responses: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_length: int = 1024,
    greedy_share: float = GREEDY_SHARE,
    held_out_share: float = 0.1,
    seed: int = 0,
    shard: Shard | None = None,
    server: EndpointSettings | LocalServer = LocalServer(),  # noqa: B008
    progress: bool = True,
) -> Dataset | None:
    """Write a data set into the folder `out`, or go on with the one that the same arguments began there.

    Args:
        prompts: files or hub data sets; None lets the target write its own prompts.
        num_prompts: number of prompts to write (default 500), or to take of the given ones (default all; fewer are a
            random sample).
        keep_responses: use the responses in the files instead of the target's.
        max_new_tokens: longest response; one that reaches it stays, without an end of turn.
        max_length: longest conversation in tokens; longer ones are dropped and counted. Never above the target's own.
        greedy_share: share of the conversations that the target answers greedily; the others it answers at
            temperature 1, untruncated.
        held_out_share: share of the prompts kept from training.
        shard: answer only this part of the conversations; the last of the shards' processes to be done puts the parts
            together, and the result is that of one process.
        server: the server of the target that writes the responses: one that runs, or one that is started for it.

    Returns:
        the data set, or None where other shards are not done.

    Raises:
        UserError: for arguments out of range, unreadable or empty data, another data set in `out`, or nothing left.
    """
    settings = Settings(
        num_prompts or (None if prompts else _SELF_PROMPTS),
        keep_responses,
        max_new_tokens,
        min(max_length, target.max_length),
        greedy_share,
        held_out_share,
        seed,
    )
    endpoint = server if isinstance(server, EndpointSettings) else None
    _check(settings, num_prompts, bool(prompts), shard is not None or endpoint is not None)
    given = _given_prompts([str(source) for source in prompts], column, settings) if prompts else None
    folder = Path(out)
    messages = [
        (prompt.messages, prompt.text, prompt.row and (prompt.row.ids, prompt.row.mask)) for prompt in given or ()
    ]
    arguments = {  # that a repeated call must agree on, conversations included: a file may have changed since
        "target_fingerprint": target.fingerprint,
        "prompts": [Path(source).name for source in prompts or ()],
        "prompts_hash": hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16] if given else None,
        **vars(settings),
        # an address may change between two calls; the model that answers may not
        "answered_by": None if endpoint is None else endpoint.model or "the endpoint's model",
        "shards": shard and shard.count,
    }
    plan = Plan(folder, arguments)
    plan.begin()
    if plan.finished:
        if progress:
            plain_console().print(f"{folder} is complete: nothing to do.")
        return open_dataset(folder)
    busy = f"{str(folder)!r} is being written by another process with {f'--shard {shard}' if shard else 'this --out'}"
    with ExitStack() as closing, _locked(folder, shard.name if shard else "whole", f"{busy}; let it finish."):
        writer = Writer(target, settings, plan, given, server, progress, closing)
        return writer.all() if shard is None else writer.part(shard)


def _check(settings: Settings, num_prompts: int | None, given: bool, shared: bool) -> None:
    for name, share in (("greedy-share", settings.greedy_share), ("held-out-share", settings.held_out_share)):
        if not 0 <= share <= 1:
            raise UserError(f"--{name} is {share}; give a number from 0 to 1.")
    for name, number in (
        ("max-new-tokens", settings.max_new_tokens),
        ("max-length", settings.max_length),
        ("num-prompts", num_prompts),
    ):
        if number is not None and number < 1:
            raise UserError(f"--{name} is {number}; give a whole number of at least 1.")
    if not settings.keep_responses:
        return
    if not given:
        raise UserError("--keep-responses keeps the responses of files, and there are none; give --prompts FILE.")
    if shared:
        raise UserError("--shard and --endpoint are about writing responses, and --keep-responses writes none.")
    for name, value, default in (
        ("max-new-tokens", settings.max_new_tokens, MAX_NEW_TOKENS),
        ("greedy-share", settings.greedy_share, GREEDY_SHARE),
    ):
        if value != default:
            raise UserError(
                f"--{name} {value} is about writing responses, and --keep-responses writes none; leave one of them out."
            )


def _given_prompts(sources: list[str], column: str | None, settings: Settings) -> list[Prompt]:
    keep = settings.keep_responses
    prompts = [prompt for source in sources for prompt in load_prompts(source, column=column, keep_responses=keep)]
    if settings.num_prompts is None or settings.num_prompts >= len(prompts):
        return prompts
    chosen = random.Random(hashed(settings.seed, "sample")).sample(range(len(prompts)), settings.num_prompts)
    return [prompts[index] for index in sorted(chosen)]


def parse_shard(text: str | None) -> Shard | None:
    """`0/4` is the first of four. Without it, the place that `accelerate launch` or `torchrun` gave this process.

    Raises:
        UserError: for what is not of this form, or out of range.
    """
    if text is None:
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(world) > 1):
            return None
        log.warning(
            "RANK=%s and WORLD_SIZE=%s are set, as a launcher of %s processes does: this process answers shard %s/%s "
            "of the conversations only; for all of them give --shard 0/1, or unset both variables.",
            *(rank, world, world, rank, world),
        )
        return Shard(int(rank), int(world))
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text!r} is not of the form 0/4, with the first number from 0 to below the second.")
    return Shard(int(index), int(count)) if int(count) > 1 else None


@contextmanager
def _locked(folder: Path, name: str, busy: str | None = None) -> Iterator[None]:
    """Hold parts/NAME.lock; where another process has it, refuse with the message `busy`, or wait without one."""
    path = folder / "parts" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=-1 if busy is None else 0):
            yield
    except Timeout as error:
        raise UserError(busy or str(error)) from error


@dataclass
class Writer:
    """A data set that is being written: an interrupted run goes on where it stopped."""

    target: Target
    settings: Settings
    plan: Plan
    given: list[Prompt] | None  # None: the target writes prompts
    server: EndpointSettings | LocalServer
    show: bool  # a progress bar
    closing: ExitStack
    shard: Shard | None = None  # whose conversations are answered; None: all
    counts: Counter[str] = field(default_factory=Counter)

    @cached_property
    def parts(self) -> Parts:
        return Parts(self.plan.folder / "parts", self.shard.name if self.shard else "")

    @cached_property
    def endpoint(self) -> Endpoint:
        """The server, which is connected to, or started, when the first response is requested."""
        server = self.server
        if isinstance(server, LocalServer):
            server = self.closing.enter_context(server.started(self.target, self.settings.max_length))
        return self.closing.enter_context(Endpoint(server, self.target, self.settings.seed))

    def all(self) -> Dataset:
        """Write what is missing, and put everything together."""
        try:
            rows = assign_splits(self._rows(), self.settings.held_out_share, self.settings.seed)
        except UserError as error:
            if not (isinstance(error, (EndpointError, ServerEnded)) and self.parts.begun):
                self.plan.abandon()
            raise
        self.target.tokenizer.save_pretrained(self.plan.folder / "tokenizer")
        dataset = write_dataset(self.plan.folder, rows, self._manifest(rows))
        shutil.rmtree(self.parts.folder, ignore_errors=True)
        return dataset

    def part(self, shard: Shard) -> Dataset | None:
        """Answer the conversations of one shard; whoever finds all shards done puts them together."""
        folder = self.plan.folder
        whole = replace(self, counts=Counter())
        self.shard = shard
        self._answered(self._prompts())
        (folder / "parts" / f"{shard.name}.done").touch()
        with _locked(folder, "finish"):
            if self.plan.finished:
                return open_dataset(folder)
            return None if missing_shards(folder, shard.count) else whole.all()

    def _prompts(self) -> list[Prompt]:
        """The given prompts or the target's own, without duplicates."""
        if self.given is not None:
            prompts = self.given
        else:
            with _locked(self.plan.folder, "prompts"):  # of several shards the first writes them, the others read them
                prompts = self._own_prompts()
        different = {
            json.dumps((prompt.messages, prompt.text, prompt.row and prompt.row.ids)): prompt
            for prompt in reversed(prompts)
        }
        self.counts["conversations"] = len(prompts)
        self.counts["duplicates"] = len(prompts) - len(different)
        return list(reversed(different.values()))

    def _own_prompts(self) -> list[Prompt]:
        path = self.parts.folder / "prompts.json"
        if not path.is_file():
            texts = self._self_prompts()
            write_json(path, {"refused": self.counts["self_prompts_refused"], "prompts": texts})
        stored = read_json(path)
        self.counts["self_prompts_refused"] = int(stored["refused"])
        return [Prompt(SELF_PROMPTED, messages=[{"role": "user", "content": text}]) for text in stored["prompts"]]

    def _self_prompts(self) -> list[str]:
        """Let the target write user turns of its own until there are enough different ones."""
        before, after = user_turn(self.target)
        wanted = self.settings.num_prompts or _SELF_PROMPTS
        limit = min(_SELF_PROMPT_TOKENS, self.settings.max_length - len(before))
        if limit < 1:
            raise UserError(
                f"--max-length {self.settings.max_length} leaves no room for prompts of the target's own, which begin "
                f"with {len(before)} tokens; raise it."
            )
        texts: dict[str, str] = {}  # by a form in which near-copies coincide
        for number in range(_SELF_PROMPT_ROUNDS):
            stage = f"prompts-{number}"
            questions = {
                index: Question(
                    "a prompt of the target's own", f"{stage}:{index}", before, [], limit, 1.0, _SELF_PROMPT_TOP_P
                )
                for index in range((wanted - len(texts)) * 3 // 2 + 8)
            }
            written = self._write(stage, questions, "prompts")
            for index in sorted(written):
                text = written_prompt(self.target, written[index].ids, after)
                key = " ".join(text.lower().split()) if text else ""
                if text is None or key in texts:
                    self.counts["self_prompts_refused"] += 1
                elif len(texts) < wanted:
                    texts[key] = text
            if len(texts) == wanted:
                break
        if not texts:
            raise UserError(
                f"target {self.target.name!r} wrote no usable prompts of its own; give some with --prompts FILE."
            )
        if len(texts) < wanted:
            log.warning("the target wrote %d different usable prompts of %d wanted", len(texts), wanted)
        return list(texts.values())

    def _write(self, stage: str, questions: dict[int, Question], what: str) -> dict[int, Response]:
        """The target's response to each question, by index; what an interrupted run stored is not written again.

        Later turns that the server refuses are missing from the answer.
        """
        done = {index: response for index, response in self.parts.load(stage).items() if index in questions}
        todo = [index for index in questions if index not in done]
        if not todo:
            return done
        answers = self.endpoint.answer([questions[index] for index in todo])
        try:
            with _Meter(f"writing {what}", len(todo), self.show) as meter:
                for place, response in answers:
                    if response is not None:
                        done[todo[place]] = response
                        self.parts.add(stage, todo[place], response)
                        meter.add_response(len(response.ids))
        finally:  # also where Ctrl-C or an error ends it
            self.parts.flush(stage)
        return done

    def _answered(self, prompts: list[Prompt]) -> list[Row]:
        """Let the target answer every user turn, one turn of all conversations after the other."""
        target, settings = self.target, self.settings
        rows = self._unanswered(prompts)
        turns = {index: sum(message["role"] == "user" for message in prompts[index].messages) for index in rows}
        answers: dict[int, list[str]] = {index: [] for index in rows}
        for turn in range(max(turns.values(), default=0)):
            stage = f"responses-{turn}"
            asked = {index: rows[index].ids for index in rows if turns[index] > turn}
            if turn:
                asked = {index: next_prompt(target, ids, prompts[index].messages, turn) for index, ids in asked.items()}
            rows = self._without_long(rows, {index for index, ids in asked.items() if len(ids) >= settings.max_length})
            questions = {
                index: Question(
                    where=prompts[index].where or "a prompt of the target's own",
                    key=f"{stage}:{index}",
                    prompt=ids,
                    messages=_conversation(prompts[index], turn, answers[index]),
                    limit=min(settings.max_new_tokens, settings.max_length - len(ids)),
                    temperature=float(rows[index].temperature or 0),
                    later=turn > 0,
                )
                for index, ids in asked.items()
                if index in rows
            }
            responses = self._write(stage, questions, "responses")
            refused = questions.keys() - responses.keys()
            self._count_refused(refused, bool(responses), turn)
            turns |= dict.fromkeys(refused, turn)  # those conversations end before it: they are whole until then
            cut = {index for index, response in responses.items() if self._is_cut(asked[index], response.ids)}
            for index, response in responses.items():
                answers[index].append(target.decode(response.ids))
                silent = [False] * (len(asked[index]) - len(rows[index].mask))
                rows[index] = replace(
                    rows[index],
                    ids=asked[index] + response.ids,
                    mask=rows[index].mask + silent + [True] * len(response.ids),
                    retokenised=rows[index].retokenised or response.retokenised,
                )
            rows = self._without_long(rows, cut)
        return list(rows.values())

    def _unanswered(self, prompts: list[Prompt]) -> dict[int, Row]:
        """Rows that end with the first user turn, with the temperature of the answers; of this shard only."""
        rows: dict[int, Row] = {}
        for index, prompt in enumerate(prompts):
            try:
                ids = first_prompt(self.target, prompt.messages)
            except UserError as error:
                raise UserError(f"{prompt.where}: {error}") from error
            rows[index] = Row(conversation_id(ids), ids, [False] * len(ids), len(ids), 0.0, 1.0, prompt.source)
        by_hash = sorted(rows, key=lambda index: hashed(self.settings.seed, "mix", rows[index].id, index))
        for index in by_hash[round(self.settings.greedy_share * len(rows)) :]:
            rows[index] = replace(rows[index], temperature=1.0)
        return {index: row for index, row in rows.items() if self.shard is None or self.shard.holds(index)}

    def _count_refused(self, refused: set[int], some_answered: bool, turn: int) -> None:
        """
        Raises:
            UserError: the endpoint refuses all conversations, so that the fault is not in their contents.
        """
        if not refused:
            return
        self.counts["cut_short"] += len(refused)
        if not some_answered and len(refused) >= _TOO_MANY:
            raise UserError(
                f"the endpoint refuses turn {turn + 1} of all {len(refused)} conversations that have one; see the "
                "warnings above, and give another --endpoint, or prompts of fewer turns."
            )
        log.warning("the endpoint refused turn %d of %d conversations", turn + 1, len(refused))

    def _is_cut(self, prompt: list[int], response: list[int]) -> bool:
        """True where only the maximal length of a conversation ended the response."""
        ended = not response or response[-1] in self.target.eos_token_ids
        ended = ended or len(response) == self.settings.max_new_tokens
        return not ended and len(prompt) + len(response) >= self.settings.max_length

    def _without_long(self, rows: dict[int, Row], long: set[int]) -> dict[int, Row]:
        self.counts["too_long"] += len(long)
        return {index: row for index, row in rows.items() if index not in long}

    def _rows(self) -> list[Row]:
        """The rows of all conversations that are not too long; splits are not assigned yet."""
        prompts = self._prompts()
        keep, longest = self.settings.keep_responses, self.settings.max_length
        rows = [_kept(self.target, prompt) for prompt in prompts] if keep else self._answered(prompts)
        self.counts["without_response"] = sum(not any(row.mask) for row in rows)
        rows = [row for row in rows if any(row.mask)]
        self.counts["too_long"] += sum(len(row.ids) > longest for row in rows)
        rows = [row for row in rows if len(row.ids) <= longest]
        if not rows:
            counts = ", ".join(f"{name} {count}" for name, count in self.counts.items())
            raise UserError(
                f"no conversation is left ({counts}); raise --max-length, now {longest}, or give other prompts."
            )
        return rows

    def _manifest(self, rows: list[Row]) -> dict[str, Any]:
        target, settings = self.target, self.settings
        mix = {"greedy": settings.greedy_share, "temperature 1": 1 - settings.greedy_share}
        return {
            "target": target.name,
            "target_adapter": target.adapter.name if target.adapter else None,
            "target_fingerprint": target.fingerprint,
            "template_hash": target.template_hash,
            "vocab_size": target.vocab_size,
            "eos_token_ids": sorted(target.eos_token_ids),
            "sources": self.plan.arguments["prompts"] or [SELF_PROMPTED],
            "seed": settings.seed,
            "mix": None if settings.keep_responses else mix,
            "keep_responses": settings.keep_responses,
            "answered_by": self.plan.arguments["answered_by"],
            "max_new_tokens": settings.max_new_tokens,
            "max_length": settings.max_length,
            "held_out_share": settings.held_out_share,
            "counts": {**self.counts, **split_counts(rows)},
        }


def _conversation(prompt: Prompt, turn: int, answers: list[str]) -> list[Message]:
    """The conversation up to user turn `turn`, with the answers to those before."""
    given = iter(answers)
    return [
        {**message, "content": next(given)} if message["role"] == "assistant" else message
        for message in up_to_user_turn(prompt.messages, turn)
    ]


def _kept(target: Target, prompt: Prompt) -> Row:
    """A conversation as the file has it."""
    if prompt.row is not None:
        if max(prompt.row.ids) >= target.vocab_size:
            raise UserError(
                f"{prompt.where}: token {max(prompt.row.ids)} is beyond the target's vocabulary of "
                f"{target.vocab_size}; use the target that these tokens belong to."
            )
        return prompt.row
    if prompt.text:
        # the target's distribution teaches after every token, but has nothing to say on the first
        ids = tokenise(target, prompt.text)
        mask = [False] * min(1, len(ids)) + [True] * (len(ids) - 1)
    else:
        try:
            ids, mask = encode_kept(target, prompt.messages)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from error
    length = mask.index(True) if True in mask else len(ids)
    # ordinary text has no prompt that could tell it from another text
    return Row(conversation_id(ids if prompt.text else ids[:length]), ids, mask, length, None, None, prompt.source)


def split_counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Rows, tokens and so on of each split."""
    counts = {}
    for split in SPLITS:
        chosen = [row for row in rows if row.split == split]
        counts[split] = {
            "rows": len(chosen),
            "prompts": len({row.id for row in chosen}),
            "tokens": sum(len(row.ids) for row in chosen),
            "trained_tokens": sum(row.trained for row in chosen),
            "greedy_rows": sum(row.temperature == 0 for row in chosen),
            "sampled_rows": sum(bool(row.temperature) for row in chosen),
            "kept_rows": sum(row.temperature is None for row in chosen),
            "retokenised_rows": sum(row.retokenised for row in chosen),
        }
    return counts


class _Meter(Progress):
    """A progress bar with tokens per second and the time left, judged by the finished responses."""

    def __init__(self, what: str, rows: int, show: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
        )
        super().__init__(*columns, disable=not show)
        self._task = self.add_task(what, total=rows, pace="")
        self._rows = rows
        self._done = self._tokens = 0
        self._start = time.monotonic()

    def add_response(self, tokens: int) -> None:
        self._done += 1
        self._tokens += tokens
        seconds = time.monotonic() - self._start
        left = int(seconds * (self._rows - self._done) / self._done)
        pace = f"{self._tokens / max(seconds, 1e-6):.0f} tokens/s, {left // 60}:{left % 60:02d} left"
        self.update(self._task, advance=1, pace=pace)
