"""Runs of the real command in processes of their own, on a tiny target: what can be killed, limited and multiplied."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from conftest import save_tiny_target
from safetensors.torch import load_file

from draft.data.prepare import prepare

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")  # a server that has imported everything forks fresh processes
CONTEXT.set_forkserver_preload(["draft.training.trainer", "training_runs"])


def make_world(root: Path, rows: int = 24) -> Path:
    """A tiny target on disk, and data that it wrote."""
    target = save_tiny_target(root / "target")
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {n} and {n * 7 % 11}"}) + "\n" for n in range(rows)))
    prepare(target, root / "data", prompts=[prompts], max_new_tokens=24, held_out_share=0.25, progress=False)
    return root


# of a Medusa head's four positions three are trained, the number of draft steps
NEW_HEADS = {
    "eagle3": "--draft-vocab-size 180",
    "eagle": "--architecture eagle",
    "medusa": "--architecture medusa --head-options num_heads=4 --draft-vocab-size 180",
}


def command(world: Path, mode: str, out: Path | str, *more: str, architecture: str = "eagle3") -> list[str]:
    """What stands after `draft-train`: a small run, float32, on the CPU."""
    common = f"--target {world}/target --data {world}/data --dtype float32 --device cpu --draft-steps 3 --eval-every 0"
    head = NEW_HEADS[architecture] if mode == "pretrain" else f"--head {world}/base/head --rank 4"
    return [mode, "--out", str(out), *common.split(), *head.split(), "--tokens-per-batch", "256", *more]


class Run:
    """`draft-train` in a process of its own, its output in a file."""

    def __init__(self, arguments: list[str], *, file_size: int | None = None, **environment: str) -> None:
        """file_size: no file that it writes may grow beyond, in bytes: what a full disk does, without one."""
        self.out = Path(arguments[arguments.index("--out") + 1])
        self.log = self.out.with_name(f"{self.out.name}{environment.get('RANK', '')}.log")
        self.process = CONTEXT.Process(target=_main, args=(arguments, str(self.log), file_size, environment))
        self.process.start()

    def wait(self) -> int:
        """The exit status; minus the signal's number for a killed process."""
        self.process.join(120)
        assert self.process.exitcode is not None, self.output()
        return self.process.exitcode

    def succeed(self) -> Run:
        assert self.wait() == 0, self.output()
        return self

    def signal_after(self, step: int, number: int) -> int:
        """Send a signal when the run has logged `step`; returns the exit status."""
        while self.process.is_alive() and last_step(self.out) < step:
            time.sleep(0.001)
        assert self.process.is_alive(), f"the run ended before step {step}: {self.output()}"
        os.kill(self.process.pid, number)  # type: ignore[arg-type]
        return self.wait()

    def output(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""


def _main(arguments: list[str], log: str, file_size: int | None, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    from draft.cli import main

    sys.argv = ["draft-train", *arguments]
    main()


def run_group(arguments: list[str], count: int = 2, file_size: int | None = None, **environment: str) -> list[Run]:
    """The processes of one run, with what `torchrun` puts into their environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [Run(arguments, file_size=file_size, **shared, **rank) for rank in ranks]


def launch(launcher: list[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The command under `torchrun` or `accelerate launch`: `launcher` up to where the module's name comes."""
    return python("-m", *launcher, "-m", "draft.cli", *arguments)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """An interpreter of its own: unlike a `Run`'s it is also taken down at the end."""
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def last_step(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=-1)


def logged(folder: Path, name: str = "loss") -> dict[int, float]:
    """step -> a metric."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's result."""
    [file] = [*folder.glob("head/model.safetensors"), *folder.glob("adapter/adapter_model.safetensors")]
    return load_file(file)
