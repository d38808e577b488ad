"""What an export format is, and the command lines of the engines that serve it."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from draft.interop.checks import Rule, TargetShape

NAMES = ("plain", "vllm", "sglang", "speculators", "medusa")

Command = Callable[[Path, TargetShape, int], str]
Limits = tuple[list[str], list[str]]  # why an engine can't serve a head, and what was never tried


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def write_pickle(tensors: dict[str, Tensor], path: Path) -> None:
    """A state dict of tensors alone, for a reader that knows nothing else."""
    buffer = io.BytesIO()  # torch's own writer says nothing of what the disk said
    torch.save(tensors, buffer)
    path.write_bytes(buffer.getbuffer())


def as_it_is(config: dict[str, Any]) -> dict[str, Any]:
    return config


@dataclass(frozen=True)
class Format:
    """How heads of one architecture are written in one format and judged, and who serves them."""

    # (head, target) -> what goes into the file, by its names
    tensors: Callable[[Any, TargetShape], dict[str, Tensor]]
    # (head, dtype of the tensors, target, drafted tokens) -> config.json
    config: Callable[[Any, torch.dtype, TargetShape, int], dict[str, Any]]
    rules: tuple[Rule, ...]
    commands: Callable[[Any], dict[str, Command]]  # of a head: engine -> how it is started
    flat: Callable[[dict[str, Any]], dict[str, Any]] = as_it_is  # config.json -> the keys that the rules speak of
    # engine -> what its config.json asks of it; only of engines that do without, and have their command left out
    limits: Mapping[str, Callable[[dict[str, Any]], Limits]] = field(default_factory=dict)
    file: str = "model.safetensors"
    write: Callable[[dict[str, Tensor], Path], None] = write_safetensors


def own_tensors(head: Any, target: TargetShape) -> dict[str, Tensor]:
    """What the head's own file has."""
    return {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}


def own_config(head: Any, dtype: torch.dtype, target: TargetShape, length: int) -> dict[str, Any]:
    """The head's own config.json."""
    return head.config.as_json(dtype)


def vllm(method: str, most: int | None = None) -> Command:
    """most: drafted tokens that the head has positions for."""

    def command(out: Path, target: TargetShape, length: int) -> str:
        length = length if most is None else min(length, most)
        speculative = {"method": method, "model": str(out), "num_speculative_tokens": length}
        return shlex.join(["vllm", "serve", target.path, "--speculative-config", json.dumps(speculative)])

    return command


def sglang(algorithm: str) -> Command:
    def command(out: Path, target: TargetShape, length: int) -> str:
        words = ["python", "-m", "sglang.launch_server", "--model-path", target.path]
        words += ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(out)]
        words += ["--speculative-num-steps", str(length), "--speculative-eagle-topk", "1"]
        return shlex.join([*words, "--speculative-num-draft-tokens", str(length + 1)])

    return command
