"""What the benchmarks' command lines share: their arguments, and what they show while they run."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from draft.errors import UserError, file_trouble


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence, and which keeps the description's line breaks."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help.\n")


def whole(low: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `low`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number within [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also when it is not a number
            raise argparse.ArgumentTypeError(f"{text!r} is not a number between {low:g} and {high:g}")
        return value

    return parse


def run_program(body: Callable[[], int]) -> int:
    """Run a benchmark's body; a user's mistake or trouble with a file ends in one sentence and 2; Ctrl-C in 130."""
    try:
        return body()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        mistake = str(error) if isinstance(error, UserError) else file_trouble(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        return 2


def output_folder(path: str) -> Path:
    """Make the folder for results: before the work is done, since nobody wants to learn afterwards that it can't be."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path!r} cannot be a folder ({error.strerror}); choose another.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {path!r} is not writable; choose another.")
    return folder


def make_console() -> Console:
    """A console that prints names as they are, wide enough for the tables when the output goes to a file."""
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(**plain)
    return console if console.is_terminal else Console(**plain, width=int(os.environ.get("COLUMNS", 150)))


def progress_bar() -> Progress:
    """A bar with the time left; on stderr, so that redirected tables stay clean."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), transient=True)
