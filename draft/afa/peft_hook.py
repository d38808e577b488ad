"""Which layers AFA-LoRA can adapt, asked at the one place where PEFT puts an adapter on a layer.

Importing this module wraps `LoraModel._create_and_replace`; `draft.afa` does so. Plain LoRA goes through
unchanged.
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from draft.afa.layer import AfaLinear, AfaLoraConfig
from draft.errors import UserError

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_plain_linear(layer: nn.Module, name: str) -> None:
    """Raises UserError, naming layer and type, unless `layer` is an nn.Linear with ordinary float weights."""
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
    self: lora.LoraModel,
    lora_config: LoraConfig,
    adapter_name: str,
    target: nn.Module,
    target_name: str,
    parent: nn.Module,
    current_key: str,
    *,
    parameter_name: str | None = None,
) -> None:
    """PEFT's step for one target, after two things that it has no hook for on existing LoRA layers.

    A target that AFA-LoRA can't adapt is refused by name (some quantised layers would silently make it a
    plain adapter), and a layer that a plain LoRA adapter made earlier becomes an AfaLinear, which it equals
    for that adapter.
    """
    if isinstance(lora_config, AfaLoraConfig):
        if parameter_name is not None:
            raise UserError(
                f"AFA-LoRA adapts plain nn.Linear layers only, and {parameter_name!r} of {current_key!r} is "
                f"a bare parameter of {type(target).__qualname__} (fused experts): take it out of the targets"
            )
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        check_plain_linear(base, current_key)
        if type(target) is lora.Linear:
            target.__class__ = AfaLinear
    where = (target, target_name, parent, current_key)
    _peft_create_and_replace(self, lora_config, adapter_name, *where, parameter_name=parameter_name)


lora.LoraModel._create_and_replace = _create_and_replace  # type: ignore[method-assign]
