"""The ledger of a learner: one line of JSON for everything that happened to an attempt, never rewritten.

A line is on the disk before the next step begins, and one that a kill cut off is dropped when the next is written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

# What ends an attempt: its head is served, or written for another engine, or the served one is kept, or it went wrong
ENDS = ("served", "exported", "kept", "failed")


@dataclass
class Attempt:
    """One attempt at a better head, by the events of the ledger."""

    number: int
    events: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name; the latest of each

    @property
    def ended(self) -> bool:
        return any(name in self.events for name in ENDS)

    @property
    def begun(self) -> dict[str, Any]:
        return self.events["begun"]


class Ledger:
    """The file of a ledger."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, attempt: int, **values: Any) -> None:
        """Write one line, and wait until it is on the disk."""
        line = json.dumps({"time": time.time(), "attempt": attempt, "event": event, **values}, allow_nan=False) + "\n"
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            whole = file.read()
            file.seek(whole.rfind(b"\n") + 1)
            file.truncate()
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[dict[str, Any]]:
        """All events in their order; a last line that was cut off is none."""
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_bytes().split(b"\n")[:-1]]

    def attempts(self) -> list[Attempt]:
        """All attempts, the oldest first."""
        found: dict[int, Attempt] = {}
        for event in self.events():
            attempt = found.setdefault(event["attempt"], Attempt(event["attempt"]))
            attempt.events[event["event"]] = event
        return list(found.values())


def status_table(attempts: Sequence[Attempt]) -> Table:
    """Every attempt with τ before and after, the gains and their intervals, and what became of it."""
    table = Table("attempt", "begun (UTC)", "rows", "domain τ", "gain", "general gain", "outcome")
    for attempt in attempts:
        begun, judged = attempt.begun, attempt.events.get("judged")
        started = datetime.fromtimestamp(begun["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
        taus = gains = general = ""
        if judged:
            domain = judged["domain"]
            taus = f"{domain['before']['value']:.3f} → {domain['after']['value']:.3f}"
            gains, general = _percent(domain["gain"]), _percent(judged.get("general_gain"))
        rows = str(begun["rows"])
        table.add_row(str(attempt.number), started, rows, taus, gains, general, "; ".join(_outcome(attempt)))
    return table


def _percent(gain: dict[str, float] | None) -> str:
    if gain is None:
        return "not measured"
    return f"{100 * gain['value']:+.1f} % [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"


def _outcome(attempt: Attempt) -> list[str]:
    """The outcomes of an attempt, in the order of time."""
    told = []
    for name, event in attempt.events.items():
        if name in (*ENDS, "rolled back", "restored"):
            at = datetime.fromtimestamp(event["time"], UTC).strftime("%m-%d %H:%M:%S")
            what = f"{name} as {event['head']}" if name in ("served", "restored") else name
            told.append(f"{at} {what}" + (f": {event['reason']}" if event.get("reason") else ""))
    return told or [f"unfinished, after {list(attempt.events)[-1]}"]
