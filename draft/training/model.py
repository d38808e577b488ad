"""What a run starts from, and what is written down about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from torch import Tensor, nn

from draft.afa import AfaLoraConfig, add_adapter
from draft.data.dataset import Row, coverage, draft_vocabulary
from draft.errors import UserError
from draft.evaluation.trained_rows import record_trained_rows
from draft.files import provenance
from draft.heads import DraftHead
from draft.heads.base import Features
from draft.heads.checkpoint import attach_head, head_sha256, load_head
from draft.heads.registry import ARCHITECTURES
from draft.target import Target
from draft.training.config import DRAFT_STEPS, DRAFT_VOCABULARY, AdapterSettings, ModelSettings, RunSettings
from draft.training.loss import Objective


def starting_head(
    settings: RunSettings,
    target: Target,
    rows: list[Row],
    console: Console,
) -> tuple[Any, dict[str, Any]]:
    """The head of `--head` with its draftsmith.json, or a new one, whose first weights are not solved yet."""
    if settings.model.head:
        head, about = load_base_head(settings, target)
        if settings.model.rebuild_vocabulary:
            head = with_vocabulary(head, target, _vocabulary(settings, target, rows))
        share = coverage(rows, head.vocabulary.cpu())
        console.print(f"The head's vocabulary covers {share:.1%} of the tokens that are trained on.")
        if share < 0.95:
            console.print(
                f"Warning: {1 - share:.1%} of this domain's tokens can never be drafted with this head; "
                "a head pretrained on this domain would know them.",
                style="yellow",
            )
        return head, about
    return blank_head(target, _vocabulary(settings, target, rows), settings.model), {}


def _vocabulary(settings: RunSettings, target: Target, rows: list[Row]) -> Tensor:
    size = vocabulary_size(settings.model, target)
    return draft_vocabulary(rows, size, target.vocab_size, sorted(target.eos_token_ids))


def about_run(settings: RunSettings, target: Target, rows: list[Row], base: dict[str, Any]) -> dict[str, Any]:
    """What a head's draftsmith.json says of the run; base: that of the head it started from."""
    return {
        "target": settings.model.target,
        "target_adapter": settings.model.target_adapter,
        "target_fingerprint": target.fingerprint,
        "mode": settings.mode,
        "method": settings.method,
        "base_head": settings.model.head and Path(settings.model.head).name,
        "base_head_sha256": settings.model.head and head_sha256(settings.model.head),
        "tokens": sum(len(row.ids) for row in rows),
        "trained_tokens": sum(sum(row.mask) for row in rows),
        "trained_rows": record_trained_rows(rows, base),
        **provenance(),
    }


# The model of a run: a new head out of its target's own weights, or a base head with what is trained on it.


def blank_head(target: Target, vocabulary: Tensor, model: ModelSettings) -> DraftHead:
    """A head of the architecture and options that `model` names, with weights that nobody has thought about yet.

    vocabulary: sorted target ids [draft_vocab].
    """
    architecture = ARCHITECTURES[model.new_architecture]
    head = architecture(architecture.config_class.for_target(target, len(vocabulary), **model.options()))
    head.set_vocabulary(vocabulary.cpu())
    head.use_target_lm_head(target)
    return head.to(target.device, master_dtype(target))


def initialise(head: DraftHead, target: Target, batches: Iterable[tuple[Features, Tensor]], seed: int) -> None:
    """Let a head start from what the target knows (see `draft.heads.initial`), in place.

    batches: (features of the head's layers, attention mask) of some training rows; none leave it as it is.
    """
    head.initialise(target, batches, seed)


def vocabulary_size(model: ModelSettings, target: Target) -> int:
    """Tokens that a new head drafts from."""
    reduced = ARCHITECTURES[model.new_architecture].reduced_vocabulary and not model.options().get("shared_lm_head")
    usual = min(DRAFT_VOCABULARY, target.vocab_size) if reduced else target.vocab_size
    return model.draft_vocab_size or usual  # what was asked for is not cut: `draft_vocabulary` refuses what is too much


