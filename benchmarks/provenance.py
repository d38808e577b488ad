"""Where a published number comes from: commit, command, machine, versions, target, head."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from draft.heads.checkpoint import PRETRAINED
from draft.target import Target

ROOT = Path(__file__).resolve().parents[1]


def provenance(module: str, arguments: Sequence[str], target: Target) -> dict[str, Any]:
    """What a published number must name: commit, command, machine, versions, target."""
    import transformers

    return {
        "commit": commit(),
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
        "cpu": cpu_model(),
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


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that this checkout is at; marked when tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        head = git("rev-parse", "HEAD").strip()
        return head + (" with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git commit here)"
