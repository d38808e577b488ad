"""Progress of a run: a bar, metrics as JSONL, trackers, and a picture of loss, β and τ."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from draft.errors import UserError
from draft.evaluation.report import new_figure
from draft.files import atomic_file

PROJECT = "draftsmith"
SHOWN = {"loss": "loss {:.3f}", "beta": "β {:.2f}", "tau": "τ {:.2f}"}


def choose_trackers(wanted: list[str]) -> list[str]:
    """The trackers to log with; none wanted: TensorBoard where it is installed.

    Raises:
        UserError: for one that is not installed.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    if not wanted:
        return [name for name in installed if name == "tensorboard"]
    chosen = [name for name in wanted if name != "none"]
    for name in chosen:
        if name not in installed:
            raise UserError(f"--log-with {name}: it is not installed; `pip install {name}`, or use --log-with none.")
    return chosen


class Monitor:
    """Bar and metrics of a run, in process 0; elsewhere `silent` makes it do nothing. `progress` is a context."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        first_step: int,
        console: Console,
        accelerator: Accelerator | None = None,
        *,
        silent: bool = False,
    ) -> None:
        self.file = folder / "metrics.jsonl"
        self.silent, self.console, self.accelerator = silent, console, accelerator
        self.total_steps = total_steps
        self.tokens, self.started = 0, time.monotonic()
        self.shown: dict[str, Any] = {}
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            disable=silent or not console.is_terminal,  # a log file gets a line now and then instead
        )
        self.task = self.progress.add_task("training", total=total_steps, completed=first_step, state="")
        if not silent:
            # an interrupted run wrote steps after its last checkpoint: they come again
            kept = [line for line in read_lines(self.file) if line["step"] <= first_step] if first_step else []
            with atomic_file(self.file) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def log(self, step: int, metrics: dict[str, Any], tokens: int = 0) -> None:
        """Append one line of metrics, hand it to the trackers, and show it."""
        if self.silent:
            return
        self.tokens += tokens
        speed = self.tokens / max(time.monotonic() - self.started, 1e-9)
        read = {"tokens": tokens} if tokens else {}
        line = {"step": step, "tokens_per_second": round(speed, 1), **read, **metrics}
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.accelerator is not None and self.accelerator.trackers:
            self.accelerator.log(_flat(line), step=step)
        self.shown.update(metrics)
        shown = {name: self.shown.get(name) for name in SHOWN}
        state = "  ".join(SHOWN[name].format(value) for name, value in shown.items() if value is not None)
        state += f"  {speed:.0f} tokens/s"
        self.progress.update(self.task, completed=step, state=state)
        if not self.console.is_terminal and ("tau" in metrics or step == self.total_steps):
            left = self.progress.tasks[0].time_remaining
            ends = f"{left / 60:.1f} minutes left" if left is not None and step < self.total_steps else ""
            self.console.print(f"step {step}/{self.total_steps}  {state}  {ends}", soft_wrap=True)


def abandon_trackers(accelerator: Accelerator) -> None:
    """After an error: a tracker that is left open complains when the program ends, and one may be what failed."""
    for tracker in getattr(accelerator, "trackers", []):
        with suppress(Exception):
            tracker.finish()


def start_trackers(accelerator: Accelerator, folder: Path, first_step: int, settings: dict[str, Any]) -> None:
    """Open the trackers that the accelerator was made with; `settings` are shown beside the curves."""
    accelerator.init_trackers(
        PROJECT,
        config=_flat(settings),
        init_kwargs={
            "tensorboard": {"purge_step": first_step + 1} if first_step else {},
            "wandb": {"dir": str(folder), "name": folder.name},
            "trackio": {"name": folder.name},
        },
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots; of lists of numbers each entry, of other lists their text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], float):
            flat |= {f"{name}.{place}": entry for place, entry in enumerate(value)}
        elif value is not None:
            flat[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file: what a kill or a full disk cut off in the middle is left out."""
    lines = []
    for text in file.read_text().splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def draw(folder: Path, console: Console) -> None:
    """Draw training.png out of metrics.jsonl, where matplotlib is installed."""
    figure = new_figure("training.png", (12, 3.2), console)
    if figure is None:
        return
    lines = read_lines(folder / "metrics.jsonl")
    titles = {"loss": "loss", "beta": "β, weight of the non-linear branch", "tau": "τ, replay on held-out rows"}
    for panel, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            panel.plot(*zip(*points, strict=True), marker="o" if name == "tau" else None)
        panel.set(title=title, xlabel="optimiser step")
        panel.grid(alpha=0.3)
    with atomic_file(folder / "training.png") as temporary:
        figure.savefig(temporary, dpi=110, format="png")
