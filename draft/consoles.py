"""The console of the command lines."""

from __future__ import annotations

from rich.console import Console


def plain_console() -> Console:
    """A console that prints texts as they are: paths and names may hold [brackets] and :colons:, which rich reads."""
    return Console(markup=False, emoji=False, highlight=False)
