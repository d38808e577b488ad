"""Helpers of the programs that run in another engine's environment; imports nothing of ours."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 600  # seconds for a server to come up, and for an answer
COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")  # of /metrics, under the names that vLLM has


@contextmanager
def served(command: list[str], log: Path) -> Iterator[str]:
    """Run a server with --host and --port added; yields its address when it answers, and ends it with the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("w") as output:
        command = [*command, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + PATIENCE
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"{command[0]} does not answer:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(address: str) -> bool:
    try:
        fetch(f"{address}/health")  # while it is loading, an error status
        return True
    except OSError:
        return False


def fetch(url: str, body: dict[str, Any] | None = None) -> str:
    """Return an answer's body; an error status raises."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return answer.read().decode()


def write_result(folder: Path, engine: str, version: str, counts: dict[str, int], **rest: Any) -> None:
    """Write FOLDER/result.json for the judge, and print the counts."""
    result = {"engine": engine, "version": version, "counts": counts, **rest}
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    print(json.dumps({"version": version, **counts}))


def write_table(table: Path, engine: str, version: str, cases: dict[str, Any]) -> None:
    """Replace an engine's part of the table of loaded names, shapes and keys; lists get one line each."""
    written = json.loads(table.read_text()) if table.is_file() else {}
    written[engine] = {"version": version, "cases": cases}
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(written, indent=1))
    table.write_text(text + "\n")
