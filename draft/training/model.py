"""The head that a run starts from, and what is trained of it."""

from __future__ import annotations

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
from draft.evaluation.compare import record_trained_rows
from draft.files import provenance
from draft.heads import DraftHead
from draft.heads.checkpoint import attach_head, head_sha256, load_head
from draft.heads.registry import ARCHITECTURES
from draft.target import Target
from draft.training.config import DRAFT_STEPS, DRAFT_VOCABULARY, ModelSettings, RunSettings
from draft.training.loss import Objective


def starting_head(
    settings: RunSettings, target: Target, rows: list[Row], console: Console
) -> tuple[DraftHead, dict[str, Any]]:
    """The head of `--head` with its draftsmith.json, or a new one, whose first weights are not solved yet.

    Trained weights are kept in at least float32; under an adapter they are in the target's dtype.
    """
    model = settings.model
    if not model.head:
        return blank_head(target, _choose_vocabulary(model, target, rows), model), {}
    head, about = load_head(model.head, device=target.device)
    if model.architecture not in (None, head.architecture):
        raise UserError(
            f"{model.head!r} is of architecture {head.architecture}, not {model.architecture}; leave it out."
        )
    whole = head.reduced_vocabulary and head.config.full_vocabulary  # EAGLE-1's has no size: see `with_vocabulary`
    if whole and model.rebuild_vocabulary and not model.draft_vocab_size:
        raise UserError(
            f"rebuild_vocabulary: {model.head!r} has the whole vocabulary; leave it out, or give --draft-vocab-size, "
            "the number of tokens to keep."
        )
    attach_head(head, {} if model.other_target else about, target)
    head.to(target.dtype if settings.method != "full" else master_dtype(target))
    if model.rebuild_vocabulary:
        head = with_vocabulary(head, target, _choose_vocabulary(model, target, rows, head))
    share = coverage(rows, head.vocabulary.cpu())
    console.print(f"The head's vocabulary covers {share:.1%} of the tokens that are trained on.")
    if share < 0.95:
        console.print(
            f"Warning: {1 - share:.1%} of the tokens that are trained on can never be drafted with this head; "
            f"{'a larger --draft-vocab-size' if model.rebuild_vocabulary else '--rebuild-vocabulary (all weights)'} "
            "takes more of them in.",
            style="yellow",
        )
    return head, about


def _choose_vocabulary(model: ModelSettings, target: Target, rows: list[Row], head: DraftHead | None = None) -> Tensor:
    """Target ids [draft_vocab] that a head drafts from, as `draft_vocabulary` chooses them."""
    kept = head.vocabulary if head is not None and len(head.vocabulary) < target.vocab_size else None
    reduced = ARCHITECTURES[model.new_architecture].reduced_vocabulary and not model.options.get("shared_lm_head")
    usual = min(DRAFT_VOCABULARY, target.vocab_size) if reduced else target.vocab_size
    # a requested size is not cut: `draft_vocabulary` refuses one that is too large
    size = model.draft_vocab_size or (usual if kept is None else len(kept))
    return draft_vocabulary(rows, size, target.vocab_size, sorted(target.eos_token_ids), kept)


def blank_head(target: Target, vocabulary: Tensor, model: ModelSettings) -> DraftHead:
    """A head of the architecture and options that `model` names, with meaningless weights.

    vocabulary: sorted target ids [draft_vocab].
    """
    architecture = ARCHITECTURES[model.new_architecture]
    head = architecture(architecture.config_class.for_target(target, len(vocabulary), **model.options))
    head.set_vocabulary(vocabulary.cpu())
    head.use_target_lm_head(target)
    return head.to(target.device, master_dtype(target))


def with_vocabulary(head: DraftHead, target: Target, vocabulary: Tensor) -> DraftHead:
    """The same head over another draft vocabulary: known tokens keep their LM head rows, new ones get the target's.

    vocabulary: sorted target ids [draft_vocab].

    Raises:
        UserError: for an architecture whose vocabulary is always the target's.
    """
    if not head.reduced_vocabulary:
        raise UserError(f"rebuild_vocabulary: {head.architecture} heads have the whole vocabulary; leave it out.")
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
    """Fill in the settings that are left to the head's architecture, in place; returns what is minimised.

    Raises:
        UserError: for a value that the architecture has no use for.
    """
    training = settings.training
    settings.model.architecture = head.architecture
    settings.adapter.targets = settings.adapter.targets or list(head.adapter_targets)
    training.learning_rate = settings.learning_rate
    training.draft_steps = training.draft_steps or head.longest or DRAFT_STEPS
    if head.longest is not None and training.draft_steps > head.longest:
        raise UserError(f"draft_steps = {training.draft_steps}: the head drafts {head.longest} tokens; choose fewer.")
    if head.feature_weight is None and training.feature_weight:
        raise UserError(f"feature_weight: {head.architecture} does not predict the target's states; leave it out.")
    if training.feature_weight is None:
        training.feature_weight = head.feature_weight or 0.0
    return Objective(training.loss, training.draft_steps, training.step_decay, training.feature_weight)


def about_run(settings: RunSettings, target: Target, rows: list[Row], base: dict[str, Any]) -> dict[str, Any]:
    """The run's entries in a head's draftsmith.json; base: that of the head it started from."""
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


def master_dtype(target: Target) -> torch.dtype:
    """Trained weights are kept in at least float32."""
    return torch.promote_types(torch.float32, target.dtype)


def autocast(target: Target, settings: RunSettings) -> torch.autocast:
    """Full training keeps float32 masters under autocast; adapters run at their base weights' dtype without it."""
    half = target.dtype == torch.bfloat16 and settings.method == "full"
    return torch.autocast(target.device.type, torch.bfloat16, enabled=half)


def make_trainable(head: DraftHead, settings: RunSettings) -> tuple[DraftHead, nn.Module]:
    """Mark what the run trains.

    Returns:
        the head that computes, and the module that saves itself: the head, or the PeftModel around it.
    """
    adapter = settings.adapter
    saver: nn.Module = head.requires_grad_(True)
    if settings.method != "full":
        torch.manual_seed(settings.training.seed)  # PEFT draws A from the global generator
        config: dict[str, Any] = {"r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": [*adapter.targets]}
        annealed = {key: getattr(adapter, key) for key in ("activation", "placement", "decay_ratio", "schedule")}
        saver = add_adapter(
            head, LoraConfig(**config) if settings.method == "lora" else AfaLoraConfig(**config, **annealed)
        )
    if settings.training.freeze_lm_head:
        for lm_head in head.lm_head_modules.values():
            lm_head.requires_grad_(False)
    steps = settings.training.draft_steps
    for module in head.beyond(steps) if steps else ():  # DDP would wait for their gradients forever
        module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in head.parameters()):
        raise UserError(f"targets {adapter.targets} match no layer of the head; nothing would be trained.")
    return head, saver
