"""Runs of the real command in processes of their own, on a tiny target: what can be killed, limited and multiplied."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from conftest import save_tiny_target
from safetensors.torch import load_file
from torch.distributed import TCPStore
from written_data import prepared

CONTEXT = multiprocessing.get_context("forkserver")  # a server that has imported everything forks fresh processes
LATE = [  # of a run's parts, and of those of `learn`
    "pyarrow.dataset", "tensorboardX", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "transformers.models.llama.modeling_llama", "draft.learning.loop",
]  # fmt: skip
CONTEXT.set_forkserver_preload(["training_runs", "draft.training.trainer", *LATE])


def make_world(root: Path, rows: int = 24) -> Path:
    """A tiny target on disk, and data that it wrote."""
    target = save_tiny_target(root / "target")
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {n} and {n * 7 % 11}"}) + "\n" for n in range(rows)))
    prepared(target, root / "data", prompts=[prompts], max_new_tokens=24, held_out_share=0.25)
    return root


# of a Medusa head's four positions three are trained, the number of draft steps
NEW_HEADS = {
    "eagle3": "--draft-vocab-size 180",
    "eagle": "--architecture eagle",
    "medusa": "--architecture medusa --head-options num_heads=4 --draft-vocab-size 180",
}


def command(world: Path, mode: str, out: Path | str, *more: str, architecture: str = "eagle3") -> list[str]:
    """Arguments of `draft-train`: a small run, float32, on the CPU; `adapt` anneals, which has more state to lose."""
    common = f"--target {world}/target --data {world}/data --dtype float32 --device cpu --draft-steps 3 --eval-every 0"
    common += " --optimizer adamw --weight-average 0"  # Muon is not for FSDP2
    head = NEW_HEADS[architecture] if mode == "pretrain" else f"--head {world}/base/head --method afa-lora --rank 4"
    return [mode, "--out", str(out), *common.split(), *head.split(), "--tokens-per-batch", "256", *more]


class Run:
    """`draft-train` in a process of its own, its output in a file; one that is left over ends with pytest."""

    store: TCPStore | None = None  # of its group

    def __init__(self, arguments: list[str], **options: Any) -> None:
        """options: of `_main`."""
        rank = options.get("environment", {}).get("RANK", "")
        self.log = Path(f"{arguments[arguments.index('--out') + 1]}{rank}.log")
        with pytest.MonkeyPatch.context() as patch:  # Python's server of forks does not know our sys.path by itself
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()
        self.process = CONTEXT.Process(target=_main, args=(arguments, self.log), kwargs=options, daemon=True)
        self.process.start()

    def wait(self) -> int:
        """The exit status; minus the signal's number for a killed process. One that takes minutes is stuck."""
        self.process.join(240)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"it did not end: {self.output()}")
        return self.process.exitcode

    def succeed(self) -> Run:
        assert self.wait() == 0, self.output()
        return self

    def output(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""


def _main(
    arguments: list[str],
    log: Path,
    *,
    file_size: int | None = None,
    signalled: tuple[float, int] | None = None,
    script: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """file_size: no file that it writes may grow beyond, in bytes: what a full disk does, without one.

    signalled: (step, number): it sends itself the signal of that number when it has logged the step; with a fraction,
    so many hundredths of a second later. script: Python that runs before the command.
    """
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if signalled is not None:
        _signal_after(*signalled)
    from draft.cli import main

    exec(script, {})
    sys.argv = ["draft-train", *arguments]
    main()


def _signal_after(moment: float, number: int) -> None:
    """From within: another process may see the step only when the run is already beyond it."""
    from draft.training.monitor import Monitor

    log = Monitor.log

    def signalling(self: Monitor, step: int, metrics: dict[str, Any], tokens: int = 0) -> None:
        log(self, step, metrics, tokens)
        if tokens and step == int(moment):  # not what is logged of a replay
            if moment == step:
                os.kill(os.getpid(), number)
            else:
                threading.Timer((moment - step) / 100, os.kill, (os.getpid(), number)).start()

    Monitor.log = signalling  # type: ignore[method-assign]


def run_group(
    arguments: list[str], *, signalled: Any = None, file_size: Any = None, script: str = "", **environment: str
) -> list[Run]:
    """Two processes of one run, with what `torchrun` puts into their environment; `signalled` is of the first."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a chosen port may be another group's
    shared = {**group_environment(store), **environment}
    runs = [
        Run(
            arguments,
            file_size=file_size,
            signalled=signal,
            script=script,
            environment={**shared, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank, signal in (("0", signalled), ("1", None))
    ]
    runs[0].store = store
    return runs


def group_environment(store: TCPStore, size: int = 2) -> dict[str, str]:
    """The variables by which the processes of a group meet at this process's store, but for their ranks."""
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    # gloo looks for the host by its name, which need not be known where there is no network
    place = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    return {"WORLD_SIZE": str(size), **agent, **place}


def start_prepare(folder: Path, out: Path, *words: object, script: str = "", **environment: str) -> Run:
    """Start `draft-train prepare` with the target in a folder."""
    arguments = ["prepare", "--target", str(folder), "--out", str(out), *map(str, words)]
    return Run(arguments, script=script, environment=environment)


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
