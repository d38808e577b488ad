"""`draft-train prepare`: from conversations to a data set of the target's responses to them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from draft.data.dataset import (
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
    split_counts,
    write_dataset,
)
from draft.data.examples import first_prompt, next_prompt, up_to_user_turn
from draft.data.generate import Endpoint, EndpointError, Question, started
from draft.data.prompts import SELF_PROMPTED, Prompt, kept_row, load_prompts, self_prompts
from draft.data.settings import EndpointSettings, LocalServer, Settings
from draft.errors import UserError, plain_console
from draft.files import read_json, write_json
from draft.launcher import ServerEnded
from draft.target import Target
from draft.target.hidden_states import check_hidden_states

log = logging.getLogger(__name__)

_SELF_PROMPTS = 500  # when the user does not say how many
_TOO_MANY = 8  # conversations refused by an endpoint, and none answered


def prepare(
    target: Target,
    out: str | Path,
    *,
    prompts: Sequence[str | Path] | None = None,
    column: str | None = None,
    shard: Shard | None = None,
    server: EndpointSettings | LocalServer = LocalServer(),  # noqa: B008
    progress: bool = True,
    **settings: Any,
) -> Dataset | None:
    """Write a data set into the folder `out`, or go on with the one that the same arguments began there.

    Args:
        prompts: files or hub data sets; None lets the target write its own prompts.
        column: of the prompts or conversations in the files; None finds it by name.
        shard: answer only this part of the conversations; the last of the shards' processes to be done puts the parts
            together, and the result is that of one process.
        server: the server of the target that writes the responses: one that runs, or one that is started for it.
        settings: fields of `Settings`; max_length is never above the target's own.

    Returns:
        the data set, or None where other shards are not done.

    Raises:
        UserError: for arguments out of range, unreadable or empty data, another data set in `out`, or nothing left.
    """
    chosen = Settings.checked(settings)
    if chosen.keep_responses:
        _check_kept(chosen, bool(prompts), shard is not None or isinstance(server, EndpointSettings))
    chosen = chosen.model_copy(
        update={
            "num_prompts": chosen.num_prompts or (None if prompts else _SELF_PROMPTS),
            "max_length": min(chosen.max_length, target.max_length),
        }
    )
    given = _given_prompts([str(source) for source in prompts], column, chosen) if prompts else None
    folder = Path(out)
    messages = [
        (prompt.messages, prompt.text, prompt.row and (prompt.row.ids, prompt.row.mask)) for prompt in given or ()
    ]
    answered_by = None
    if isinstance(server, EndpointSettings):  # an address may change between two calls; the model that answers may not
        answered_by = server.endpoint_model or "the endpoint's model"
    arguments = {  # that a repeated call must agree on, conversations included: a file may have changed since
        "target_fingerprint": target.fingerprint,
        "prompts": [Path(source).name for source in prompts or ()],
        "prompts_hash": hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16] if given else None,
        **chosen.model_dump(),
        "answered_by": answered_by,
        "shards": shard and shard.count,
    }
    plan = Plan(folder, arguments)
    if not plan.finished:
        check_hidden_states(target)  # which the heads trained on this data will read
    plan.begin()
    if plan.finished:
        if progress:
            plain_console().print(f"{folder} is complete: nothing to do.")
        return open_dataset(folder)
    busy = f"{str(folder)!r} is being written by another process with {f'--shard {shard}' if shard else 'this --out'}"
    with ExitStack() as closing, _locked(folder, shard.name if shard else "whole", f"{busy}; let it finish."):
        writer = Writer(target, chosen, plan, given, server, progress, closing)
        return writer.all() if shard is None else writer.part(shard)


def _check_kept(settings: Settings, given: bool, shared: bool) -> None:
    """Refuse what is about writing responses."""
    if not given:
        raise UserError("--keep-responses keeps the responses of files, and there are none; give --prompts FILE.")
    if shared:
        raise UserError("--shard and --endpoint are about writing responses, and --keep-responses writes none.")
    for name in ("max_new_tokens", "greedy_share"):
        value = getattr(settings, name)
        if value != Settings.model_fields[name].default:
            raise UserError(
                f"--{name.replace('_', '-')} {value} is about writing responses, and --keep-responses writes none; "
                "leave one of them out."
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
            server = self.closing.enter_context(started(server, self.target, self.settings.max_length))
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

    def _rows(self) -> list[Row]:
        """The rows of all conversations that are not too long; splits are not assigned yet."""
        prompts, longest = self._prompts(), self.settings.max_length
        if self.settings.keep_responses:
            rows = [kept_row(self.target, prompt) for prompt in prompts]
        else:
            rows = self._answered(prompts)
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

    def _prompts(self) -> list[Prompt]:
        """The given prompts or the target's own, without duplicates."""
        if self.given is not None:
            prompts = self.given
        else:
            path = self.parts.folder / "prompts.json"
            with _locked(self.plan.folder, "prompts"):  # of several shards the first writes them, the others read them
                if not path.is_file():
                    wanted = self.settings.num_prompts or _SELF_PROMPTS
                    texts, refused = self_prompts(self.target, wanted, self.settings.max_length, self._write)
                    write_json(path, {"refused": refused, "prompts": texts})
            stored = read_json(path)
            self.counts["self_prompts_refused"] = int(stored["refused"])
            messages = ([{"role": "user", "content": text}] for text in stored["prompts"])
            prompts = [Prompt(SELF_PROMPTED, messages=each) for each in messages]
        different = {
            json.dumps((prompt.messages, prompt.text, prompt.row and prompt.row.ids)): prompt
            for prompt in reversed(prompts)
        }
        self.counts["conversations"] = len(prompts)
        self.counts["duplicates"] = len(prompts) - len(different)
        return list(reversed(different.values()))

    def _answered(self, prompts: list[Prompt]) -> list[Row]:
        """Let the target answer every user turn, one turn of all conversations after the other."""
        longest = self.settings.max_length
        rows = self._unanswered(prompts)
        turns = {index: sum(message["role"] == "user" for message in prompts[index].messages) for index in rows}
        answers: dict[int, list[str]] = {index: [] for index in rows}
        for turn in range(max(turns.values(), default=0)):
            contexts = {index: rows[index].ids for index in rows if turns[index] > turn}
            if turn:
                contexts = {
                    index: next_prompt(self.target, ids, prompts[index].messages, turn)
                    for index, ids in contexts.items()
                }
            rows = self._without_long(rows, {index for index, ids in contexts.items() if len(ids) >= longest})
            questions = {
                index: Question(
                    where=prompts[index].where or "a prompt of the target's own",
                    key=f"responses-{turn}:{index}",
                    prompt=ids,
                    messages=up_to_user_turn(prompts[index].messages, turn, answers[index]),
                    limit=min(self.settings.max_new_tokens, longest - len(ids)),
                    temperature=float(rows[index].temperature or 0),
                    later=turn > 0,
                )
                for index, ids in contexts.items()
                if index in rows
            }
            responses = self._write(f"responses-{turn}", questions)
            refused = questions.keys() - responses.keys()
            if refused:
                if not responses and len(refused) >= _TOO_MANY:  # so that the fault is not in their contents
                    raise UserError(
                        f"the endpoint refuses turn {turn + 1} of all {len(refused)} conversations that have one; see "
                        "the warnings above, and give another --endpoint, or prompts of fewer turns."
                    )
                log.warning("the endpoint refused turn %d of %d conversations", turn + 1, len(refused))
                self.counts["cut_short"] += len(refused)
                turns |= dict.fromkeys(refused, turn)  # those conversations end before it: they are whole until then
            cut = set()  # those whose response only the longest length of a conversation ended
            for index, response in responses.items():
                answers[index].append(self.target.decode(response.ids))
                rows[index] = rows[index].continued(contexts[index], response)
                ended = not response.ids or response.ids[-1] in self.target.eos_token_ids
                if not ended and len(response.ids) < self.settings.max_new_tokens and len(rows[index].ids) >= longest:
                    cut.add(index)
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

    def _without_long(self, rows: dict[int, Row], long: set[int]) -> dict[int, Row]:
        self.counts["too_long"] += len(long)
        return {index: row for index, row in rows.items() if index not in long}

    def _write(self, stage: str, questions: dict[int, Question]) -> dict[int, Response]:
        """The target's response to each question, by index; what an interrupted run stored is not written again.

        Later turns that the server refuses are missing from the answer.
        """
        done = {index: response for index, response in self.parts.load(stage).items() if index in questions}
        todo = [index for index in questions if index not in done]
        if not todo:
            return done
        answers = self.endpoint.answer([questions[index] for index in todo])
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Pace()
        tokens = 0
        try:
            with Progress(*columns, disable=not self.show) as bar:
                task = bar.add_task(f"writing {stage.split('-')[0]}", total=len(todo), tokens=0)
                for place, response in answers:
                    if response is not None:
                        done[todo[place]] = response
                        self.parts.add(stage, todo[place], response)
                        tokens += len(response.ids)
                        bar.update(task, advance=1, tokens=tokens)
        finally:  # also where Ctrl-C or an error ends it
            self.parts.flush(stage)
        return done

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


class _Pace(ProgressColumn):
    """Tokens per second, and the time left, judged by the finished responses."""

    def render(self, task: Task) -> Text:
        if not task.completed or not task.total:
            return Text()
        seconds = task.elapsed or 0.0
        left = int(seconds * (task.total - task.completed) / task.completed)
        return Text(f"{task.fields['tokens'] / max(seconds, 1e-6):.0f} tokens/s, {left // 60}:{left % 60:02d} left")
