"""The rows that a head was trained on, as its draftsmith.json records them: so few bytes that it may be millions.

A row's id is a hash of its prompt, so that a conversation is known again in another data set too. Of each id the first
48 bits are kept, sorted, packed and base64-encoded: 8 characters a row. With N trained rows an unseen row is mistaken
for one of them with a probability of N / 2^48 (4e-9 for a million).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from draft.data.dataset import Row
from draft.errors import UserError

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
