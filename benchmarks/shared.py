"""Command lines, prompts, foreign servers, provenance, bars and output files of all benchmarks."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import httpx
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from draft.data.records import BadRow, records
from draft.errors import UserError, file_trouble
from draft.evaluation.tau import Interval
from draft.files import provenance as file_provenance
from draft.heads import DraftHead
from draft.heads.checkpoint import PRETRAINED, attach_head, load_head
from draft.target import Target

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "benchmarks" / "prompts"
PROMPT_COLUMNS = ("turns", "prompt", "question")
SERVER_SECONDS = 600  # for another project's server to start

# ---- command lines ----


class Parser(argparse.ArgumentParser):
    """Argument parser of one benchmark: one-sentence errors, and the description's own line breaks in --help."""

    def __init__(self, module: str, description: str | None, examples: str | None = None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            epilog=examples,
            formatter_class=layout,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help.\n")

    def add(self, name: str, kind: Callable[[str], Any] | None = None, **settings: Any) -> None:
        """Add an option; its help ends with the default where there is one."""
        default = settings.get("default")
        if default not in (None, [], False):
            values = default if isinstance(default, list) else [default]
            shown = " ".join(str(value).removesuffix(".0") for value in values)
            settings["help"] = f"{settings.get('help', '')} (default: {shown})".strip()
        if kind is not None:
            settings["type"] = kind
        self.add_argument(name, **settings)

    def add_models(self, *, default: bool = False, heads: bool = False) -> None:
        """Add --target and --head; heads: --head may be repeated."""
        target: dict[str, Any] = {"default": "smollm2"} if default else {"required": True}
        head: dict[str, Any] = {"default": "smollm2-eagle3"} if default else {"required": True}
        more: dict[str, Any] = {"action": "append"} if heads else {}
        self.add("--target", help="hub id, folder, .gguf file, or smollm2", **target)
        self.add("--head", help=f"a head's folder, or smollm2-eagle3{'; repeatable' if heads else ''}", **head, **more)

    def add_dtype(self, default: str = "auto") -> None:
        self.add("--dtype", default=default, help="auto, bfloat16, float16, float32 or float64")

    def add_prompts(self) -> None:
        self.add("--prompts", metavar="FILE", help="JSONL with turns, prompt or question (default: benchmarks/prompts)")

    def add_output(self, module: str, *, check: bool = True) -> None:
        name = module.rpartition(".")[2]
        self.add("--out", metavar="DIR", required=True, help=f"folder for {name}.json and .png")
        if check:
            self.add("--check", action="store_true", help="print the bars, and exit with 1 when one is missed")


def whole(low: int) -> Callable[[str], int]:
    """Return an argparse type: an integer of at least `low`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """Return an argparse type: a number within [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also when it is not a number
            raise argparse.ArgumentTypeError(f"{text!r} is not a number between {low:g} and {high:g}")
        return value

    return parse


def run_program(
    parse: Callable[[Sequence[str]], argparse.Namespace],
    benchmark: Callable[[argparse.Namespace, Sequence[str]], int],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a benchmark with arguments, by default those of the command line, and return its exit status.

    That is 2 after a user's mistake or a file error, which is printed in one sentence, and 130 after Ctrl-C.
    """
    command = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # servers that a program has started end with it
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parsed = parse(command)
    try:
        return benchmark(parsed, command)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        mistake = str(error) if isinstance(error, UserError) else file_trouble(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        return 2


def output_folder(path: str) -> Path:
    """Make the folder for results before the work is done, so that a wrong one is reported at once."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path!r} cannot be a folder ({error.strerror}); choose another.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {path!r} is not writable; choose another.")
    return folder


def make_console() -> Console:
    """Return a console that prints names as they are, wide enough for the tables when its output goes to a file."""
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(**plain)
    return console if console.is_terminal else Console(**plain, width=int(os.environ.get("COLUMNS", 150)))


def progress_bar() -> Progress:
    """Return a bar with the time left, on stderr, so that redirected tables stay clean."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), transient=True)


# ---- inputs ----


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

    def provenance(self, count: int | None = None) -> dict[str, Any]:
        """Return the entry in the results; count: of the prompts that were used."""
        return {"files": self.files, "sha256": self.sha256, "count": len(self.prompts) if count is None else count}


def named_flags(option: str, file: str) -> dict[str, str]:
    """Read the YAML file of an option: a name and its flags in one text, a line each.

    Raises:
        UserError: when it cannot be read, or holds something else.
    """
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{option} {file!r} could not be read ({str(error).splitlines()[0]}).") from error
    if not isinstance(found, dict) or not all(isinstance(word, str) for pair in found.items() for word in pair):
        raise UserError(f"{option} {file!r} must map names to flags in one text each.")
    return found


def load_prompts(file: str | Path | None = None, limit: int | None = None) -> PromptSet:
    """Read a JSONL file of prompts, or all of benchmarks/prompts/*.jsonl.

    A line has `turns` (a list of strings; MT-bench, Spec-Bench) or one string in `prompt` or `question`. `id` or
    `question_id` names it (default: file name and line number), and `category` groups it (default: the file's name).
    Categories take turns in the result, so that `limit`, or an interrupted run, covers all of them.

    Raises:
        UserError: with the file, the line's number and what is wrong there.
    """
    files = [Path(file)] if file is not None else sorted(PROMPTS.glob("*.jsonl"))
    places: dict[str, str] = {}
    by_category: dict[str, list[Prompt]] = {}
    for path in files:
        for where, row in records(str(path)):
            prompt = _prompt(row, where, path.stem)
            if prompt.id in places:
                raise UserError(f"{where}: id {prompt.id!r} was used at {places[prompt.id]}; give each prompt another.")
            places[prompt.id] = where
            by_category.setdefault(prompt.category, []).append(prompt)
    rounds = itertools.zip_longest(*by_category.values())
    prompts = [prompt for together in rounds for prompt in together if prompt is not None]
    if not prompts:
        raise UserError(f"{file or PROMPTS} has no prompts; write one JSON object a line, with a `turns` list.")
    # ours without the place of the checkout: results are published
    names = [str(path if file is not None else path.relative_to(ROOT)) for path in files]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    return PromptSet(prompts[:limit], names, digest.hexdigest())


def _prompt(row: Any, where: str, stem: str) -> Prompt:
    if isinstance(row, BadRow):
        raise UserError(f"{where}: {row}") from row
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__} and not a JSON object; write one object a line.")
    column = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)
    if column is None:
        found = ", ".join(row) or "nothing"
        raise UserError(f"{where}: has {found}, and none of {', '.join(PROMPT_COLUMNS)}; add a `turns` list of texts.")
    turns = row[column] if isinstance(row[column], list) else [row[column]]
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{where}: `{column}` must be text, or a list of non-empty texts; correct that line.")
    if any("\ud800" <= character <= "\udfff" for turn in turns for character in turn):
        raise UserError(f"{where}: `{column}` holds half a surrogate pair and so is not text; correct that line.")
    number = where.rpartition(" ")[2]
    names = [row[name] for name in ("id", "question_id") if row.get(name) is not None]
    category = stem if row.get("category") is None else str(row["category"])
    return Prompt(str(names[0]) if names else f"{stem}-{number}", category, tuple(turns))


def chat_ids(target: Target, text: str) -> list[int]:
    """Return the token ids of a chat of one user turn, under the target's template."""
    return target.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True)


def nothing_fits(target: Target, new_tokens: int) -> UserError:
    room = f"the target's {target.max_length} tokens with {new_tokens} new ones"
    return UserError(f"none of the prompts fits {room}; take shorter ones.")


def load_fitting_head(folder: str, target: Target) -> DraftHead:
    """Load a head in the target's dtype; UserError when it was made for another target."""
    head, about = load_head(folder, dtype=target.dtype, device=target.device)
    attach_head(head, about, target)
    return head


# ---- another project's server ----


@contextmanager
def served(command: Sequence[str], url: str, ready: str = "/v1/models") -> Iterator[None]:
    """Start a server, wait until it answers at the path `ready`, and end it, with all that it started, afterwards."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

        def answers() -> bool:
            try:
                return httpx.get(f"{url}{ready}", timeout=5, trust_env=False).is_success
            except httpx.HTTPError:
                return False

        try:
            deadline = time.monotonic() + SERVER_SECONDS
            while not answers():
                if process.poll() is not None:
                    log.seek(0)
                    last = (log.read().strip().splitlines() or ["it printed nothing"])[-1]
                    ended = f"ended with status {process.returncode} before it served {url}"
                    raise UserError(f"{shlex.join(command)} {ended}: {last}")
                if time.monotonic() > deadline:
                    raise UserError(f"{shlex.join(command)} did not serve {url} within {SERVER_SECONDS} s.")
                time.sleep(0.2)
            yield
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


# ---- provenance ----


def provenance(module: str, arguments: Sequence[str], target: Target) -> dict[str, Any]:
    """Return what a published number must name: commit, command, date, machine, versions, target."""
    import transformers

    return {
        **run_provenance(module, arguments),
        "machine": {
            "cpu": cpu_model(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(target.device) if target.device.type == "cuda" else target.device.type,
            "dtype": str(target.dtype).removeprefix("torch."),
        },
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


def run_provenance(module: str, arguments: Sequence[str]) -> dict[str, str]:
    return {
        "commit": file_provenance()["commit"],
        "command": shlex.join(["python", "-m", module, *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def head_provenance(name: str, head: str) -> dict[str, Any]:
    """Return a head's name in the tables, its path, and the sha256 of its weights file."""
    folder = Path(head) if Path(head).is_dir() else PRETRAINED / head
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes())
    return {"name": name, "path": head, "sha256": digest.hexdigest()}


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---- figures ----


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def interval_values(interval: Interval, prompts: int) -> dict[str, float | None]:
    """Return an interval for JSON, which has no NaN; without bounds for a single prompt, whose spread is unknown."""
    values = {"value": interval.value, "low": interval.low, "high": interval.high}
    known = {name: prompts > 1 or name == "value" for name in values}
    return {name: value if known[name] and math.isfinite(value) else None for name, value in values.items()}


def interval_text(values: dict[str, float | None], form: str = ".2f") -> str:
    """Return `2.31 [2.20, 2.43]`; a dash for what could not be measured."""
    if values["value"] is None:
        return "–"
    if values["low"] is None or values["high"] is None:
        return f"{values['value']:{form}} [–]"
    return f"{values['value']:{form}} [{values['low']:{form}}, {values['high']:{form}}]"


Bar = dict[str, Any]  # bar: its name; figure; limit, in words; met: None where the run did not measure it


def at_most(bar: str, figure: float | None, limit: float) -> Bar:
    met = None if figure is None else figure <= limit
    return {"bar": bar, "figure": figure, "limit": f"at most {limit:.4g}", "met": met}


def at_least(bar: str, figure: float | None, limit: float) -> Bar:
    met = None if figure is None else figure >= limit
    return {"bar": bar, "figure": figure, "limit": f"at least {limit:.4g}", "met": met}


def show_bars(console: Console, bars: list[Bar]) -> None:
    for bar in bars:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[bar["met"]]
        figure = "-" if bar["figure"] is None else f"{bar['figure']:.3f}"
        console.print(f"{verdict:>12}  {bar['bar']}: {figure} ({bar['limit']})", highlight=False, soft_wrap=True)


# ---- output ----


def make_table(title: str, headings: Sequence[str], left: Sequence[str] = ()) -> Table:
    """Return a table whose columns are right-aligned, except those named in `left`, which wrap."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        if heading in left:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right")
    return table


def finish(console: Console, results: dict[str, Any], path: Path, draw: Callable[[dict[str, Any], Path], None]) -> None:
    """Write PATH.json and PATH.png."""
    write_results(path.with_name(f"{path.name}.json"), results)
    draw(results, path.with_name(f"{path.name}.png"))
    console.print(f"wrote {path}.json and {path}.png", soft_wrap=True)


def exit_status(results: dict[str, Any], check: bool) -> int:
    """Return 1 when a bar is missed and --check was given."""
    return int(check and any(bar["met"] is False for bar in results["bars"]))


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
    """Return a figure with `columns` axes side by side, drawn without a display."""
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
