"""draft-serve as a process of its own, for tests that need its signals, its exit status, or its end."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from http_testing import eventually

ROOT = Path(__file__).parents[1]
# draft-serve, which takes no answer beyond 10 tokens while there is a file `hold` where it runs: a request that a test
# needs to be running does not end first, however fast the machine is
SERVE = """
import pathlib, sys, time
from serving.cli import main
from serving.engine.step import Decoder

hold, step = pathlib.Path("hold"), Decoder.step

def held(self, rows):
    going = [row for row in rows if len(row.answer.tokens) < 10 or not hold.exists()]
    step(self, going) if going else time.sleep(0.005)

Decoder.step = held
try:
    main()
finally:
    pathlib.Path("modules").write_text(" ".join(sys.modules))
"""
EAGER = ("--threads", "1", "--mode", "eager")


@contextmanager
def started(
    folder: Path, *flags: str, options: tuple[str, ...] = EAGER, **variables: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """draft-serve with these flags and the target, on a free port, once it is ready; the process and its ready line."""
    command = [sys.executable, "-c", SERVE, "--target", str(folder / "my-target"), "--port", "0", *options, *flags]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables
    out, log = folder / "out", folder / "log"
    with out.open("w") as stdout, log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout, stderr=stderr)
    try:
        eventually(lambda: out.read_text().endswith("\n") or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield process, out.read_text()
    finally:
        process.kill()
        process.wait(60)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The servers that run in this folder finish no long answer."""
    (folder / "hold").touch()
    try:
        yield
    finally:
        (folder / "hold").unlink()
