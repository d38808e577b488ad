"""The model of a run: a new head out of its target's own weights, or a base head with what is trained on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from draft.afa import AfaLoraConfig, add_adapter
from draft.checkpoint import check_fits, load_head
from draft.errors import UserError
from draft.heads import DraftHead
from draft.heads.registry import ARCHITECTURES, architecture_of
from draft.target import Target
from draft.training.config import DRAFT_STEPS, DRAFT_VOCABULARY, AdapterSettings, ModelSettings, RunSettings
from draft.training.features import Features
from draft.training.objective import Objective


def blank_head(target: Target, vocabulary: Tensor, model: ModelSettings) -> DraftHead:
    """A head of the architecture and options that `model` names, with weights that nobody has thought about yet.

    vocabulary: sorted target ids [draft_vocab].
    """
    architecture = ARCHITECTURES[model.new_architecture]
    head = architecture.head(architecture.config.for_target(target, len(vocabulary), **model.options()))
    head.set_vocabulary(vocabulary.cpu())
    head.borrow(target)
    return head.to(target.device, master_dtype(target))


def initialise(head: DraftHead, target: Target, batches: Iterable[tuple[Features, Tensor]], seed: int) -> None:
    """Let a head start from what the target knows (see `draft.training.initial`), in place.

    batches: (features of the head's layers, attention mask) of some training rows; none leave it as it is.
    """
    architecture_of(head).initialise(head, target, batches, seed)


def vocabulary_size(model: ModelSettings, target: Target) -> int:
    """Tokens that a new head drafts from."""
    reduced = ARCHITECTURES[model.new_architecture].reduced_vocabulary and not model.options().get("shared_lm_head")
    usual = min(DRAFT_VOCABULARY, target.vocab_size) if reduced else target.vocab_size
    return model.draft_vocab_size or usual  # what was asked for is not cut: `draft_vocabulary` refuses what is too much


def load_base_head(settings: RunSettings, target: Target) -> tuple[DraftHead, dict[str, Any]]:
    """The head to start from, checked against the target; float32 masters, or the target's dtype under an adapter."""
    assert settings.model.head is not None
    head, about = load_head(settings.model.head, device=target.device)
    found, wanted = architecture_of(head).name, settings.model.architecture
    if wanted not in (None, found):
        raise UserError(
            f"the head {settings.model.head!r} is of architecture {found}, not {wanted}; leave the flag out."
        )
    check_fits(head, {} if settings.model.other_target else about, target)
    return head.to(target.dtype if settings.method != "full" else master_dtype(target)), about


def with_vocabulary(head: DraftHead, target: Target, vocabulary: Tensor) -> DraftHead:
    """The same head over another draft vocabulary: known tokens keep their LM head rows, new ones get the target's.

    vocabulary: sorted target ids [draft_vocab].

    Raises:
        UserError: for an architecture whose vocabulary is always the target's.
    """
    architecture = architecture_of(head)
    if not architecture.reduced_vocabulary:
        raise UserError(
            f"rebuild_vocabulary: a head of architecture {architecture.name} drafts from the target's "
            "whole vocabulary; leave the flag out."
        )
    vocabulary = vocabulary.to(head.device)
    result = architecture.head(replace(head.config, draft_vocab_size=len(vocabulary), shared_lm_head=False))
    result.to(head.device, head.dtype).set_vocabulary(vocabulary)
    lm_heads = {f"{name}.weight" for name in result.own_lm_heads}
    weights = {name: value for name, value in head.state_dict().items() if name not in {*lm_heads, "d2t", "t2d"}}
    result.load_state_dict(weights, strict=False)
    for name, lm_head in result.own_lm_heads.items():
        rows = target.lm_head.weight.detach().to(lm_head.weight, copy=True)  # [vocab, hidden]
        if name in head.own_lm_heads:
            rows[head.vocabulary] = head.own_lm_heads[name].weight.detach()
        with torch.no_grad():
            lm_head.weight.copy_(rows[vocabulary])
    return result


def settle(settings: RunSettings, head: DraftHead) -> Objective:
    """Fill in what the settings leave to the head's architecture, in place, and say what is minimised.

    Raises:
        UserError: for a value that the architecture has no use for.
    """
    architecture, training = architecture_of(head), settings.training
    settings.model.architecture = architecture.name
    settings.adapter.targets = settings.adapter.targets or list(architecture.adapter_targets(head))
    training.draft_steps = training.draft_steps or head.longest or DRAFT_STEPS
    if head.longest is not None and training.draft_steps > head.longest:
        raise UserError(
            f"draft_steps = {training.draft_steps}: the head drafts {head.longest} tokens at most; ask for fewer, "
            "or pretrain a head of more."
        )
    if architecture.feature_weight is None and training.feature_weight:
        raise UserError(
            f"feature_weight = {training.feature_weight}: a head of architecture {architecture.name} does not guess "
            "the target's states; leave the flag out."
        )
    if training.feature_weight is None:
        training.feature_weight = architecture.feature_weight or 0.0
    return Objective(training.loss, training.draft_steps, training.step_decay, training.feature_weight)


def untrained(head: DraftHead, settings: RunSettings) -> Sequence[nn.Module]:
    """What the (settled) number of draft steps leaves as it is; DDP would wait for its gradients forever."""
    steps = settings.training.draft_steps
    return () if steps is None else head.beyond(steps)


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


def make_trainable(head: DraftHead, settings: RunSettings) -> tuple[DraftHead, nn.Module]:
    """Mark what the run trains.

    Returns:
        the head that computes, and the module that saves itself: the head, or the PeftModel around it.
    """
    saver: nn.Module = head.requires_grad_(True)
    if settings.method != "full":
        torch.manual_seed(settings.training.seed)  # PEFT draws A from the global generator
        saver = add_adapter(head, adapter_config(settings.adapter))
    for module in untrained(head, settings):
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in head.parameters()):
        raise UserError(f"targets {settings.adapter.targets} match no layer of the head; nothing would be trained.")
    return head, saver
