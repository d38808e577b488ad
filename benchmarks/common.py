"""What the benchmarks share: prompts, provenance, command lines, tables, JSON and PNG files."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from draft.checkpoint import PRETRAINED
from draft.errors import UserError
from draft.target import Target
from draft.tau import Interval

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = Path(__file__).resolve().parent / "prompts"
_PROMPT_COLUMNS = ("turns", "prompt", "question")


# ---- prompts ----


@dataclass(frozen=True)
class Prompt:
    """One conversation to decode: the user's turns, in order."""

    id: str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class PromptSet:
    """Prompts with the files that they came from; `sha256` is of the files' bytes, in this order."""

    prompts: list[Prompt]
    files: list[str]
    sha256: str


def load_prompts(file: str | Path | None = None, limit: int | None = None) -> PromptSet:
    """Read a JSONL file of prompts, or all of benchmarks/prompts/*.jsonl.

    A line has `turns` (a list of strings; MT-bench, Spec-Bench) or one string in `prompt` or `question`. `id` or
    `question_id` names it (default: file name and line number), and `category` groups it (default: the file's name).
    Categories take turns in the result, so that `limit`, or an interrupted run, covers all of them.

    Raises:
        UserError: with the file, the line's number and what is wrong there.
    """
    files = [Path(file)] if file is not None else sorted(PROMPTS.glob("*.jsonl"))
    if not files:
        raise UserError(f"no prompts in {str(PROMPTS)!r}; pass --prompts FILE.")
    digest = hashlib.sha256()
    seen: dict[str, str] = {}
    by_category: dict[str, list[Prompt]] = {}
    for path in files:
        content = _read(path)
        digest.update(content)
        # not str.splitlines(): JSON strings may hold U+2028 and the like, which end no line of a JSONL file
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                prompt = _parse_prompt(line, where, default_id=f"{path.stem}-{number}", default_category=path.stem)
                if prompt.id in seen:
                    raise UserError(
                        f"{where}: id {prompt.id!r} was used at {seen[prompt.id]}; give each prompt its own id."
                    )
                seen[prompt.id] = where
                by_category.setdefault(prompt.category, []).append(prompt)
    rounds = itertools.zip_longest(*by_category.values())
    prompts = [prompt for together in rounds for prompt in together if prompt is not None]
    if not prompts:
        raise UserError(f"{files[0]} has no prompts; write one JSON object a line, with a `turns` list.")
    # ours without the place of the checkout: results are published
    names = [str(path if file is not None else path.relative_to(ROOT)) for path in files]
    return PromptSet(prompts[:limit], names, digest.hexdigest())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"prompts {str(path)!r} cannot be read ({error.strerror}); pass a JSONL file.") from error


def _parse_prompt(line: bytes, where: str, *, default_id: str, default_category: str) -> Prompt:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); write one JSON object a line.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__} and not a JSON object; write one object a line.")
    column = next((name for name in _PROMPT_COLUMNS if row.get(name) is not None), None)
    if column is None:
        found = ", ".join(row) or "nothing"
        raise UserError(
            f"{where}: has {found}, and none of {', '.join(_PROMPT_COLUMNS)}; add a `turns` list of strings."
        )
    turns = row[column] if isinstance(row[column], list) else [row[column]]
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{where}: `{column}` must be text, or a list of non-empty texts; correct that line.")
    if any("\ud800" <= character <= "\udfff" for turn in turns for character in turn):
        raise UserError(f"{where}: `{column}` holds half a surrogate pair and so is not text; correct that line.")
    names = [row[name] for name in ("id", "question_id") if row.get(name) is not None]
    category = default_category if row.get("category") is None else str(row["category"])
    return Prompt(str(names[0]) if names else default_id, category, tuple(turns))


# ---- provenance ----


def provenance(module: str, arguments: Sequence[str], target: Target) -> dict[str, Any]:
    """What a published number must name: commit, command, machine, versions, target."""
    import transformers

    return {
        "commit": _commit(),
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(target),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "target": {
            "name": target.name,
            "adapter": target.adapter and target.adapter.name,
            "fingerprint": target.fingerprint,
            "layers": target.num_layers,
        },
    }


def machine(target: Target) -> dict[str, Any]:
    """The machine as a reader needs it to judge a time: processor, cores, threads, accelerator, dtype."""
    on_gpu = target.device.type == "cuda"
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(target.device) if on_gpu else target.device.type,
        "dtype": str(target.dtype).removeprefix("torch."),
    }


def head_provenance(name: str, head: str) -> dict[str, Any]:
    """A head's name in the tables, its path, and the sha256 of its weights as they lie in the file."""
    folder = Path(head) if Path(head).is_dir() else PRETRAINED / head
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes())
    return {"name": name, "path": head, "sha256": digest.hexdigest()}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that this checkout is at; marked when tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        return commit + (" with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git commit here)"


# ---- command lines ----


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
    """Run a benchmark's body; a user's mistake becomes one sentence on stderr and status 2; Ctrl-C, 130."""
    try:
        return body()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


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


# ---- output ----


def make_console() -> Console:
    """A console that prints names as they are, wide enough for the tables when the output goes to a file."""
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(**plain)
    return console if console.is_terminal else Console(**plain, width=int(os.environ.get("COLUMNS", 150)))


def progress_bar() -> Progress:
    """A bar with the time left; on stderr, so that redirected tables stay clean."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def interval_values(interval: Interval, prompts: int) -> dict[str, float | None]:
    """An interval for JSON, which has no NaN; without bounds for a single prompt, whose spread nobody knows."""
    values = {"value": interval.value, "low": interval.low, "high": interval.high}
    known = {name: prompts > 1 or name == "value" for name in values}
    return {name: value if known[name] and math.isfinite(value) else None for name, value in values.items()}


def interval_text(values: dict[str, float | None], form: str = ".2f") -> str:
    """`2.31 [2.20, 2.43]`; a dash for what could not be measured."""
    if values["value"] is None:
        return "–"
    if values["low"] is None or values["high"] is None:
        return f"{values['value']:{form}} [–]"
    return f"{values['value']:{form}} [{values['low']:{form}}, {values['high']:{form}}]"


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write JSON atomically: a list of rows gets one row a line, so that thousands of them stay readable."""
    parts = []
    for key, value in results.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"    {json.dumps(row, allow_nan=False, ensure_ascii=False)}" for row in value)
            text = f"[\n{rows}\n  ]"
        else:
            text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {text}")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(temporary, path)


def make_figure(columns: int, title: str) -> tuple[Any, Any]:
    """A figure with `columns` axes side by side, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * columns, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write the PNG through a temporary name and a rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, path)
