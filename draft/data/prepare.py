"""`draft-train prepare`: from conversations to a data set of the target's responses to them."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

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
from draft.data.examples import (
    SENTINEL,
    answer_places,
    next_prompt,
    prompt_id,
    prompt_ids,
    up_to_answer,
)
from draft.data.generate import Endpoint, EndpointError, Question, started
from draft.data.prompts import SELF_PROMPTED, Prompt, kept_rows, load_prompts, note_left_out, self_prompts
from draft.data.records import BadRow
from draft.data.settings import EndpointSettings, LocalServer, Settings
from draft.errors import UserError, plain_console
from draft.files import read_json, write_json
from draft.launcher import ServerEnded
from draft.target import Target, TemplateRefusal
from draft.target.hidden_states import check_hidden_states

log = logging.getLogger(__name__)

_SELF_PROMPTS = 500  # when the user does not say how many
_Used = TypeVar("_Used")
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
        _check_kept(chosen, bool(prompts), shard is not None, server)
    chosen = chosen.model_copy(
        update={
            "num_prompts": chosen.num_prompts or (None if prompts else _SELF_PROMPTS),
            "max_length": min(chosen.max_length, target.max_length),
        }
    )
    skipped: Counter[str] = Counter()
    given = _given_prompts([str(source) for source in prompts], column, chosen, skipped) if prompts else None
    if given is None or any(prompt.messages for prompt in given):
        with suppress(TemplateRefusal):  # a row that it refuses will be named
            target.check_template()
    folder = Path(out)
    plan = Plan(folder, _arguments(target, prompts or (), given, chosen, shard, server))
    if not plan.finished:
        check_hidden_states(target)  # which the heads trained on this data will read
    plan.begin()
    if plan.finished:
        if progress:
            plain_console().print(f"{folder} is complete: nothing to do.")
        return open_dataset(folder)
    busy = f"{str(folder)!r} is being written by another process with {f'--shard {shard}' if shard else 'this --out'}"
    with ExitStack() as closing, _locked(folder, shard.name if shard else "whole", f"{busy}; let it finish."):
        if began := plan.arguments["rendering_time"]:  # a run that goes on renders as it began
            closing.callback(setattr, target, "rendering_time", target.rendering_time)
            target.rendering_time = datetime.fromisoformat(began)
        writer = Writer(target, chosen, plan, given, server, progress, closing, skipped)
        return writer.all() if shard is None else writer.part(shard)


def _arguments(
    target: Target,
    prompts: Sequence[str | Path],
    given: list[Prompt] | None,
    settings: Settings,
    shard: Shard | None,
    server: EndpointSettings | LocalServer,
) -> dict[str, Any]:
    """The arguments that a repeated call must agree on, conversations included: a file may have changed since."""
    messages = [_content(prompt, prompt.row and (prompt.row.ids, prompt.row.mask)) for prompt in given or ()]
    answered_by = weights = None
    if isinstance(server, LocalServer):
        weights = (
            server.weights if server.weights in ("int8", "int4") else None
        )  # the responses are the rounded target's
    else:  # an address may change between two calls; the model that answers may not
        answered_by = server.endpoint_model or "the endpoint's model"
    return {
        "target_fingerprint": target.fingerprint,
        "prompts": [Path(source).name for source in prompts],
        "prompts_hash": hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16] if given else None,
        **settings.model_dump(),
        "skip_invalid": settings.skip_invalid or None,
        "answered_by": answered_by,
        "answered_with_weights": weights,
        "shards": shard and shard.count,
        "chat_template": target.template_hash if target.chat_template else None,
        "rendering_time": datetime.now().isoformat(timespec="minutes") if target.reads_clock else None,
    }


def _check_kept(settings: Settings, given: bool, sharded: bool, server: EndpointSettings | LocalServer) -> None:
    """Refuse what is about writing responses."""
    if not given:
        raise UserError("--keep-responses keeps the responses of files, and there are none; give --prompts FILE.")
    if sharded or isinstance(server, EndpointSettings):
        raise UserError("--shard and --endpoint are about writing responses, and --keep-responses writes none.")
    for model, names in ((settings, ("max_new_tokens", "greedy_share")), (server, ("batch_size", "weights", "head"))):
        for name in names:
            value = getattr(model, name)
            if value != type(model).model_fields[name].default:
                raise UserError(
                    f"--{name.replace('_', '-')} {value} is about writing responses, and --keep-responses writes none; "
                    "leave one of them out."
                )


def _given_prompts(sources: list[str], column: str | None, settings: Settings, skipped: Counter[str]) -> list[Prompt]:
    """The conversations in the files, or a random sample of them; skipped: counts rows left out by reason."""
    counter = skipped if settings.skip_invalid else None
    options: dict[str, Any] = {"column": column, "keep_responses": settings.keep_responses, "skipped": counter}
    prompts = [prompt for source in sources for prompt in load_prompts(source, **options)]
    if not prompts:
        raise UserError(f"no row of {', '.join(sources)} can be used ({_counted(skipped)}); mend the data.")
    if settings.num_prompts is None or settings.num_prompts >= len(prompts):
        return prompts
    chosen = random.Random(hashed(settings.seed, "sample")).sample(range(len(prompts)), settings.num_prompts)
    return [prompts[index] for index in sorted(chosen)]


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{what}: {count}" for what, count in Counter(counts).most_common())


def _content(prompt: Prompt, tokens: Any) -> tuple[Any, ...]:
    """Return what tells a prompt from others."""
    return (prompt.messages, prompt.text, tokens, *([prompt.tools] if prompt.tools else []))


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
    skipped: Counter[str] = field(default_factory=Counter)  # rows that cannot be used, by reason
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
        if 0 < self.settings.held_out_share < 1 and len({row.id for row in rows}) == 1:
            log.warning("nothing is held out: all rows begin with the same turn, and so count as one conversation")
        if self.skipped:
            log.warning("rows left out: %d (%s)", self.skipped.total(), _counted(self.skipped))
        dataset = write_dataset(self.plan.folder, rows, self._manifest(rows))
        shutil.rmtree(self.parts.folder, ignore_errors=True)
        return dataset

    def part(self, shard: Shard) -> Dataset | None:
        """Answer the conversations of one shard; whoever finds all shards done puts them together."""
        folder = self.plan.folder
        whole = replace(self, counts=Counter(), skipped=self.skipped.copy())
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
            rows = [
                row for prompt in prompts for row in self._usable(prompt, lambda p: kept_rows(self.target, p)) or ()
            ]
        else:
            rows = self._answered(prompts)
        self.counts["without_response"] = sum(not any(row.mask) for row in rows)
        rows = [row for row in rows if any(row.mask)]
        self.counts["too_long"] += sum(len(row.ids) > longest for row in rows)
        rows = [row for row in rows if len(row.ids) <= longest]
        if self.skipped:
            self.counts["skipped_rows"] = self.skipped.total()
        if not rows:
            counts = _counted({**self.counts, **self.skipped})
            remedy = "give other prompts"
            if self.counts["empty_answers"]:  # cut off while the target was thinking, maybe
                remedy = f"raise --max-new-tokens, now {self.settings.max_new_tokens}, or {remedy}"
            if self.counts["too_long"] or self.counts["empty_answers"]:
                remedy = f"raise --max-length, now {longest}, or {remedy}"
            raise UserError(f"no conversation is left ({counts}); {remedy}.")
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
        note_left_out(self.target, prompts)
        different = {
            json.dumps(_content(prompt, prompt.row and prompt.row.ids)): prompt for prompt in reversed(prompts)
        }
        self.counts["conversations"] = len(prompts)
        self.counts["duplicates"] = len(prompts) - len(different)
        return list(reversed(different.values()))

    def _answered(self, prompts: list[Prompt]) -> list[Row]:
        """Let the target answer every user turn, one turn of all conversations after the other."""
        longest = self.settings.max_length
        rows = self._unanswered(prompts)
        turns = {index: len(answer_places(prompts[index].messages)) for index in rows}
        answers: dict[int, list[str]] = {index: [] for index in rows}
        finished: list[tuple[int, Row]] = []
        for turn in range(max(turns.values(), default=0)):
            asked = {index: rows[index] for index in rows if turns[index] > turn}
            if turn:
                asked = self._asked_next(asked, prompts, turn, turns, answers)
            long = {index for index, row in asked.items() if len(row.ids) >= longest}
            rows = self._without_long(rows, long)
            questions = {
                index: Question(
                    where=prompts[index].where or "a prompt of the target's own",
                    key=f"responses-{turn}:{index}",
                    prompt=row.ids,
                    messages=up_to_answer(prompts[index].messages, turn, answers[index]),
                    limit=min(self.settings.max_new_tokens, longest - len(row.ids)),
                    temperature=float(row.temperature or 0),
                    later=turn > 0,
                    tools=prompts[index].tools,
                )
                for index, row in asked.items()
                if index in rows
            }
            responses = self._write(f"responses-{turn}", questions)
            self._end_before(turn, turns, questions.keys() - responses.keys(), answered=bool(responses))
            cut = set()  # those whose response only the longest length of a conversation ended
            for index, response in responses.items():
                if not response.ids:
                    self.counts["empty_answers"] += 1
                    turns[index] = turn
                    continue
                if not any(asked[index].mask) and turn:  # rendered anew
                    finished.append((index, rows[index]))
                answers[index].append(self.target.decode(response.ids))
                rows[index] = asked[index].continued(asked[index].ids, response)
                ended = response.ids[-1] in self.target.eos_token_ids
                if not ended and len(response.ids) < self.settings.max_new_tokens and len(rows[index].ids) >= longest:
                    cut.add(index)
            rows = self._without_long(rows, cut)
        rows = {index: row for index, row in rows.items() if turns[index]}
        return [row for _, row in sorted([*finished, *rows.items()], key=lambda pair: pair[0])]

    def _asked_next(
        self,
        rows: dict[int, Row],
        prompts: list[Prompt],
        turn: int,
        turns: dict[int, int],
        answers: dict[int, list[str]],
    ) -> dict[int, Row]:
        """The rows up to where the target gives its answer `turn`; without a mask those that are rendered anew."""
        asked = {}
        for index, row in rows.items():
            prompt = prompts[index]
            try:
                ids = next_prompt(self.target, row.ids, prompt.messages, turn, answers[index], prompt.tools)
                if ids is not None:
                    asked[index] = row.continued(ids, Response([]))
                    continue
                ids = prompt_ids(self.target, prompt.messages, turn, answers[index], prompt.tools)
            except BadRow as error:  # because of what the target wrote: the others' turns have been judged before
                log.warning("%s: %s The conversation ends before it.", prompt.where, error)
                turns[index] = turn
                self.counts["cut_short"] += 1
                continue
            mask = [False] * len(ids)
            asked[index] = replace(row, ids=ids, mask=mask, prompt_length=len(ids), retokenised=False)
        return asked

    def _end_before(self, turn: int, turns: dict[int, int], refused: set[int], *, answered: bool) -> None:
        """End the conversations whose turn the server refuses before it, in `turns`: they are whole until then."""
        if not refused:
            return
        if not answered and len(refused) >= _TOO_MANY:  # so that the fault is not in their contents
            raise EndpointError(
                f"the endpoint refuses turn {turn + 1} of all {len(refused)} conversations that have one; see "
                "the warnings above, and give another --endpoint, or prompts of fewer turns."
            )
        log.warning("the endpoint refused turn %d of %d conversations", turn + 1, len(refused))
        self.counts["cut_short"] += len(refused)
        turns |= dict.fromkeys(refused, turn)

    def _unanswered(self, prompts: list[Prompt]) -> dict[int, Row]:
        """Rows that end with the first user turn, with the temperature of the answers; of this shard only."""
        rows: dict[int, Row] = {}

        def first_prompt(prompt: Prompt) -> list[int]:  # once all turns are known to be such that the target reads them
            last = len(answer_places(prompt.messages)) - 1
            if last > 0:
                prompt_ids(self.target, prompt.messages, last, repeat(SENTINEL), prompt.tools)
            return prompt_ids(self.target, prompt.messages, tools=prompt.tools)

        for index, prompt in enumerate(prompts):
            ids = self._usable(prompt, first_prompt)
            if ids is None:
                continue
            id = conversation_id(ids)
            if self.target.reads_clock:
                id = prompt_id(self.target, prompt.messages, prompt.tools)
            rows[index] = Row(id, ids, [False] * len(ids), len(ids), 0.0, 1.0, prompt.source)
        by_hash = sorted(rows, key=lambda index: hashed(self.settings.seed, "mix", rows[index].id, index))
        for index in by_hash[round(self.settings.greedy_share * len(rows)) :]:
            rows[index] = replace(rows[index], temperature=1.0)
        return {index: row for index, row in rows.items() if self.shard is None or self.shard.holds(index)}

    def _usable(self, prompt: Prompt, use: Callable[[Prompt], _Used]) -> _Used | None:
        """Return what `use` makes of the prompt; None, and a count, for one that it refuses and that may be skipped."""
        try:
            return use(prompt)
        except BadRow as error:
            if not self.settings.skip_invalid:
                raise error.at(prompt.where or "a prompt of the target's own") from error
            self.skipped[error.reason] += 1
            return None

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
            **({"skipped": dict(self.skipped)} if self.skipped else {}),
            **({"rendering_time": time} if (time := self.plan.arguments["rendering_time"]) else {}),
        }


class _Pace(ProgressColumn):
    """Tokens per second, and the time left, judged by the finished responses."""

    def render(self, task: Task) -> Text:
        if not task.completed or not task.total:
            return Text()
        seconds = task.elapsed or 0.0
        left = int(seconds * (task.total - task.completed) / task.completed)
        return Text(f"{task.fields['tokens'] / max(seconds, 1e-6):.0f} tokens/s, {left // 60}:{left % 60:02d} left")
