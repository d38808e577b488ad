"""The learner: when enough new traffic is captured, adapt the served head to it, compare, and swap or say why not.

OUT/ledger.jsonl          what happened, see `Ledger`
OUT/learn.lock            held while a learner works there
OUT/attempts/0001/        data/, run/, head/ and report/ of an attempt; data and run go when it has ended

Each step leaves its result whole or not at all, and a step whose result is there is not done again: a learner that
was killed at any point goes on from there.

An attempt starts from the head that is served, and not from the first one: that is the head to be beaten, it holds what
earlier traffic taught, and in a domain that stays few new rows are enough. So that many small losses do not add up, the
loss on general rows is bounded twice, against the served head and against the first one.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from draft.data.capture import Capture, open_capture
from draft.data.dataset import Row, open_dataset
from draft.data.from_capture import prepare_capture
from draft.errors import UserError
from draft.evaluation.compare import (
    BASELINE,
    CANDIDATE,
    GENERAL_TOLERANCE,
    LEAST_CONVERSATIONS,
    Comparison,
    Contender,
    compare,
    general_rows,
    row_ids,
    trained_row_ids,
)
from draft.evaluation.report import summary, write_report
from draft.evaluation.tau import Interval
from draft.files import finish_folders, read_json, write_json
from draft.heads.checkpoint import head_sha256, load_head
from draft.interop.exporting import export_head
from draft.learning.gate import Gate
from draft.learning.general import check_general, greedy_conversations
from draft.learning.ledger import Attempt, Ledger
from draft.learning.new_rows import NewRows
from draft.learning.server import Server, ServerAway, WrongKey
from draft.target import Target, load_target, load_text_target
from draft.target.adapter import read_adapter
from draft.target.target import resolve_device, resolve_dtype
from draft.training.config import RunSettings, resolve
from draft.training.merge import merge_run
from draft.training.run import NotSaved
from draft.training.trainer import Trainer

# of a run; small batches, so that the gate is passed often, and the held-out rows are left to the comparison
TRAINING: dict[str, Any] = {
    "epochs": 2.0, "tokens_per_batch": 512, "draft_steps": 3, "eval_every": 0, "save_every": 20, "keep_checkpoints": 1,
    "log_with": ["none"],
}  # fmt: skip
_LEARNED = "learned-"  # how the names of heads begin that were learnt
_EXPORT = "vllm"  # the format that every architecture has
_POLL_SECONDS = 15.0


class AttemptFailed(UserError):
    """An attempt ended too early, for the reason in the ledger."""


@dataclass(frozen=True)
class Options:
    """The options of a learner; see `draft-train learn --help`."""

    out: Path
    capture: Path
    head: str
    target: str = "smollm2"
    target_adapter: str | None = None
    general: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    method: str = "full"
    overrides: tuple[str, ...] = ()
    budget: float = 0.1
    min_rows: int = 200
    max_rows: int = 1000
    held_out_share: float = 0.2
    max_length: int = 1024


@dataclass(frozen=True)
class Serving:
    """A head that is served: its name there, and the folder that it was loaded from."""

    name: str
    folder: str


class Learner:
    """The loop around one server and one folder of captured traffic."""

    def __init__(self, options: Options, server: Server, console: Console) -> None:
        """
        Raises:
            UserError: for options by which every attempt would fail.
        """
        self.options, self.server, self.console = options, server, console
        self.ledger = Ledger(options.out / "ledger.jsonl")
        self._told = ""
        self._failed_until = -math.inf  # the newest request of an attempt that failed here
        self._check()
        for folder in (options.out, options.capture):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def run(self, *, once: bool = False, wait: Callable[[float], None] = time.sleep) -> None:
        """Learn for ever, or, with `once`, from the rows that are there now.

        Raises:
            UserError: another learner works on the same folders, the server refuses the key, a checkpoint cannot be
                written; with `once`, the server is away, or the attempt failed.
        """
        with self._alone():
            while True:
                try:
                    if not self._told:  # a wrong key is not found out only when a head is swapped
                        self.server.load()
                    told = self.tick()
                except ServerAway as error:
                    if once:
                        raise UserError(f"{error}; start it, and repeat the command.") from error
                    told = str(error)
                except AttemptFailed as error:
                    if once:
                        raise
                    told = str(error)
                if told != self._told:  # the same is not said at every look
                    self._say(told)
                self._told = told
                if once:
                    return
                wait(_POLL_SECONDS)

    def tick(self) -> str:
        """Do what there is to do, and say in one sentence what it was. Raises ServerAway and AttemptFailed."""
        attempts = self.ledger.attempts()
        self._tidy(attempts)
        self._follow(attempts)
        unfinished = next((attempt for attempt in attempts if not attempt.ended), None)
        if unfinished is not None and unfinished.begun["settings"] != self._settings:
            self._end(unfinished, "failed", reason="the learner was started again with other settings")
            attempts, unfinished = self.ledger.attempts(), None
        if unfinished is None:
            begun = self._begin(attempts)
            if isinstance(begun, str):
                return begun
            unfinished = begun
        return self._attempt(unfinished)

    # an attempt

    def _begin(self, attempts: Sequence[Attempt]) -> Attempt | str:
        """Begin the next attempt, or say what is missing for it.

        Requests of an attempt that failed count again when the learner is started again, not at its next look.
        """
        try:
            capture = open_capture(self.options.capture)
        except UserError as error:  # the server has not written any yet
            return f"not enough new rows: 0 of {self.options.min_rows} ({error})"
        used = [attempt.begun["until"] for attempt in attempts if "failed" not in attempt.events]
        since = max([self._failed_until, *used])
        rows, until = self.new_rows.count(capture, since)
        if rows < self.options.min_rows:
            return f"not enough new rows: {rows} of {self.options.min_rows}"
        number = max((attempt.number for attempt in attempts), default=0) + 1
        base = self._served(attempts, capture)
        values = {"base": asdict(base), "base_fingerprint": head_sha256(base.folder), "settings": self._settings}
        shutil.rmtree(self._folder(number), ignore_errors=True)
        self.ledger.append("begun", number, rows=rows, until=until, **values)
        self._say(f"attempt {number}: {rows} new rows, from head {base.name}")
        return self.ledger.attempts()[-1]

    def _attempt(self, attempt: Attempt) -> str:
        """Take an attempt to its end, or raise what lies outside of it and leaves it unfinished."""
        try:
            judged = _Work(self, attempt).judged()
            return self._ship(attempt) if judged["ship"] else self._end(attempt, "kept", reason=judged["reason"])
        except (WrongKey, NotSaved):  # as for other files that cannot be written: the same command goes on
            raise
        except UserError as error:
            self._failed_until = attempt.begun["until"]
            raise AttemptFailed(self._end(attempt, "failed", reason=str(error))) from error

    def _ship(self, attempt: Attempt) -> str:
        """Swap the heads, or write the new one for an engine that is not asked to."""
        place = self._folder(attempt.number)
        fingerprint = head_sha256(place / "head")
        about = {"head": f"{_LEARNED}{attempt.number:04d}-{fingerprint[:8]}", "fingerprint": fingerprint}
        before = self.server.heads()
        if before is None:
            exported = export_head(place / "head", _EXPORT, place / "export", target=self.options.target)
            commands = "; ".join(exported.commands.values()) or f"load {exported.folder}"
            why = f"{self.server.url} has no /heads; start the engine with the new head: {commands}"
            about["export_fingerprint"] = head_sha256(exported.folder)
            return self._end(attempt, "exported", **about, reason=why)
        refusal = self.server.serve(about["head"], str((place / "head").resolve()))
        if refusal is not None:
            return self._end(attempt, "kept", reason=f"the server refuses the head: {refusal}")
        told = self._end(attempt, "served", **about)
        learned = {each["name"] for each in before["heads"] if each["name"].startswith(_LEARNED)}
        for name in learned - {about["head"], before["default"]}:  # the one before stays, for the server to go back to
            self.server.unload(name)
        return told

    def _end(self, attempt: Attempt, event: str, **values: Any) -> str:
        self.ledger.append(event, attempt.number, **values)
        self._tidy(self.ledger.attempts())
        return f"attempt {attempt.number}: {event}" + "".join(
            f"{mark} {values[name]}" for name, mark in (("head", " as"), ("reason", ":")) if values.get(name)
        )

    # what is served

    def _served(self, attempts: Sequence[Attempt], capture: Capture) -> Serving:
        """The head that is served now, by the server's list, or by the newest captured request.

        Raises:
            UserError: for one that is neither the first head nor one that was learnt.
        """
        known = {head_sha256(self.options.head): Serving(self.options.head, self.options.head)}
        for attempt in attempts:
            for event in (attempt.events[name] for name in ("served", "exported") if name in attempt.events):
                folder = str(self._folder(attempt.number) / "head")
                for key in ("fingerprint", "export_fingerprint"):  # a gateway may be given either folder as its head
                    if key in event:
                        known[event[key]] = Serving(event["head"], folder)
        heads = self.server.heads()
        if heads is not None:
            name, fingerprint = next(
                ((each["name"], each["fingerprint"]) for each in heads["heads"] if each["default"]), (None, None)
            )
        else:
            newest = next(iter(capture.rows()), None)
            name, fingerprint = (newest.head, newest.head_fingerprint) if newest else (None, None)
        if fingerprint is not None and fingerprint not in known:
            raise UserError(
                f"the server's default head {name!r} ({fingerprint}) is neither {self.options.head!r} nor one that was "
                "learnt here; give its folder as --head."
            )
        return known.get(fingerprint or "", Serving(self.options.head, self.options.head))

    def _follow(self, attempts: Sequence[Attempt]) -> None:
        """Note where the server went back to an earlier head; load the newest again where it was started anew."""
        served = [each for each in attempts if "served" in each.events and "rolled back" not in each.events]
        heads = self.server.heads() if served else None
        if heads is None:
            return
        newest = served[-1]
        name = newest.events["served"]["head"]
        if heads["default"] == name:
            return
        about = [event for event in heads["events"] if event.get("head") == name]
        if not about and name not in {each["name"] for each in heads["heads"]}:
            refusal = self.server.serve(name, str((self._folder(newest.number) / "head").resolve()))
            if refusal is None:
                self.ledger.append("restored", newest.number, head=name, reason="the server was started again")
                return
            about = [{"reason": refusal}]
        reason = (about[-1].get("reason") if about else None) or f"{heads['default']} is the default again"
        self.ledger.append("rolled back", newest.number, head=name, reason=str(reason))
        self._say(f"{name} is not served any more: {reason}")

    # settings and places

    def _check(self) -> None:
        """Refuse what an attempt would fail by, maybe days later; the target's weights are read by the attempt only."""
        options = self.options
        self.settings_of_run(Path("run"), options.head, Path("data"))
        about = load_head(options.head)[1]
        resolve_dtype(options.dtype, resolve_device(options.device))
        texts = load_text_target(options.target)
        self.new_rows = NewRows(min(options.max_length, texts.stated_length))
        if options.target_adapter is not None:
            read_adapter(options.target_adapter)
        if options.general is not None:
            check_general(options.general, texts, about, options.capture)

    def settings_of_run(self, run: Path, head: str, data: Path) -> RunSettings:
        """The settings of an attempt's run, those of the command line included."""
        options = self.options
        flags: dict[str, Any] = {
            "target": options.target,
            "target_adapter": options.target_adapter,
            "head": head,
            "data": [str(data)],
        }
        flags |= {"method": options.method, "dtype": options.dtype, "device": options.device, **TRAINING}
        return resolve("adapt", str(run), overrides=options.overrides, flags=flags)

    @cached_property
    def _settings(self) -> list[Any]:
        """The settings that must be the same for an attempt to go on."""
        options = self.options
        return [options.target, options.target_adapter, options.method, *options.overrides]

    def _folder(self, number: int) -> Path:
        return self.options.out / "attempts" / f"{number:04d}"

    def _tidy(self, attempts: Sequence[Attempt]) -> None:
        """Remove what ended attempts do not need any more: the traffic itself, optimiser states, heads that lost."""
        for attempt in attempts:
            shipped = "served" in attempt.events or "exported" in attempt.events
            for name in ("data", "run", *(() if shipped else ("head",))) if attempt.ended else ():
                shutil.rmtree(self._folder(attempt.number) / name, ignore_errors=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the locks of both folders; UserError where another learner has one."""
        out, capture = self.options.out, self.options.capture
        with ExitStack() as locks:
            try:
                for lock in (out / "learn.lock", capture / ".learn.lock"):
                    locks.enter_context(FileLock(lock, timeout=0))
            except Timeout as error:
                raise UserError(
                    f"another learner works on {str(out)!r} or {str(capture)!r}; let it end, or choose other folders."
                ) from error
            except OSError as error:
                raise UserError(
                    f"{str(lock)!r} cannot be written ({error.strerror}); by it a second learner on the same folder is "
                    "refused: let the learner write there."
                ) from error
            yield

    def _say(self, text: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", soft_wrap=True)


class _Work:
    """The steps of one attempt, each of which finds or makes its result."""

    def __init__(self, learner: Learner, attempt: Attempt) -> None:
        self.learner, self.attempt, self.options = learner, attempt, learner.options
        self.folder = learner._folder(attempt.number)
        finish_folders(self.folder, "*")  # what a killed process left
        self.base: str = attempt.begun["base"]["folder"]
        self.gate = Gate(learner.server.load, self.options.budget)

    @cached_property
    def target(self) -> Target:
        """The target, whose passes all go through the gate."""
        options = self.options
        target = load_target(options.target, options.dtype, options.device, options.target_adapter)
        target.decoder.register_forward_pre_hook(lambda *_: self.gate())
        return target

    def judged(self) -> dict[str, Any]:
        """The verdict, with its reason."""
        verdict = self.folder / "report" / "verdict.json"
        if not verdict.is_file():
            general = self._general()  # what does not fit is refused before the training
            self._prepared()
            dataset = open_dataset(self.folder / "data")
            held_out = dataset.rows("held-out")
            if not greedy_conversations(held_out, self.target):
                return {"ship": False, "reason": "no held-out request was greedy, and by others no head is judged"}
            if general is not None:
                general = self._untrained(general, dataset.rows("train"))
            self._trained()
            if not (self.folder / "head" / "config.json").is_file():
                merge_run(self.folder / "run", self.folder / "head")
            values = self._compared(held_out, general)
            write_json(verdict, values)
        judged = read_json(verdict)
        if "judged" not in self.attempt.events:
            self.learner.ledger.append("judged", self.attempt.number, **judged)
            self.learner._say(f"attempt {self.attempt.number}: {judged['reason']}")
        return judged

    def _general(self) -> list[Row] | None:
        """The general rows of both gates."""
        if self.options.general is None:
            return general_rows(self.target)
        dataset = open_dataset(self.options.general)
        dataset.check_target(self.target)
        return dataset.rows("held-out")

    def _untrained(self, general: Sequence[Row], train: Sequence[Row]) -> list[Row]:
        """The general rows without those that the traffic repeats; UserError where too few are left."""
        trained = row_ids(train) | (trained_row_ids(load_head(self.base)[1]) or set())
        left = [row for row in general if not row_ids([row]) & trained]
        if (count := greedy_conversations(left, self.target)) < LEAST_CONVERSATIONS:
            raise UserError(
                f"{count} general conversations are left that no head is trained on, and with fewer than "
                f"{LEAST_CONVERSATIONS} none is served; give --general rows of other prompts."
            )
        return left

    def _prepared(self) -> None:
        """The data set: the rows until the attempt began, of which no head has seen the held-out ones."""
        data, options = self.folder / "data", self.options
        if (data / "manifest.json").is_file():
            return
        seen = [trained_row_ids(load_head(head)[1]) or set() for head in {self.base, options.head}]
        dataset = prepare_capture(
            self.target, open_capture(options.capture), data, trained=set().union(*seen),
            until=self.attempt.begun["until"], num_prompts=options.max_rows, max_length=options.max_length,
            held_out_share=options.held_out_share,
        )  # fmt: skip
        self.learner.ledger.append("prepared", self.attempt.number, counts=dataset.manifest["counts"])

    def _trained(self) -> None:
        run = self.folder / "run"
        if (run / "about.json").is_file() or (self.folder / "head" / "config.json").is_file():
            return
        run.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        settings = self.learner.settings_of_run(run, self.base, self.folder / "data")
        with open(self.folder / "training.log", "a") as log:
            trainer = Trainer(settings, Console(file=log), target=self.target, pace=self.gate)
            self.gate.signals = trainer.signals
            trainer.train()
        self.gate.signals = ()
        figures = {
            "seconds": round(time.monotonic() - began, 1),
            "rested": round(self.gate.rested, 1),
            "slowdown": round(self.gate.slowdown, 4),
            "loss": round(self.gate.loss, 4),
        }
        self.learner.ledger.append("trained", self.attempt.number, steps=trainer.done, **figures)
        self.learner._say(
            f"attempt {self.attempt.number}: trained {trainer.done} steps in {figures['seconds']:.0f} s, of which "
            f"{figures['rested']:.0f} s rested; it cost the server {figures['loss']:.1%} of its throughput"
        )

    def _compared(self, held_out: Sequence[Row], general: Sequence[Row] | None) -> dict[str, Any]:
        """Both gates: the candidate against the served head, and on general rows against the first one."""
        options, target = self.options, self.target
        loaded = {
            name: Contender(name, *load_head(folder, dtype=target.dtype, device=target.device))
            for name, folder in {"first": options.head, "served": self.base, "new": str(self.folder / "head")}.items()
        }
        comparison = compare(target, loaded["served"], loaded["new"], held_out, general)
        with open(self.folder / "comparison.log", "w") as log:
            write_report(comparison, self.folder / "report", Console(file=log))
        drift = None
        if general is not None and self.base != options.head:
            drift = compare(target, loaded["first"], loaded["new"], general, None)
        return _verdict(comparison, drift)


def _verdict(comparison: Comparison, drift: Comparison | None) -> dict[str, Any]:
    """Figures and the verdict of both gates; drift: the new head against the first one on general rows."""
    place = comparison.deciding_length - 1
    domain, general = (comparison.measurements.get(name) for name in ("domain", "general"))
    assert domain is not None
    over_first = None if drift is None else drift.gain(drift.measurements["domain"])
    ship = comparison.ship and (over_first is None or over_first.low > -GENERAL_TOLERANCE)  # NaN is above nothing
    verdict = "ship" if ship else "don't ship"
    reason = summary(comparison, verdict)
    if over_first is not None:
        gain, low, high = (f"{100 * each:+.1f}" for each in (over_first.value, over_first.low, over_first.high))
        bar = f"needs above {-100 * GENERAL_TOLERANCE:g} %"
        reason += f" General gain over the first head: {gain} % [{low}, {high}] ({bar})."
    taus = {
        which: _values(domain.greedy.taus[head][place]) for which, head in (("before", BASELINE), ("after", CANDIDATE))
    }
    return {
        "ship": ship,
        "verdict": verdict,
        "reason": reason,
        "conversations": domain.greedy.conversations,
        "domain": {**taus, "gain": _values(comparison.gain(domain))},
        "general_gain": general and _values(comparison.gain(general)),
        "general_gain_over_first": over_first and _values(over_first),
    }


def _values(interval: Interval) -> dict[str, float] | None:
    """An interval for JSON; None where it is unknown."""
    return asdict(interval) if all(map(math.isfinite, asdict(interval).values())) else None
