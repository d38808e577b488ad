"""Names that others see: of models, which reveal no folders, and of heads."""

from __future__ import annotations

from pathlib import Path

from draft.errors import UserError

MAX_HEAD_NAME = 64  # characters


def public_name(name: str) -> str:
    """Return a name that reveals nothing of the machine's folders: a path's last part; hub ids stay whole."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else name


def check_head_name(name: str) -> None:
    """Refuse what cannot be a head's name, in a path of the API and in a metric's label."""
    if not name.isprintable() or not 0 < len(name) <= MAX_HEAD_NAME or name in (".", "..") or {*name} & {*"/="}:
        raise UserError(
            f"head name {name[:MAX_HEAD_NAME]!r}: give 1 to {MAX_HEAD_NAME} printable characters without / and =."
        )
