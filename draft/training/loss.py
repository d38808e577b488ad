"""The training loss of a batch: the chosen loss at every draft step, over the positions that are trained on.

A loss takes `student` (the head's logits over the draft vocabulary, [positions, draft_vocab]), `teacher` (the target's
logits over the same tokens) and `mass` (log of the probability that the target gives to the draft vocabulary,
[positions]; zeros where the loss renormalises the teacher), and returns one number a position.
"""

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
    """Loss, and weights of its draft steps."""

    loss: str
    draft_steps: int
    step_decay: float
    feature_weight: float = 0.0  # of the smooth L1 distance between a state and the target's at the same token


class HeadLoss(nn.Module):
    """Loss of a head as a module's forward, which is what DDP and FSDP2 wrap: the head's weights, not the target's."""

    def __init__(self, head: DraftHead, target: Target, objective: Objective) -> None:
        super().__init__()
        self.head, self.target, self.objective = head, target, objective  # a Target is no module
        # one lasting tensor, by which the target remembers its LM head's rows; None: all of them
        self.vocabulary = None if head.config.full_vocabulary else head.vocabulary

    def forward(self, batch: Batch, features: Features) -> tuple[Tensor, Tensor]:
        """Loss summed over positions and weighted over draft steps, and the top-1 agreement with the target.

        With `feature_weight`, the smooth L1 distance (mean over the hidden size) of the states of step k at i to the
        target's last hidden state at i+1+k is added: an EAGLE-1 head is to predict that (SafeAILab's
        `eagle/train/main.py`).

        The caller divides by the trained positions of the whole optimiser step, so that accumulation and padding don't
        change the curve.

        Returns:
            a scalar, and [draft_steps, 2]: count of positions where the head's first choice is the target's, and count
            of positions.
        """
        objective, loss = self.objective, LOSSES[self.objective.loss]
        teacher_at = shift_left(batch.loss_mask)  # [batch, tokens]: the target predicts a trained token from here
        teacher_rows = torch.cumsum(teacher_at.flatten(), 0).sub_(1).view_as(teacher_at)
        with torch.no_grad():
            hidden = features.last_hidden[teacher_at]  # [positions, hidden]
            teacher = widened(self.target.logits(hidden, self.vocabulary))  # [positions, draft_vocab]
            mass = teacher.new_zeros(len(teacher))
            if objective.loss not in RENORMALISED:
                chunks = hidden.split(POSITIONS_PER_CHUNK)
                everything = torch.cat([widened(self.target.logits(chunk)).logsumexp(-1) for chunk in chunks])
                mass = teacher.logsumexp(-1) - everything

        total = teacher.new_zeros(())
        agreement = []
        steps = self.head.unroll(
            features.embeds,
            features.auxiliary,
            objective.draft_steps,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        )
        for k, states in enumerate(steps):
            chosen = batch.trained_ahead(2 + k)  # [batch, tokens]: x[i+2+k] is a trained token
            rows = shift_left(teacher_rows, 1 + k)[chosen]
            student = widened(self.head.logits(states[chosen], k))  # [positions at this step, draft_vocab]
            per_position = loss(student, teacher[rows], mass[rows])
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


def kl(student: Tensor, teacher: Tensor, mass: Tensor) -> Tensor:
    """KL(teacher || student), the teacher renormalised over the draft vocabulary."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def acceptance_rate(student: Tensor, teacher: Tensor, mass: Tensor) -> Tensor:
    """α = Σ min(p, q): the probability that rejection sampling accepts; p is not renormalised."""
    p, q = (teacher.log_softmax(-1) + mass[..., None]).exp(), student.softmax(-1)
    return torch.minimum(p, q).sum(-1)


def total_variation(student: Tensor, teacher: Tensor, mass: Tensor) -> Tensor:
    """1 - α; p is not renormalised, so what lies outside the draft vocabulary counts as rejected."""
    return 1 - acceptance_rate(student, teacher, mass)


def lk_alpha(student: Tensor, teacher: Tensor, mass: Tensor) -> Tensor:
    """-log α (arXiv 2602.23881); p is not renormalised."""
    return -acceptance_rate(student, teacher, mass).clamp_min(1e-6).log()


def lk_lambda(student: Tensor, teacher: Tensor, mass: Tensor) -> Tensor:
    """λ·KL + (1 - λ)·(1 - α) with λ = exp(-3·α), α detached (arXiv 2602.23881): KL while the head is poor."""
    alpha = acceptance_rate(student, teacher, mass)
    weight = torch.exp(-3 * alpha.detach())
    return weight * kl(student, teacher, mass) + (1 - weight) * (1 - alpha)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kl": kl,
    "tv": total_variation,
    "lk-alpha": lk_alpha,
    "lk-lambda": lk_lambda,
}
RENORMALISED = {"kl"}  # the teacher, over the draft vocabulary
