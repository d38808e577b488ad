"""AFA-LoRA adapters on a module, off it again as plain weights, out of a file, and under transformers.Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import TrainerCallback

from draft.afa.layer import (
    FLOAT_DTYPES,
    AfaLoraConfig,
    AfaVariant,
    active_present,
    annealed_adapters,
    as_float64,
    delta_float64,
    lora_weights,
    set_annealing_step,
    zero_step,
)
from draft.errors import UserError
from draft.files import read_json, read_tensors

CONFIG_CLASSES: dict[str, type[LoraConfig]] = {"AFA_LORA": AfaLoraConfig, "LORA": LoraConfig}


def add_adapter(module: nn.Module, config: LoraConfig, adapter_name: str = "default") -> PeftModel:
    """Put an AFA-LoRA or plain LoRA adapter on any nn.Module whose named children include nn.Linear layers.

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
    """Add the active adapters to their base weights and take the LoRA layers out again.

    `model` is a PeftModel or a module with injected LoRA layers, AFA-LoRA (at beta = 0) and plain ones alike.
    Returns the module that the adapter was put on, changed in place: plain nn.Linear layers, the parameter
    names it had before, still frozen. W + scaling * B A is computed in float64 and rounded once to W's dtype.

    Modules that were trained as a whole (`modules_to_save`) take the place of those that they were copied from.

    Raises UserError, before anything is changed, while an adapter's beta is above 0 (naming the step where it
    is 0), and for layers that hold anything but LoRA on a plain nn.Linear.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    if not layers:
        raise UserError(f"this {type(base).__name__} has no adapter to merge: train or load one first")
    _check_mergeable(base, layers)
    for name, layer in layers.items():
        assert isinstance(layer, lora.Linear)
        linear = cast(nn.Linear, layer.get_base_layer())
        weight = as_float64(linear.weight)  # [out, in]
        for adapter in active_present(layer):
            weight = weight + delta_float64(layer, adapter)
        linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=linear.weight.requires_grad)
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, linear)
    for name, wrapper in [item for item in base.named_modules() if isinstance(item[1], ModulesToSaveWrapper)]:
        trained = [wrapper.modules_to_save[name] for name in wrapper.active_adapters if name in wrapper.modules_to_save]
        kept = (trained or [wrapper.original_module])[0]
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, kept.requires_grad_(False))
    if hasattr(base, "peft_config"):
        del base.peft_config  # PEFT's mark on a module that has adapters
    return base


def _check_mergeable(base: nn.Module, layers: dict[str, BaseTunerLayer]) -> None:
    """Refuse all but LoRA over a plain, untied nn.Linear, with adapters that are matrices."""
    for name, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise UserError(f"some tokens of {name!r} were trained (trainable_token_indices): merge it with PEFT")
        if isinstance(module, ModulesToSaveWrapper) and not all(p.isfinite().all() for p in module.parameters()):
            raise UserError(f"{name!r}, trained as a whole, holds NaN or infinity: train it with a lower rate")
    names_of: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
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
            variant = layer.lora_variant.get(adapter)
            if isinstance(variant, AfaVariant):
                variant.refuse_unless_linear(adapter)
            elif variant or layer.lora_bias[adapter]:
                raise UserError(f"adapter {adapter!r} of {name!r} is no plain LoRA adapter: merge it with PEFT")
            if not all(torch.isfinite(weight).all() for weight in lora_weights(layer, adapter)):
                raise UserError(f"adapter {adapter!r} of {name!r} holds NaN or infinity: train it with a lower rate")


def load_afa_adapter(
    model: nn.Module, path: str | Path, adapter_name: str = "default", is_trainable: bool = True
) -> PeftModel:
    """Put a saved adapter on `model` (as `add_adapter` does), with its beta, step and total.

    `path` is a folder that `PeftModel.save_pretrained` wrote, at any beta; one saved at beta = 0 is a plain
    LoRA adapter and is loaded as that. Raises UserError for a missing or damaged file, another kind of
    adapter, and missing, unexpected or misshapen tensors.
    """
    folder = Path(path)
    values = read_json(folder / "adapter_config.json")
    kind = values.get("peft_type")
    if kind not in CONFIG_CLASSES:
        known = " or ".join(CONFIG_CLASSES)
        raise UserError(f"the adapter in {folder} is of type {kind!r}: give an adapter of type {known}")
    try:
        config = CONFIG_CLASSES[kind](**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder} was written by another version ({error}): save it again with this one") from error
    config.inference_mode = not is_trainable
    tensors = read_tensors(folder / "adapter_model.safetensors")
    for key, value in tensors.items():
        if value.dtype not in FLOAT_DTYPES:
            raise UserError(f"the adapter in {folder} has {key} of {value.dtype}, no plain float: save it again")
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


class AnnealingCallback(TrainerCallback):
    """Keeps beta of the active AFA-LoRA adapters in step with transformers.Trainer (and TRL's trainers).

    beta is computed from `state.global_step` and `state.max_steps`, which count optimiser steps: gradient
    accumulation and a resumed run need nothing more. With `load_best_model_at_end` the run ends in a
    UserError if the best checkpoint was saved at beta > 0: its weights belong to a non-linear adapter and
    can't be used at beta = 0. The refusal comes before the checkpoint is loaded, so the model keeps the
    weights of the last step.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        names = {name for layer, name, _ in annealed_adapters(model) if name in layer.active_adapters}
        if not names:
            raise UserError("AnnealingCallback found no active AFA-LoRA adapter: add one with an AfaLoraConfig first")
        for name in names:
            set_annealing_step(model, state.global_step, state.max_steps, name)

    # One more optimiser step (not micro-batch) is done: the same computation with the new number.
    on_step_end = on_train_begin

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "train_runtime" in kwargs.get("logs", {}):  # the last entry before the best checkpoint is loaded
            self.on_train_end(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        for path in Path(state.best_model_checkpoint).rglob("adapter_config.json"):
            config = read_json(path)
            if config.get("peft_type") == "AFA_LORA":
                first = zero_step(config["total_steps"], config["decay_ratio"])
                raise UserError(
                    f"load_best_model_at_end would load {state.best_model_checkpoint}, saved at step "
                    f"{config['step']} with beta {config['beta']:.4g}, a non-linear adapter: turn it off, or "
                    f"evaluate from step {first} on only"
                )
