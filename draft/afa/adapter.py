"""AFA-LoRA (arXiv 2512.22455) as a variant of PEFT's LoRA: an adapter that learns non-linear and ends as a
matrix.

    config = AfaLoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    model = add_adapter(model, config)                   # or peft.get_peft_model, or model.add_adapter
    Trainer(model, ..., callbacks=[AnnealingCallback()]).train()
    merged = merge_adapter(model)

A loop of one's own calls `set_annealing_step(model, step, total_steps)` before the first step and after every
optimiser step instead of the callback. `PeftModel.save_pretrained` writes an ordinary LoRA adapter at beta =
0 and one that only `load_afa_adapter` opens at beta > 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import draft.afa.peft_hook  # noqa: F401 (imported for what it does to PEFT)
from draft.afa.layer import (
    AfaLinear,
    AfaLoraConfig,
    AfaVariant,
    active_present,
    as_float64,
    delta_float64,
    lora_weights,
)
from draft.afa.schedule import SCHEDULES, beta_at, zero_step
from draft.errors import UserError

__all__ = [
    "SCHEDULES",
    "AfaLinear",
    "AfaLoraConfig",
    "AnnealingCallback",
    "add_adapter",
    "beta_at",
    "load_afa_adapter",
    "merge_adapter",
    "set_annealing_step",
    "zero_step",
]

CONFIG_CLASSES: dict[str, type[LoraConfig]] = {"AFA_LORA": AfaLoraConfig, "LORA": LoraConfig}


def set_annealing_step(model: nn.Module, step: int, total_steps: int, adapter_name: str | None = None) -> float:
    """Sets beta after `step` of `total_steps` optimiser steps in every AFA layer and config of `model`.

    `adapter_name` limits it to one adapter; otherwise all AFA adapters follow, active or not. Returns the new
    beta (the largest, where adapters differ in schedule). Raises UserError when there is no such adapter, or
    for a step or total that `beta_at` refuses.
    """
    variants = [variant for _, name, variant in _annealed_adapters(model) if adapter_name in (None, name)]
    if not variants:
        named = "" if adapter_name is None else f" named {adapter_name!r}"
        raise UserError(f"{type(model).__name__} has no AFA-LoRA adapter{named}: add one with an AfaLoraConfig")
    for variant in variants:
        variant.config.anneal(step, total_steps)  # the layers share the config: harmless to repeat
        variant.refresh()
    return max(variant.config.beta for variant in variants)


def _annealed_adapters(model: nn.Module) -> Iterator[tuple[AfaLinear, str, AfaVariant]]:
    for layer in model.modules():
        if isinstance(layer, AfaLinear):
            for name, variant in layer.annealed.items():
                yield layer, name, variant


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
            _refuse_annealed_best(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_annealed_best(args, state)


def _refuse_annealed_best(args: TrainingArguments, state: TrainerState) -> None:
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


def add_adapter(module: nn.Module, config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """Puts an AFA-LoRA or plain LoRA adapter on any nn.Module whose named children include nn.Linear layers.

    `module` is changed in place: the targeted layers become LoRA layers, everything but A and B is frozen,
    and A and B are fp32 where the weights are half precision. The PeftModel that is returned wraps it for
    `save_pretrained`; `module` itself stays usable under its own class and methods (it is
    `peft_model.get_base_model()`). Parameters are named `<layer>.lora_A.<adapter_name>.weight` and
    `<layer>.base_layer.weight` in `module`, with the prefix `base_model.model.` in the PeftModel and in the
    saved file. Given a PeftModel, the adapter joins the others and is not active until `set_adapter`.

    Raises UserError for a target that names no layer or that AFA-LoRA can't adapt.
    """
    base = module.get_base_model() if isinstance(module, PeftModel) else module
    if isinstance(config.target_modules, set):
        names = [name for name, _ in base.named_modules()]
        linear = sorted({name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, nn.Linear)})
        for target in sorted(config.target_modules):
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise UserError(f"no layer is named {target!r}: choose targets from {', '.join(linear)}")
    try:
        if not isinstance(module, PeftModel):
            return get_peft_model(module, config, adapter_name=adapter_name)
        if adapter_name in module.peft_config:
            raise UserError(f"there is an adapter named {adapter_name!r} already: choose another name")
        module.add_adapter(adapter_name, config)
        return module
    except ValueError as error:  # PEFT's word for a wrong option or a target that it does not find
        raise UserError(f"the adapter does not fit {type(base).__name__}: {error}") from error


def merge_adapter(model: nn.Module) -> nn.Module:
    """Adds the active adapters to their base weights and takes the LoRA layers out again.

    `model` is a PeftModel or a module with injected LoRA layers, AFA-LoRA (at beta = 0) and plain ones alike.
    Returns the module that the adapter was put on, changed in place: plain nn.Linear layers, the parameter
    names it had before, still frozen. W + scaling * B A is computed in float64 and rounded once to W's dtype.

    Raises UserError, before anything is changed, while an adapter's beta is above 0 (naming the step where it
    is 0), and for layers that hold anything but LoRA on a plain nn.Linear.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    if not layers:
        raise UserError(f"this {type(base).__name__} has no adapter to merge: train or load one first")
    for name, layer in _checked(base, layers).items():
        linear = cast(nn.Linear, layer.get_base_layer())
        weight = as_float64(linear.weight)  # [out, in]
        for adapter in active_present(layer):
            weight = weight + delta_float64(layer, adapter)
        linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=linear.weight.requires_grad)
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, linear)
    if hasattr(base, "peft_config"):
        del base.peft_config  # PEFT's mark on a module that has adapters
    return base