def load_base_head(settings: RunSettings, target: Target) -> tuple[DraftHead, dict[str, Any]]:
    """The head to start from, checked against the target; float32 masters, or the target's dtype under an adapter."""
    assert settings.model.head is not None
    head, about = load_head(settings.model.head, device=target.device)
    found, wanted = head.architecture, settings.model.architecture
    if wanted not in (None, found):
        raise UserError(
            f"the head {settings.model.head!r} is of architecture {found}, not {wanted}; leave the flag out."
        )
    attach_head(head, {} if settings.model.other_target else about, target)
    return head.to(target.dtype if settings.method != "full" else master_dtype(target)), about


def with_vocabulary(head: DraftHead, target: Target, vocabulary: Tensor) -> DraftHead:
    """The same head over another draft vocabulary: known tokens keep their LM head rows, new ones get the target's.

    vocabulary: sorted target ids [draft_vocab].

    Raises:
        UserError: for an architecture whose vocabulary is always the target's.
    """
    if not head.reduced_vocabulary:
        raise UserError(
            f"rebuild_vocabulary: a head of architecture {head.architecture} drafts from the target's "
            "whole vocabulary; leave the flag out."
        )
    vocabulary = vocabulary.to(head.device)
    result = type(head)(replace(head.config, draft_vocab_size=len(vocabulary), shared_lm_head=False))
    result.to(head.device, head.dtype).set_vocabulary(vocabulary)
    lm_heads = {f"{name}.weight" for name in result.lm_head_modules}
    weights = {name: value for name, value in head.state_dict().items() if name not in {*lm_heads, "d2t", "t2d"}}
    result.load_state_dict(weights, strict=False)
    for name, lm_head in result.lm_head_modules.items():
        rows = target.lm_head.weight.detach().to(lm_head.weight, copy=True)  # [vocab, hidden]
        if name in head.lm_head_modules:
            rows[head.vocabulary] = head.lm_head_modules[name].weight.detach()
        with torch.no_grad():
            lm_head.weight.copy_(rows[vocabulary])
    return result


def settle(settings: RunSettings, head: DraftHead) -> Objective:
    """Fill in what the settings leave to the head's architecture, in place, and say what is minimised.

    Raises:
        UserError: for a value that the architecture has no use for.
    """
    training = settings.training
    settings.model.architecture = head.architecture
    settings.adapter.targets = settings.adapter.targets or list(head.adapter_targets)
    training.draft_steps = training.draft_steps or head.longest or DRAFT_STEPS
    if head.longest is not None and training.draft_steps > head.longest:
        raise UserError(
            f"draft_steps = {training.draft_steps}: the head drafts {head.longest} tokens at most; ask for fewer, "
            "or pretrain a head of more."
        )
    if head.feature_weight is None and training.feature_weight:
        raise UserError(
            f"feature_weight = {training.feature_weight}: a head of architecture {head.architecture} does not guess "
            "the target's states; leave the flag out."
        )
    if training.feature_weight is None:
        training.feature_weight = head.feature_weight or 0.0
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


# The learning rate: of each step, and of each parameter.


def parameter_groups(parameters: list[nn.Parameter], *, scaled: bool) -> list[dict[str, Any]]:
    """One group a parameter, with `scale`, its share of the learning rate.

    Adam moves every weight by about the rate, whatever its size. `fc` reads raw residual streams of large scale and has
    small weights: a rate that suits the other matrices would overwrite it in a few steps. So the share falls with the
    root mean square of the starting weights, below that of a common initialisation (0.02).
    """
    sizes = [float(parameter.detach().float().pow(2).mean().sqrt()) for parameter in parameters]
    return [
        # what starts at zero says nothing about its size
        {"params": [parameter], "scale": min(1.0, size / 0.02) if scaled and size else 1.0}
        for parameter, size in zip(parameters, sizes, strict=True)
    ]


def learning_rate_at(step: int, total_steps: int, settings: RunSettings) -> float:
    """The rate of the step after `step` steps: a linear rise, then a cosine to a tenth of the peak."""
    warmup = max(1, round(settings.training.warmup_ratio * total_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
