"""What a run shows and leaves behind: a progress bar, metrics as JSONL, and a picture of loss, β and τ."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Monitor:
    """Use as a context manager around the training loop."""

    def __init__(self, folder: Path, total_steps: int, first_step: int, console: Console) -> None:
        self.file = folder / "metrics.jsonl"
        self._truncate(first_step)
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task("training", total=total_steps, completed=first_step, state="")
        self.tokens, self.started = 0, time.monotonic()
        self.shown: dict[str, Any] = {}

    def _truncate(self, first_step: int) -> None:
        """Drop what an interrupted run wrote after its last checkpoint: those steps come again."""
        kept = [line for line in read_lines(self.file) if line["step"] <= first_step] if first_step else []
        self.file.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def __enter__(self) -> Monitor:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def log(self, step: int, metrics: dict[str, Any], tokens: int = 0) -> None:
        """Append one line of metrics and show them."""
        self.tokens += tokens
        speed = self.tokens / max(time.monotonic() - self.started, 1e-9)
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, "tokens_per_second": round(speed, 1), **metrics}) + "\n")
        self.shown.update(metrics)
        names = {"loss": "loss {:.3f}", "beta": "β {:.2f}", "tau": "τ {:.2f}"}
        shown = {name: self.shown.get(name) for name in names}
        state = "  ".join(names[name].format(value) for name, value in shown.items() if value is not None)
        self.progress.update(self.task, completed=step, state=f"{state}  {speed:.0f} tokens/s")


def read_lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines() if file.is_file() else []
    if lines and not lines[-1].endswith("}"):  # cut off while it was written
        lines.pop()
    return [json.loads(line) for line in lines]


def draw(folder: Path) -> None:
    """Draw training.png out of metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_lines(folder / "metrics.jsonl")
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    titles = {"loss": "loss", "beta": "β, weight of the non-linear branch", "tau": "τ, replay on held-out rows"}
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            panel.plot(*zip(*points, strict=True), marker="o" if name == "tau" else None)
        panel.set(title=title, xlabel="optimiser step")
        panel.grid(alpha=0.3)
    figure.savefig(folder / "training.png", dpi=110)
    pyplot.close(figure)


def provenance() -> dict[str, str]:
    """The command line and the commit of a run."""
    root = Path(__file__).parent
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": result.stdout.strip() or "unknown"}
