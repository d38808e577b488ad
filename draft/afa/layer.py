"""AFA-LoRA's annealing schedule and configuration, and the layer that PEFT puts in the place of an nn.Linear.

beta, the weight of the adapter's non-linear branch, falls from 1 to 0 during training.

PEFT has no public way to do this: LoRA variants, `_register_custom_module` and `LoraModel._create_and_replace`, which
importing this module wraps, are its own affairs. Hence the bounds `peft>=0.21.2,<0.22` in pyproject.toml.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from afa_kernels import ACTIVATIONS, KernelsError, afa_lora_linear, annealed_lora, canonical_placement, fall_back
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


# Initialisations with B = 0 (or none), so that the adapter starts as no change whatever beta is. The others
# (pissa, olora, corda...) take B A out of the base weight, which only a linear adapter gives back.
INITIALISATIONS = (True, False, "gaussian", "eva")
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NOT_SUPPORTED = ("lora_bias", "fan_in_fan_out", "target_parameters", "use_qalora")


@dataclass
class AfaLoraConfig(LoraConfig):
    """A LoRA adapter whose activation is annealed away. Takes all of LoraConfig's arguments and these.

    Args:
        activation: silu, gelu (erf), relu or tanh. relu after B (placements that end in s) has no gradient in
            the very first step, where B = 0 and beta = 1; it moves from the second step on, since beta is
            below 1 then.
        placement: A-s-B, s-A-B, s-A-B-s, s-A-s-B or s-A-s-B-s; σ may stand for s.
        schedule: linear, cosine or exponential (see `beta_at`).
        decay_ratio: the share of the optimiser steps, in (0, 1], after which beta is exactly 0.
        beta: the weight of the non-linear branch, in [0, 1]; follows from step and total_steps once there is
            a total.
        step: optimiser steps done so far.
        total_steps: optimiser steps in all; 0 until training sets it.

    Raises UserError for a value outside of these, and for options of LoraConfig that AFA-LoRA doesn't have
    (other LoRA variants such as DoRA, lora_bias, initialisations that change the base weight).
    """

    # PEFT finds a LoRA variant by a truthy field with this tag; the activation's name is always truthy.
    activation: str = field(default="silu", metadata={"is_lora_variant": True})
    placement: str = "A-s-B"
    schedule: str = "linear"
    decay_ratio: float = 0.3
    beta: float = 1.0
    step: int = 0
    total_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS:
            raise UserError(f"unknown activation {self.activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        try:
            self.placement = canonical_placement(self.placement)
        except ValueError as error:
            raise UserError(str(error)) from None
        variants = [f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")]
        for name in (*variants, *NOT_SUPPORTED):
            if getattr(self, name):
                raise UserError(f"AFA-LoRA has no {name} (given: {getattr(self, name)!r}): leave it out")
        if self.init_lora_weights not in INITIALISATIONS:
            raise UserError(
                f"init_lora_weights={self.init_lora_weights!r} changes the base weight, which only a linear "
                "adapter gives back: choose True, 'gaussian', 'eva' or False for AFA-LoRA"
            )
        beta_at(self.step, self.total_steps or 1, self.decay_ratio, self.schedule)  # checks the values
        if not 0 <= self.beta <= 1:
            raise UserError(f"beta is {self.beta}: choose a number from 0 to 1")
        if self.total_steps:
            self.anneal(self.step, self.total_steps)
        self._register_custom_module({nn.Linear: AfaLinear})

    def anneal(self, step: int, total_steps: int) -> None:
        """Set step, total_steps and the beta that follows. Layers that exist: see `set_annealing_step`."""
        self.beta = beta_at(step, total_steps, self.decay_ratio, self.schedule)
        self.step, self.total_steps = step, total_steps

    def to_dict(self) -> dict[str, Any]:
        """The content of adapter_config.json: at beta = 0 LoraConfig's keys only, as an ordinary LoRA adapter.

        At beta > 0 everything, under peft_type AFA_LORA, a name that plain PEFT doesn't know, so that it
        fails instead of using the adapter as a linear one.
        """
        everything = super().to_dict()
        if self.beta > 0:
            return everything | {"peft_type": "AFA_LORA"}
        plain = {f.name for f in dataclasses.fields(LoraConfig)}
        return {key: value for key, value in everything.items() if key in plain}


def set_annealing_step(model: nn.Module, step: int, total_steps: int, adapter_name: str | None = None) -> float:
    """Set beta after `step` of `total_steps` optimiser steps in every AFA layer and config of `model`.

    `adapter_name` limits it to one adapter; otherwise all AFA adapters follow, active or not. Returns the new
    beta (the largest, where adapters differ in schedule). Raises UserError when there is no such adapter, or
    for a step or total that `beta_at` refuses.
    """
    states = [state for _, name, state in annealed_adapters(model) if adapter_name in (None, name)]
    if not states:
        named = "" if adapter_name is None else f" named {adapter_name!r}"
        raise UserError(f"{type(model).__name__} has no AFA-LoRA adapter{named}: add one with an AfaLoraConfig")
    for state in states:
        state.config.anneal(step, total_steps)  # the layers share the config: harmless to repeat
        state.refresh()
    return max(state.config.beta for state in states)


def annealed_adapters(model: nn.Module) -> Iterator[tuple[Any, str, AfaVariant]]:
    """Yield (layer, adapter's name, state); PEFT keeps the state of a variant in `lora_variant`."""
    for layer in model.modules():
        for name, state in getattr(layer, "lora_variant", {}).items():
            if isinstance(state, AfaVariant):
                yield layer, name, state


class AfaVariant(LoraVariant):
    """One adapter's annealing state in one layer, with the steps at which PEFT calls a LoRA variant.

    beta is a tensor, so that a captured graph sees it change, but no buffer: PEFT saves buffers, and
    `.to(bfloat16)` would round it.
    """

    def __init__(self, config: AfaLoraConfig) -> None:
        self.config = config  # shared by all layers of the adapter
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

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to add: A and B are all there is."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        # PEFT's own loop (a plain adapter beside this one, or adapter_names) cast x to A's dtype: undo it.
        return result + module.afa_delta(active_adapter, x.to(module.get_base_layer().weight.dtype))

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        module.annealed[active_adapter].refuse_unless_linear(active_adapter)
        return (as_float64(orig_weight) + delta_float64(module, active_adapter)).to(orig_weight)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data.copy_(AfaVariant.merge_safe(module, active_adapter, orig_weight))

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (as_float64(orig_weight) - delta_float64(module, active_adapter)).to(orig_weight)


class AfaLinear(lora.Linear):
    """PEFT's LoRA layer over a plain nn.Linear, which may hold AFA-LoRA and plain LoRA adapters side by side.

    AFA adapters take x as it comes: A and B are cast to x's dtype. Everything else (plain adapters, disabled
    or merged ones, `adapter_names`) goes PEFT's way.
    """

    @property
    def annealed(self) -> dict[str, AfaVariant]:
        """The AFA adapters of this layer by name; the plain ones are not in it."""
        return {name: v for name, v in self.lora_variant.items() if isinstance(v, AfaVariant)}

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        if isinstance(config, AfaLoraConfig):
            return AfaVariant(config)
        return super().resolve_lora_variant(config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # [..., in] -> [..., out]
        active, annealed = active_present(self), self.annealed
        all_annealed = all(name in annealed for name in active)
        mixed_batch = kwargs.get("adapter_names") is not None
        if self.disable_adapters or self.merged or mixed_batch or not all_annealed:
            return super().forward(x, *args, **kwargs)
        if len(active) == 1:
            try:
                fused = self._fused(active[0], x)
            except KernelsError as error:  # AFA_KERNELS requests the impossible
                raise UserError(str(error)) from None
            if fused is not None:
                return fused
        for key in (*VARIANT_KWARG_KEYS, "adapter_names"):  # meant for adapters, not for the base layer
            kwargs.pop(key, None)
        result = cast(nn.Linear, self.base_layer)(x, *args, **kwargs)
        for name in active:
            result = result + self.afa_delta(name, x)
        return result

    def _fused(self, name: str, x: Tensor) -> Tensor | None:
        """Base layer and adapter in one; None for a layer that has to be computed in two."""
        variant, base = self.annealed[name], cast(nn.Linear, self.base_layer)
        if variant.config.placement != "A-s-B" or not is_bare(base):
            return None
        dropout = self.lora_dropout[name]
        if self.training and not isinstance(dropout, nn.Identity):
            fall_back(f"LoRA dropout is {cast(nn.Dropout, dropout).p:g}, and they have none", x.device.type)
            return None
        weights = lora_weights(self, name)
        return afa_lora_linear(x, base.weight, base.bias, *weights, **self._arithmetic(name, x.device))

    def _arithmetic(self, name: str, device: torch.device) -> dict[str, Any]:
        variant = self.annealed[name]
        activation = variant.config.activation
        return {"beta": variant.beta_on(device), "scaling": self.scaling[name], "activation": activation}

    def afa_delta(self, name: str, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        """The output of AFA adapter `name`, which is added to the base layer's, in x's dtype."""
        variant = self.annealed[name]
        weight_a, weight_b = lora_weights(self, name)
        x = self.lora_dropout[name](x)
        if variant.is_linear:  # no activation left: the same products as a plain adapter
            return self.scaling[name] * F.linear(F.linear(x, weight_a.to(x.dtype)), weight_b.to(x.dtype))
        placement = variant.config.placement
        return annealed_lora(x, weight_a, weight_b, placement=placement, **self._arithmetic(name, x.device))

    def get_delta_weight(self, adapter: str) -> Tensor:  # [out, in]
        """The matrix that the adapter is at beta = 0, in B's dtype; UserError while beta is above 0."""
        if adapter not in self.annealed:
            return super().get_delta_weight(adapter)
        self.annealed[adapter].refuse_unless_linear(adapter)
        return delta_float64(self, adapter).to(lora_weights(self, adapter)[1])


def is_bare(layer: nn.Module) -> bool:
    """True for a layer whose call does nothing but its product, so that a fused one may take its place.

    Hooks (offloading, profiling, capture of hidden states) and a replaced forward want to see the call.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and not any(hooks) and "forward" not in vars(layer)


def as_float64(tensor: Tensor) -> Tensor:
    """The values in float64, detached; on the CPU where the device has no float64."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def active_present(layer: lora.Linear) -> list[str]:
    """The active adapters that this layer has (another adapter may target other layers)."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def lora_weights(layer: lora.Linear, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of adapter `name`."""
    return cast(nn.Linear, layer.lora_A[name]).weight, cast(nn.Linear, layer.lora_B[name]).weight


def delta_float64(layer: lora.Linear, name: str) -> Tensor:  # [out, in]
    """scaling * B A of adapter `name`, in float64."""
    weight_a, weight_b = lora_weights(layer, name)
    return layer.scaling[name] * (as_float64(weight_b) @ as_float64(weight_a))


def check_plain_linear(layer: nn.Module, name: str) -> None:
    """Refuse, naming layer and type, all but an nn.Linear with ordinary float weights."""
    weight = getattr(layer, "weight", None)
    ordinary = isinstance(weight, Tensor) and type(weight.data) is Tensor and weight.dtype in FLOAT_DTYPES
    if type(layer) is nn.Linear and ordinary:
        return
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if isinstance(weight, Tensor) and not ordinary:
        kind += f" with a weight of {type(weight.data).__name__} {weight.dtype}"
    raise UserError(
        f"AFA-LoRA adapts plain nn.Linear layers only, and {name!r} is {kind}: take it out of target_modules"
    )


_peft_create_and_replace = lora.LoraModel._create_and_replace


def _create_and_replace(
    self: Any, config: LoraConfig, adapter_name: str, target: Any, *place: Any, current_key: str, **options: Any
) -> None:
    """PEFT's step for one target, after two things that it has no hook for on existing LoRA layers.

    A target that AFA-LoRA can't adapt is refused by name (some quantised layers would silently make it a
    plain adapter), and a layer that a plain LoRA adapter made earlier becomes an AfaLinear, which it equals
    for that adapter.
    """
    if isinstance(config, AfaLoraConfig):
        if parameter_name := options.get("parameter_name"):
            raise UserError(
                f"AFA-LoRA adapts plain nn.Linear layers only, and {parameter_name!r} of {current_key!r} is "
                f"a bare parameter of {type(target).__qualname__} (fused experts): take it out of the targets"
            )
        check_plain_linear(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target, current_key)
        if type(target) is lora.Linear:
            target.__class__ = AfaLinear
    _peft_create_and_replace(self, config, adapter_name, target, *place, current_key=current_key, **options)  # type: ignore[misc]


lora.LoraModel._create_and_replace = _create_and_replace  # type: ignore[method-assign,assignment]