def _checked(base: nn.Module, layers: dict[str, BaseTunerLayer]) -> dict[str, lora.Linear]:
    """The same layers, known to be LoRA over a plain, untied nn.Linear, with adapters that are matrices."""
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise UserError(f"{name!r} was trained as a whole (modules_to_save): use PEFT's merge_and_unload")
    names_of: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    checked: dict[str, lora.Linear] = {}
    for name, layer in layers.items():
        linear = layer.get_base_layer()
        if not isinstance(layer, lora.Linear) or type(linear) is not nn.Linear:
            raise UserError(f"{name!r} is {type(layer).__qualname__}, not LoRA on nn.Linear: merge it with PEFT")
        if layer.merged:
            raise UserError(f"{name!r} holds a merged adapter already: call unmerge_adapter first")
        tied = names_of[id(linear.weight)]
        if len(tied) > 1:
            raise UserError(f"{' and '.join(tied)} are one tied weight: untie them before merging")
        for adapter in active_present(layer):
            _check_adapter(layer, name, adapter)
        checked[name] = layer
    return checked


def _check_adapter(layer: lora.Linear, name: str, adapter: str) -> None:
    variant = layer.lora_variant.get(adapter)
    if isinstance(variant, AfaVariant):
        variant.refuse_unless_linear(adapter)
    elif variant or layer.lora_bias[adapter]:
        raise UserError(f"adapter {adapter!r} of {name!r} is no plain LoRA adapter: merge it with PEFT")
    for weight in lora_weights(layer, adapter):
        if not torch.isfinite(weight).all():
            raise UserError(f"adapter {adapter!r} of {name!r} holds NaN or infinity: train it with a lower rate")


def load_afa_adapter(
    model: nn.Module, path: str | Path, adapter_name: str = "default", is_trainable: bool = True
) -> PeftModel:
    """Puts a saved adapter on `model` (as `add_adapter` does), with its beta, step and total.

    `path` is a folder that `PeftModel.save_pretrained` wrote, at any beta; one saved at beta = 0 is a plain
    LoRA adapter and is loaded as that. Raises UserError for a missing or damaged file, another kind of
    adapter, and missing, unexpected or misshapen tensors.
    """
    folder = Path(path)
    config = _read_config(folder / "adapter_config.json")
    config.inference_mode = not is_trainable
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'adapter_model.safetensors'} can't be read ({error}): save it again") from error
    peft_model = add_adapter(model, config, adapter_name)
    try:
        result: Any = set_peft_model_state_dict(peft_model, tensors, adapter_name=adapter_name)
    except RuntimeError as error:  # load_state_dict's word for tensors of another shape
        raise UserError(f"the adapter in {folder} does not fit this model: {error}") from error
    missing = [key for key in result.missing_keys if f".{adapter_name}." in key]
    for problem, keys in (("has no", missing), ("has an unexpected", result.unexpected_keys)):
        if keys:
            raise UserError(f"the adapter in {folder} {problem} {keys[0]}: load it onto the model it was trained on")
    return peft_model


def _read_config(path: Path) -> LoraConfig:
    try:
        values = json.loads(path.read_text())
        config_class = CONFIG_CLASSES[values.get("peft_type")]
        return config_class(**values)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): give the folder of a saved adapter") from error
    except KeyError:
        kinds = " or ".join(CONFIG_CLASSES)
        raise UserError(f"{path} is of type {values.get('peft_type')!r}: give an adapter of type {kinds}") from None
    except TypeError as error:
        raise UserError(f"{path} was written by another version ({error}): save it again with this one") from error
