"""The model of a run: a new head out of its target's own weights, or a base head with what is trained on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from draft.afa import AfaLoraConfig, add_adapter
from draft.checkpoint import check_fits, load_head
from draft.errors import UserError
from draft.heads import Eagle3Config, Eagle3Head
from draft.target import Target
from draft.training.config import AdapterSettings, RunSettings
from draft.training.features import Features
from draft.training.initial import initialise


def new_head(target: Target, vocabulary: Tensor, batches: Iterable[tuple[Features, Tensor]], seed: int) -> Eagle3Head:
    """A head that starts from what the target knows (see `draft.training.initial`).

    vocabulary: sorted target ids [draft_vocab]; batches: (features, attention mask) of some training rows.
    """
    head = Eagle3Head(Eagle3Config.for_target(target, len(vocabulary)))
    head.set_vocabulary(vocabulary.cpu())
    head.to(target.device, master_dtype(target))
    initialise(head, target, batches, seed)
    return head


def load_base_head(settings: RunSettings, target: Target) -> tuple[Eagle3Head, dict[str, Any]]:
    """The head to start from, checked against the target; float32 masters, or the target's dtype under an adapter."""
    assert settings.model.head is not None
    head, about = load_head(settings.model.head, device=target.device)
    check_fits(head, {} if settings.model.other_target else about, target)
    return head.to(target.dtype if settings.method != "full" else master_dtype(target)), about


def with_vocabulary(head: Eagle3Head, target: Target, vocabulary: Tensor) -> Eagle3Head:
    """The same head over another draft vocabulary: known tokens keep their LM head rows, new ones get the target's.

    vocabulary: sorted target ids [draft_vocab].
    """
    vocabulary = vocabulary.to(head.d2t.device)
    result = Eagle3Head(replace(head.config, draft_vocab_size=len(vocabulary), shared_lm_head=False))
    assert result.lm_head is not None
    result.to(head.d2t.device, head.fc.weight.dtype).set_vocabulary(vocabulary)
    weights = {name: value for name, value in head.state_dict().items() if name not in ("lm_head.weight", "d2t", "t2d")}
    result.load_state_dict(weights, strict=False)
    rows = target.lm_head.weight.detach().to(head.fc.weight, copy=True)  # [vocab, hidden]
    if head.lm_head is not None:
        rows[head.vocabulary] = head.lm_head.weight.detach()
    with torch.no_grad():
        result.lm_head.weight.copy_(rows[vocabulary])
    return result


def master_dtype(target: Target) -> torch.dtype:
    """Trained weights are kept in at least float32."""
    return torch.promote_types(torch.float32, target.dtype)


def autocast(target: Target, settings: RunSettings) -> torch.autocast:
    """Full training keeps float32 masters under autocast; adapters run at their base weights' dtype without it."""
    half = target.dtype == torch.bfloat16 and settings.method == "full"
    return torch.autocast(target.device.type, torch.bfloat16, enabled=half)


def adapter_config(settings: AdapterSettings) -> LoraConfig:
    """PEFT's configuration of the adapter that the settings describe."""
    common: dict[str, Any] = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": list(settings.targets),
    }
    if settings.method == "lora":
        return LoraConfig(**common)
    return AfaLoraConfig(
        **common,
        activation=settings.activation,
        placement=settings.placement,
        decay_ratio=settings.decay_ratio,
        schedule=settings.schedule,
    )


def make_trainable(head: Eagle3Head, settings: RunSettings) -> tuple[Eagle3Head, nn.Module]:
    """Mark what the run trains.

    Returns:
        the head that computes, and the module that saves itself: the head, or the PeftModel around it.
    """
    if settings.method == "full":
        return head.requires_grad_(True), head
    torch.manual_seed(settings.training.seed)  # PEFT draws A from the global generator
    peft_model = add_adapter(head, adapter_config(settings.adapter))
    if not any(parameter.requires_grad for parameter in head.parameters()):
        raise UserError(f"targets {settings.adapter.targets} match no layer of the head; nothing would be trained.")
    return head, peft_model
