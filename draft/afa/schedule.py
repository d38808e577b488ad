"""The annealing of AFA-LoRA: beta, the weight of its non-linear branch, falls from 1 to 0 during training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from draft.errors import UserError

EXPONENT = 5.0  # the exponential schedule falls by e^-5 before it is rescaled to reach 0

# beta as a function of t = step / (decay_ratio * total_steps) in [0, 1): 1 at t = 0, 0 at t = 1
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
    "exponential": lambda t: (math.exp(-EXPONENT * t) - math.exp(-EXPONENT)) / -math.expm1(-EXPONENT),
}


def beta_at(step: int, total_steps: int, decay_ratio: float = 0.3, schedule: str = "linear") -> float:
    """beta after `step` of `total_steps` optimiser steps: 1 at first, exactly 0 after decay_ratio of them.

    Linear after AFA-LoRA (arXiv 2512.22455): max(0, 1 - step / (decay_ratio * total_steps)). Raises UserError
    for an unknown schedule, a decay_ratio outside (0, 1], a total below 1 or a negative step.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}")
    if not 0 < decay_ratio <= 1:
        raise UserError(f"decay_ratio is {decay_ratio}: choose a number above 0 and up to 1")
    if total_steps < 1 or step < 0:
        raise UserError(f"step {step} of {total_steps} is no optimiser step: count from 0 to a total of at least 1")
    if step >= zero_step(total_steps, decay_ratio):
        return 0.0
    return SCHEDULES[schedule](step / (decay_ratio * total_steps))


def zero_step(total_steps: int, decay_ratio: float) -> int:
    """The first optimiser step after which beta is exactly 0."""
    # 0.07 * 100 is 7.000000000000001 in binary: the slack keeps such a product from costing one step more
    return max(1, math.ceil(decay_ratio * total_steps - 1e-9))


class Annealing:
    """The state of one AFA-LoRA adapter in one layer.

    beta is a tensor, so that a captured graph sees it change, but no buffer: PEFT saves buffers, and
    `.to(bfloat16)` would round it.
    """

    def __init__(self, config: Any) -> None:
        self.config = config  # the adapter's AfaLoraConfig, which all of its layers share
        self.is_linear = config.beta == 0
        # An explicit device: the model may be under construction on another default one (meta).
        self._beta = torch.tensor(config.beta, dtype=torch.float64, device="cpu")  # []

    def refresh(self) -> None:
        """Take beta over from the config."""
        self.is_linear = self.config.beta == 0
        self._beta.fill_(self.config.beta)

    def beta_on(self, device: torch.device) -> Tensor:
        """beta as a 0-dim tensor on `device`."""
        beta = self._beta  # a local name: replicas of nn.DataParallel share this object
        if beta.device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            # A tensor made in inference mode could not take part in training later.
            with torch.inference_mode(False):
                beta = self._beta = beta.to(device=device, dtype=dtype)
        return beta

    def refuse_unless_linear(self, adapter_name: str) -> None:
        """Raise UserError while beta is above 0, naming the step at which it would be 0."""
        config = self.config
        if config.beta == 0:
            return
        way_out = "and no number of steps is set, so it never reaches 0: train it with AnnealingCallback"
        if config.total_steps:
            last = zero_step(config.total_steps, config.decay_ratio)
            way_out = f"at step {config.step} of {config.total_steps}; train on to step {last}, where beta reaches 0"
        raise UserError(
            f"adapter {adapter_name!r} is not a matrix yet and can be neither merged nor converted: "
            f"its beta is {config.beta:.4g} {way_out}"
        )


def set_annealing_step(model: nn.Module, step: int, total_steps: int, adapter_name: str | None = None) -> float:
    """Set beta after `step` of `total_steps` optimiser steps in every AFA layer and config of `model`.

    `adapter_name` limits it to one adapter; otherwise all AFA adapters follow, active or not. Returns the new
    beta (the largest, where adapters differ in schedule). Raises UserError when there is no such adapter, or
    for a step or total that `beta_at` refuses.
    """
    states = [state for _, name, state in _annealed_adapters(model) if adapter_name in (None, name)]
    if not states:
        named = "" if adapter_name is None else f" named {adapter_name!r}"
        raise UserError(f"{type(model).__name__} has no AFA-LoRA adapter{named}: add one with an AfaLoraConfig")
    for state in states:
        state.config.anneal(step, total_steps)  # the layers share the config: harmless to repeat
        state.refresh()
    return max(state.config.beta for state in states)


def _annealed_adapters(model: nn.Module) -> Iterator[tuple[Any, str, Annealing]]:
    """(layer, adapter's name, state); PEFT keeps the state of a variant in `lora_variant`."""
    for layer in model.modules():
        for name, state in getattr(layer, "lora_variant", {}).items():
            if isinstance(state, Annealing):
                yield layer, name, state


class AnnealingCallback(TrainerCallback):
    """Keeps beta of the active AFA-LoRA adapters in step with transformers.Trainer (and TRL's trainers).

    beta is computed from `state.global_step` and `state.max_steps`, which count optimiser steps: gradient
    accumulation and a resumed run need nothing more. With `load_best_model_at_end` the run ends in a
    UserError if the best checkpoint was saved at beta > 0: its weights belong to a non-linear adapter and
    can't be used at beta = 0. The refusal comes before the checkpoint is loaded, so the model keeps the
    weights of the last step.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        names = {name for layer, name, _ in _annealed_adapters(model) if name in layer.active_adapters}
        if not names:
            raise UserError("AnnealingCallback found no active AFA-LoRA adapter: add one with an AfaLoraConfig first")
        for name in names:
            set_annealing_step(model, state.global_step, state.max_steps, name)

    # One more optimiser step (not micro-batch) is done: the same computation with the new number.
    on_step_end = on_train_begin

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "train_runtime" in kwargs.get("logs", {}):  # the last entry before the best checkpoint is loaded
            self.on_train_end(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        for path in Path(state.best_model_checkpoint).rglob("adapter_config.json"):
            config = json.loads(path.read_text())
            if config.get("peft_type") == "AFA_LORA":
                first = zero_step(config["total_steps"], config["decay_ratio"])
                raise UserError(
                    f"load_best_model_at_end would load {state.best_model_checkpoint}, saved at step "
                    f"{config['step']} with beta {config['beta']:.4g}, a non-linear adapter: turn it off, or "
                    f"evaluate from step {first} on only"
                )
