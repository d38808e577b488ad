"""A target whose own weights are trained: adapters by arm, and the log of a run."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import TrainerCallback

from benchmarks.afa_lora.merging import merged_differences
from draft.afa import AfaLoraConfig, AnnealingCallback
from draft.data.records import BadRow, records
from draft.errors import UserError
from draft.target import Target

LAYERS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # that LLM-Adapters put LoRA on


def adapter_config(method: str, options: Mapping[str, Any], layers: Sequence[str]) -> LoraConfig | None:
    """Return the adapter of an arm; None where all weights are trained."""
    if method == "full":
        return None
    kind = AfaLoraConfig if method == "afa-lora" else LoraConfig
    given = {name: value for name, value in options.items() if name not in ("rank", "alpha")}
    return kind(
        r=options["rank"], lora_alpha=options["alpha"], target_modules=[*layers], task_type="CAUSAL_LM", **given
    )


def callbacks(config: LoraConfig | None, log: Path) -> list[TrainerCallback]:
    """Return what a run needs: annealing for AFA-LoRA, and the log, which comes after it."""
    annealing = [AnnealingCallback()] if isinstance(config, AfaLoraConfig) else []
    return [*annealing, StepLog(log)]


class StepLog(TrainerCallback):
    """Writes what the trainer logs, with β as it is after the step, as a line of JSON a step."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = getattr(kwargs["model"], "peft_config", {}).get("default")
        beta = config.beta if isinstance(config, AfaLoraConfig) else None
        numbers = {name: value for name, value in kwargs["logs"].items() if isinstance(value, float | int)}
        if "train_runtime" not in numbers:  # the summary at the end is of no step
            with self.file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, "beta": beta, **numbers}) + "\n")


def multiplying(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 of everything within: loss, backward pass and rollouts, of all arms alike.

    The `bf16` of transformers' Trainer wraps the module that is trained, which for an adapter is the PeftModel, around
    which TRL generates. Without the cache of casts: weights change within.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def copy_of(target: Target) -> Any:
    """A trainable copy of the target's model."""
    return copy.deepcopy(target.model).requires_grad_(True).train()


def is_finite(model: nn.Module) -> bool:
    """False for a run that diverged."""
    return all(parameter.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


def logits_differences(model: PeftModel, tokens: Sequence[int]) -> dict[str, float]:
    """Logits of an adapter beside those of the same adapter merged, on one text; see `merged_differences`."""
    ids = torch.tensor([list(tokens)], device=model.device)
    return merged_differences(model, lambda module: module(ids).logits)


def rows(path: str, needed: Mapping[str, type | tuple[type, ...]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, row) of a file of data.

    needed: the columns that a row must have, with the type of each.

    Raises:
        UserError: for a row that cannot be read, or lacks one of them.
    """
    for where, row in records(path):
        if isinstance(row, BadRow):
            raise UserError(f"{where}: {row}") from row
        if not isinstance(row, dict):
            raise UserError(f"{where}: a {type(row).__name__} and not a JSON object; write one object a line.")
        for name, kind in needed.items():
            value = row.get(name)
            bad_number = isinstance(value, float) and not math.isfinite(value)
            if not isinstance(value, kind) or isinstance(value, bool) or bad_number:
                raise UserError(f"{where}: `{name}` is {value!r}; correct or remove that row.")
        yield where, row
