"""Names that others see."""

from __future__ import annotations

from draft.errors import UserError

MAX_HEAD_NAME = 64  # characters


def check_head_name(name: str) -> None:
    """Refuse what cannot be a head's name, in a path of the API and in a metric's label."""
    if not name.isprintable() or not 0 < len(name) <= MAX_HEAD_NAME or name in (".", "..") or {*name} & {*"/="}:
        raise UserError(
            f"head name {name[:MAX_HEAD_NAME]!r}: give 1 to {MAX_HEAD_NAME} printable characters without / and =."
        )
