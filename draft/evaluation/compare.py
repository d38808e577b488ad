"""The paired comparison of two draft heads on held-out rows, and the gate that a new head has to pass."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft.data.dataset import Row, open_dataset
from draft.errors import UserError
from draft.evaluation.replay import Acceptance, ReplayResult, is_sampled, replay, sampled_acceptance
from draft.evaluation.tau import Interval, bootstrap_gain, bootstrap_ratio
from draft.heads import DraftHead, attach_head
from draft.target import Target

log = logging.getLogger(__name__)

DECIDING_LENGTH = 5
GENERAL_TOLERANCE = 0.02  # of general τ that a head may lose for its domain's sake
FEW_CONVERSATIONS = 20
LEAST_CONVERSATIONS = 5  # with one, the interval has no width at all
GENERAL_ROWS = Path(__file__).parents[1] / "data" / "general"
BASELINE, CANDIDATE = "baseline", "candidate"


@dataclass(frozen=True)
class Contender:
    """A head as it was loaded from its folder: (head, about) come from `draft.heads.checkpoint.load_head`."""

    name: str
    head: DraftHead
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """Both heads on the same conversations, at each speculation length; index K-1 is for K."""

    conversations: int
    results: Mapping[str, Acceptance]  # of BASELINE and CANDIDATE
    taus: Mapping[str, list[Interval]]
    gains: list[Interval]  # relative, paired by conversation: 0.1 is 10 % more tokens a verification


@dataclass(frozen=True)
class Measurement:
    """The measurements on one set of rows."""

    greedy: Pair  # replay; its results are ReplayResults
    sampled: Pair | None  # the estimate at temperature 1; None: no row was sampled without truncation

    def replay(self, name: str) -> ReplayResult:
        result = self.greedy.results[name]
        assert isinstance(result, ReplayResult)
        return result


@dataclass(frozen=True)
class Comparison:
    """Two heads measured side by side, with the verdict."""

    target_name: str
    target_fingerprint: str
    contenders: Mapping[str, Contender]  # BASELINE and CANDIDATE
    deciding_length: int
    measurements: Mapping[str, Measurement]  # "domain" and, unless it was left out, "general"

    @property
    def ship(self) -> bool:
        """True when the candidate's greedy gain is certain on the domain, and its loss on general traffic is bounded.

        Never on fewer conversations than an interval can be trusted from.
        """
        if any(measurement.greedy.conversations < LEAST_CONVERSATIONS for measurement in self.measurements.values()):
            return False
        gains = {name: self.gain(measurement).low for name, measurement in self.measurements.items()}
        return gains["domain"] > 0 and gains.get("general", 0.0) > -GENERAL_TOLERANCE  # NaN is above nothing

    @property
    def verdict(self) -> str:
        return "ship" if self.ship else "don't ship"

    def gain(self, measurement: Measurement) -> Interval:
        """The relative greedy gain at the deciding speculation length."""
        return measurement.greedy.gains[self.deciding_length - 1]

    @property
    def warnings(self) -> list[str]:
        """Notes that a reader needs before trusting the verdict."""
        notes = [
            f"{name}: only {measurement.greedy.conversations} greedy conversations; intervals from fewer than "
            f"{FEW_CONVERSATIONS} are too narrow to be trusted."
            for name, measurement in self.measurements.items()
            if measurement.greedy.conversations < FEW_CONVERSATIONS
        ]
        about = self.contenders[CANDIDATE].about
        conversations = set(self.measurements["domain"].greedy.results[CANDIDATE].row_ids)
        if chosen := len(conversations.intersection(about.get("kept_by", ()))):
            notes.append(
                f"domain: {chosen} of the {len(conversations)} conversations also chose the candidate's checkpoint, so "
                "that its gain is a little too high; to be sure, compare on other data, or train with --eval-every 0."
            )
        if trained_row_ids(about) is None:
            notes.append(
                "the candidate does not record which rows it was trained on: that they are others is not checked."
            )
        if "general" not in self.measurements:
            notes.append("general traffic was not measured: the verdict is on the domain alone.")
        return notes


def compare(
    target: Target,
    baseline: Contender,
    candidate: Contender,
    domain_rows: Iterable[Row],
    general_rows: Iterable[Row] | None = None,
    *,
    deciding_length: int = DECIDING_LENGTH,
    max_steps: int = 8,
    resamples: int = 10_000,
    progress: bool = False,
    leave_out_trained: bool = False,
) -> Comparison:
    """Compare two heads on held-out rows of the domain and, unless None, of general traffic.

    Both heads are replayed on the states of one pass of the target, so they are judged on identical text.

    leave_out_trained: leave out rows that one of the heads was trained on, instead of refusing them.

    Raises:
        UserError: when a head is not for this target, when one was trained on some of the rows, when there are no
            greedily written rows, or when deciding_length is not within 1..max_steps.
    """
    if not 1 <= deciding_length <= max_steps:
        raise UserError(
            f"deciding_length = {deciding_length}: it must be from 1 to {max_steps}, the lengths that are measured."
        )
    contenders = {BASELINE: baseline, CANDIDATE: candidate}
    for contender in contenders.values():
        attach_head(contender.head, contender.about, target)
    sets = {"domain": list(domain_rows)} | ({} if general_rows is None else {"general": list(general_rows)})
    for name, rows in sets.items():
        for which, contender in contenders.items():
            seen = row_ids(rows) & (trained_row_ids(contender.about) or set())
            if seen and leave_out_trained:
                kept = [row for row in sets[name] if not row_ids([row]) & seen]
                if left := len(sets[name]) - len(kept):  # none where the other head was trained on the same ones
                    log.warning("%d %s rows are left out, since the %s was trained on them", left, name, which)
                sets[name] = kept
            elif seen:
                raise UserError(
                    f"{len(seen)} of the {len(rows)} {name} rows are among those that the {which} was trained on; "
                    "compare on the held-out split of the data that it was trained with, prepare data of other "
                    "prompts, or leave these out with --leave-out-trained."
                )
    heads = {name: contender.head for name, contender in contenders.items()}

    def measure(method: Callable[..., Mapping[str, Acceptance]], name: str, kind: str) -> Pair:
        label = f"{name}, {kind}" if progress else None
        results = method(target, heads, sets[name], max_steps, progress=label)
        columns = range(1, results[BASELINE].emitted.shape[1] + 1)
        units = {which: [result.units(length) for length in columns] for which, result in results.items()}
        taus = {which: [bootstrap_ratio(*u.T, resamples=resamples) for u in each] for which, each in units.items()}
        gains = [
            # both have the same conversations in the same order: whether there is something to verify depends on the
            # text
            bootstrap_gain(base, new, resamples=resamples)
            for base, new in zip(units[BASELINE], units[CANDIDATE], strict=True)
        ]
        return Pair(len(units[BASELINE][0]), results, taus, gains)

    measured = {}
    for name, rows in sets.items():
        greedy = measure(replay, name, "greedy")
        sampled = measure(sampled_acceptance, name, "temperature 1") if any(map(is_sampled, rows)) else None
        measured[name] = Measurement(greedy, sampled)
    return Comparison(
        target_name=target.name,
        target_fingerprint=target.fingerprint,
        contenders=contenders,
        deciding_length=deciding_length,
        measurements=measured,
    )


def general_rows(target: Target, split: str = "held-out") -> list[Row] | None:
    """The general rows that ship with the project, or None for a target that did not write them.

    Raises:
        UserError: when the files are missing from the installation.
    """
    if not GENERAL_ROWS.is_dir():
        raise UserError(
            "the general rows that ship with the package are missing; install it again, or pass `--general DIR` with "
            "data that `draft-train prepare` wrote."
        )
    dataset = open_dataset(GENERAL_ROWS)
    if dataset.manifest["target_fingerprint"] != target.fingerprint:
        return None
    return list(dataset.rows(split))


# ---- the rows that a head was trained on, as its draftsmith.json records them ----
#
# A row's id is a hash of its prompt, so that a conversation is known again in another data set too. The first 48 bits
# of each id are kept, sorted, packed and base64-encoded: 8 characters a row. With N trained rows an unseen row is
# mistaken for one of them with a probability of N / 2^48 (4e-9 for a million).


KEY = "trained_rows"  # in draftsmith.json
_FORMAT = "sha256-48"
_DIGITS = 12  # hexadecimal, of 48 bits


def row_ids(rows: Iterable[Row]) -> set[str]:
    """The part of the rows' ids that is recorded."""
    return {row.id[:_DIGITS] for row in rows}


def record_trained_rows(rows: Iterable[Row], base: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a head that was trained on `rows`, and on those that the draftsmith.json `base` records."""
    ids = sorted(row_ids(rows) | (trained_row_ids(base) or set()))
    packed = b"".join(bytes.fromhex(each) for each in ids)
    return {"format": _FORMAT, "count": len(ids), "ids": base64.b64encode(packed).decode()}


def trained_row_ids(about: Mapping[str, Any]) -> set[str] | None:
    """The recorded ids of a draftsmith.json, packed or (in older files) a list; None where it records none.

    Raises:
        UserError: for a record that is damaged, or of a later version.
    """
    record = about.get(KEY)
    if record is None or isinstance(record, list):
        return None if record is None else set(record)
    try:
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']!r}")
        digits = base64.b64decode(record["ids"], validate=True).hex()
        ids = {digits[start : start + _DIGITS] for start in range(0, len(digits), _DIGITS)}
        if len(ids) != record["count"]:
            raise ValueError(f"{len(ids)} rows instead of {record['count']}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{KEY} in the head's draftsmith.json cannot be read ({error}); restore the file, or update the program."
        ) from error
    return ids
