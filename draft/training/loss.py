"""The training loss of one batch: the chosen loss at every draft step, over the positions that are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from draft.data.examples import Batch
from draft.heads.base import DraftHead, Features
from draft.heads.unroll import shift_left
from draft.target import Target

POSITIONS_PER_CHUNK = 4096  # bounds the logits in memory: [chunk, vocab]


@dataclass(frozen=True)
class Objective:
    """How draft steps are weighed, and by which loss."""

    loss: str
    draft_steps: int
    step_decay: float
    feature_weight: float = 0.0  # of the smooth L1 distance between a state and the one that it stands for


def loss_sum(
    head: DraftHead, target: Target, batch: Batch, features: Features, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Loss summed over positions and weighted over draft steps, and the top-1 agreement with the target.

    With `feature_weight`, the smooth L1 distance (mean over the hidden size) of the states of step k at i to the
    target's last hidden state at i+1+k is added: an EAGLE-1 head is to predict that (SafeAILab's
    `eagle/train/main.py`).

    The caller divides by the trained positions of the whole optimiser step, so that accumulation and padding don't
    change the curve.

    Returns:
        a scalar, and [draft_steps, 2]: how often the head's first choice is the target's, and out of how many.
    """
    vocabulary = _vocabulary(head)
    entry = LOSSES[objective.loss]
    teacher_at = shift_left(batch.loss_mask)  # [batch, tokens]: the target predicts a trained token from here
    teacher_rows = torch.cumsum(teacher_at.flatten(), 0).sub_(1).view_as(teacher_at)
    with torch.no_grad():
        hidden = features.last_hidden[teacher_at]  # [positions, hidden]
        teacher = widened(target.logits(hidden, vocabulary))  # [positions, draft_vocab]
        mass = None if entry.renormalised else _log_mass(target, hidden, teacher)

    total = teacher.new_zeros(())
    agreement = []
    steps = head.unroll(
        features.embeds,
        features.auxiliary,
        objective.draft_steps,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
    )
    for k, states in enumerate(steps):
        chosen = batch.trained_ahead(2 + k)  # [batch, tokens]: x[i+2+k] is a trained token
        rows = shift_left(teacher_rows, 1 + k)[chosen]
        student = widened(head.logits(states[chosen], k))  # [positions at this step, draft_vocab]
        per_position = entry.function(student, teacher[rows], None if mass is None else mass[rows])
        if objective.feature_weight:
            distance = smooth_l1_loss(widened(states[chosen]), widened(hidden[rows]), reduction="none").mean(-1)
            per_position = per_position + objective.feature_weight * distance
        total = total + objective.step_decay**k * per_position.sum()
        with torch.no_grad():
            hits = (student.argmax(-1) == teacher[rows].argmax(-1)).sum()
            agreement.append(torch.stack([hits, torch.tensor(len(student), device=hits.device)]))
    return total, torch.stack(agreement)


def widened(values: Tensor) -> Tensor:
    """In at least float32: sums over a vocabulary need it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _log_mass(target: Target, hidden: Tensor, teacher: Tensor) -> Tensor:
    """log of the probability that the target gives to the draft vocabulary, [positions]."""
    chunks = hidden.split(POSITIONS_PER_CHUNK)
    everything = torch.cat([widened(target.logits(chunk)).logsumexp(-1) for chunk in chunks])
    return teacher.logsumexp(-1) - everything


def _vocabulary(head: DraftHead) -> Tensor | None:
    """The head's vocabulary as one lasting tensor, by which the target remembers its LM head's rows; None: all."""
    if head.config.full_vocabulary:
        return None
    cached = getattr(head, "_vocabulary_ids", None)
    if cached is None:
        cached = head._vocabulary_ids = head.vocabulary
    return cached


class HeadLoss(nn.Module):
    """`loss_sum` as a module's forward, which is what DDP and FSDP2 wrap: the head's weights, not the target's."""

    def __init__(self, head: DraftHead, target: Target, objective: Objective) -> None:
        super().__init__()
        self.head, self.target, self.objective = head, target, objective  # a Target is no module

    def forward(self, batch: Batch, features: Features) -> tuple[Tensor, Tensor]:
        return loss_sum(self.head, self.target, batch, features, self.objective)


# Losses of a head's logits against the target's distribution, one number a position.
#
# Each takes `student` (head logits over the draft vocabulary, [positions, draft_vocab]) and `teacher`
# (target logits over the same tokens) with `mass`: the log of the probability that the target
# gives to the draft vocabulary ([positions]; None where the loss renormalises the teacher and needs none).


Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def kl(student: Tensor, teacher: Tensor, mass: Tensor | None) -> Tensor:
    """KL(teacher || student), the teacher renormalised over the draft vocabulary."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def acceptance_rate(student: Tensor, teacher: Tensor, mass: Tensor | None) -> Tensor:
    """α = Σ min(p, q): the probability that rejection sampling accepts; p is not renormalised."""
    p, q = _unnormalised(teacher, mass), student.softmax(-1)
    return torch.minimum(p, q).sum(-1)


def total_variation(student: Tensor, teacher: Tensor, mass: Tensor | None) -> Tensor:
    """1 - α; p is not renormalised, so what lies outside the draft vocabulary counts as rejected."""
    return 1 - acceptance_rate(student, teacher, mass)


def lk_alpha(student: Tensor, teacher: Tensor, mass: Tensor | None) -> Tensor:
    """-log α (arXiv 2602.23881); p is not renormalised."""
    return -acceptance_rate(student, teacher, mass).clamp_min(1e-6).log()


def lk_lambda(student: Tensor, teacher: Tensor, mass: Tensor | None) -> Tensor:
    """λ·KL + (1 - λ)·(1 - α) with λ = exp(-3·α), α detached (arXiv 2602.23881): KL while the head is poor."""
    alpha = acceptance_rate(student, teacher, mass)
    weight = torch.exp(-3 * alpha.detach())
    return weight * kl(student, teacher, mass) + (1 - weight) * (1 - alpha)


def _unnormalised(teacher: Tensor, mass: Tensor | None) -> Tensor:
    if mass is None:
        raise ValueError("this loss needs the target's mass on the draft vocabulary")
    return (teacher.log_softmax(-1) + mass[..., None]).exp()


@dataclass(frozen=True)
class LossEntry:
    function: Loss
    renormalised: bool  # whether the teacher is renormalised over the draft vocabulary


LOSSES = {
    "kl": LossEntry(kl, renormalised=True),
    "tv": LossEntry(total_variation, renormalised=False),
    "lk-alpha": LossEntry(lk_alpha, renormalised=False),
    "lk-lambda": LossEntry(lk_lambda, renormalised=False),
}
