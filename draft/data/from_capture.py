"""`draft-train prepare --from-capture`: from captured requests to a data set, without writing or rendering anything."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from draft.data.capture import GREEDY, OTHER, Capture, Captured
from draft.data.dataset import Dataset, Row, conversation_id, open_dataset, split_counts, write_dataset
from draft.data.settings import Settings
from draft.errors import UserError
from draft.files import atomic_folder
from draft.target import Target

log = logging.getLogger(__name__)

MOST_ROWS = 10_000  # when the user does not say how many: the newest
SOURCE = "captured"
_FILES = frozenset({"manifest.json", "train.parquet", "held-out.parquet", "tokenizer"})
_GROWN = 8  # tokens of an answer by which the next turn's prompt is known to go on from it
# Near duplicates, by MinHash (Broder 1997) of the runs of tokens in an answer
_RUN = 4
_BANDS, _BAND = 16, 4
_ALIKE = 0.8  # of the runs of both together are in each


def prepare_capture(
    target: Target,
    capture: Capture,
    out: str | Path,
    *,
    trained: Collection[str] = (),
    until: float = math.inf,
    **settings: Any,
) -> Dataset:
    """Write a data set of the newest captured requests into the folder `out`.

    Rows are those whose sampling training and replay may use. The conversations that began last are held out: later
    turns go with the first one, whose prompt theirs repeat.

    Args:
        trained: beginnings of ids of conversations that a head was trained on, which are not held out.
        until: requests that ended later, in seconds since the epoch, are left out.
        settings: num_prompts (requests; default: `MOST_ROWS`), max_length and held_out_share of `Settings`.

    Raises:
        UserError: for another target, another data set in `out`, or a capture of which nothing can be used.
    """
    chosen = Settings.checked(settings)
    capture.check_target(target)
    out, longest = Path(out), min(chosen.max_length, target.max_length)
    if (out / "manifest.json").is_file():
        raise UserError(f"{str(out)!r} is a data set already; choose another --out, or delete it.")
    counts: Counter[str] = Counter()
    requests = _newest(capture, chosen.num_prompts or MOST_ROWS, longest, until, counts)
    if not requests:
        raise UserError(_nothing(capture, counts, longest))
    if target.reads_clock:
        log.warning(
            "the chat template writes the date, so that a prompt that came on two days counts as two conversations: it "
            "may be trained on and held out"
        )
    alike = near_duplicates([each.answer_ids for each in requests])
    rows = hold_out_newest(as_rows(requests), chosen.held_out_share, trained)
    greedy = sum(row.temperature == 0 for row in rows) / len(rows)
    manifest = {
        "target": target.name,
        "target_adapter": target.adapter.name if target.adapter else None,
        "target_fingerprint": target.fingerprint,
        "template_hash": target.template_hash,
        "vocab_size": target.vocab_size,
        "eos_token_ids": sorted(target.eos_token_ids),
        "sources": [SOURCE],
        "seed": chosen.seed,
        "mix": {"greedy": greedy, "temperature 1": 1 - greedy},
        "answered_with_weights": capture.target.weights,
        "captured": {"from": requests[0].time, "until": requests[-1].time},
        "max_length": longest,
        "held_out_share": chosen.held_out_share,
        "counts": {"requests": len(requests), **counts, "near_duplicates": alike, **split_counts(rows)},
    }
    with atomic_folder(out, _FILES) as temporary:
        target.tokenizer.save_pretrained(temporary / "tokenizer")
        write_dataset(temporary, rows, manifest)
    return open_dataset(out)


def _newest(capture: Capture, most: int, longest: int, until: float, counts: Counter[str]) -> list[Captured]:
    """The newest requests that can be used, in the order of their times; counts: those left out, by reason."""
    taken: dict[tuple[int, ...], Captured] = {}  # by content
    for each in capture.rows():
        if len(taken) == most:
            break
        content = (*each.prompt_ids, -1, *each.answer_ids)
        if each.time > until:
            continue
        if each.kind == OTHER:
            counts["other_sampling"] += 1
        elif len(content) - 1 > longest:
            counts["too_long"] += 1
        elif content in taken:  # what comes again is as old as it was first
            taken[content] = replace(taken[content], time=each.time)
            counts["duplicates"] += 1
        else:
            taken[content] = each
    return sorted(taken.values(), key=lambda each: each.time)


def _nothing(capture: Capture, counts: Counter[str], longest: int) -> str:
    found = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.most_common()) or "no rows"
    remedy = "capture requests that are greedy, or at temperature 1 without truncation"
    if counts["too_long"]:
        remedy = f"raise --max-length, now {longest}, or {remedy}"
    return f"no request in {str(capture.folder)!r} can be used ({found}); {remedy}."


def as_rows(requests: Sequence[Captured]) -> list[Row]:
    """Requests as rows in the same order: one for each, those of a conversation with the id of its first turn."""
    firsts = first_turns([each.prompt_ids for each in requests], [each.answer_ids for each in requests])
    ids = {place: conversation_id(requests[place].prompt_ids) for place in set(firsts)}
    return [
        Row(
            id=ids[first],
            ids=[*each.prompt_ids, *each.answer_ids],
            mask=[False] * len(each.prompt_ids) + [True] * len(each.answer_ids),
            prompt_length=len(each.prompt_ids),
            temperature=0.0 if each.kind == GREEDY else 1.0,
            top_p=1.0,
            source=SOURCE,
            retokenised=each.retokenised,
        )
        for each, first in zip(requests, firsts, strict=True)
    ]


def first_turns(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[int]:
    """For each request the place of its conversation's first turn, among those that are there.

    Requests with the same prompt are one conversation. A later turn's prompt begins with the prompt of an earlier one
    and with the beginning of its answer: by its prompt alone a short one, such as a token that all begin with, would
    join everything.
    """
    turns: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        turns.setdefault(tuple(prompt), []).append(place)
    first: dict[tuple[int, ...], int] = {}
    begun: list[tuple[int, ...]] = []  # prompts that the present one begins with, the shortest first
    for prompt in sorted(turns):
        while begun and prompt[: len(begun[-1])] != begun[-1]:
            begun.pop()
        first[prompt] = turns[prompt][0]
        for earlier in begun:
            if any(_goes_on(prompt[len(earlier) :], answers[place]) for place in turns[earlier]):
                first[prompt] = first[earlier]
                break
        begun.append(prompt)
    return [first[tuple(prompt)] for prompt in prompts]


def _goes_on(rest: tuple[int, ...], answer: Sequence[int]) -> bool:
    """True where what follows a prompt begins as its answer does; the last token may be an end, rendered anew."""
    beginning = tuple(answer[: min(_GROWN, max(1, len(answer) - 1))])
    return rest[: len(beginning)] == beginning


def hold_out_newest(rows: Sequence[Row], share: float, trained: Collection[str] = ()) -> list[Row]:
    """Assign the splits of rows in the order of their times: a share of the ids, those that first occur last.

    trained: beginnings of ids that are not held out. A share strictly between 0 and 1 leaves at least one id on each
    side, where there are two.
    """
    ids = list(dict.fromkeys(row.id for row in rows))
    count = round(share * len(ids))
    if 0 < share < 1 and len(ids) > 1:
        count = min(max(count, 1), len(ids) - 1)
    lengths = {len(each) for each in trained}
    free = [id for id in ids if not any(id[:length] in trained for length in lengths)]
    held_out = set(free[max(0, len(free) - count) :])
    return [replace(row, split="held-out" if row.id in held_out else "train") for row in rows]


def near_duplicates(answers: Sequence[Sequence[int]]) -> int:
    """Answers that are nearly those of one before: by estimate, four fifths of their runs of 4 tokens are the same."""
    pick = np.random.default_rng(0)
    factors = pick.integers(1, 2**63, size=(_BANDS * _BAND, 1), dtype=np.uint64) | np.uint64(1)
    weights = pick.integers(1, 2**63, size=_RUN, dtype=np.uint64) | np.uint64(1)
    signatures: list[np.ndarray] = []
    buckets: dict[tuple[int, bytes], int] = {}
    found = 0
    for place, answer in enumerate(answers):
        ids = np.asarray(answer, dtype=np.uint64) + np.uint64(1)
        ids = np.pad(ids, (0, max(0, _RUN - len(ids))))
        runs = np.lib.stride_tricks.sliding_window_view(ids, _RUN) @ weights  # [runs], modulo 2**64
        runs ^= runs >> np.uint64(29)
        signature = (runs * factors).min(axis=1)  # [bands * band]
        signatures.append(signature)
        keys = [(band, signature[band * _BAND : (band + 1) * _BAND].tobytes()) for band in range(_BANDS)]
        candidates = {buckets[key] for key in keys if key in buckets}
        found += any(float((signatures[each] == signature).mean()) >= _ALIKE for each in candidates)
        for key in keys:
            buckets.setdefault(key, place)
    return found
