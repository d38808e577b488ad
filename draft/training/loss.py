"""The training loss of a batch: the chosen loss at every draft step, over the positions that are trained on.

A loss takes `student` (the head's logits over the draft vocabulary, [positions, draft_vocab]), the `Teacher`, and
`rows` ([positions], the teacher's position for each of the student's), and returns one number a position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import smooth_l1_loss

from draft.data.examples import Batch
from draft.heads.base import DraftHead, Features
from draft.heads.unroll import shift_left, wanted_places
from draft.target import Target

POSITIONS_PER_CHUNK = 4096  # bounds the logits in memory: [chunk, vocab]
POSITIONS_IN_CACHE = 64


@dataclass(frozen=True)
class Objective:
    """Loss, and weights of its draft steps."""

    loss: str
    draft_steps: int
    step_decay: float
    feature_weight: float = 0.0  # of the smooth L1 distance between a state and the target's at the same token


@dataclass(frozen=True)
class Teacher:
    """The target's distributions at some positions, over the draft vocabulary."""

    log_p: Tensor  # [positions, draft_vocab], renormalised
    p: Tensor  # exp of it
    best: Tensor  # [positions], the first choice
    mass: Tensor  # [positions], log of the probability that the target gives to the draft vocabulary

    @classmethod
    def of(cls, logits: Tensor, mass: Tensor | None = None) -> Teacher:
        """logits: the target's over the draft vocabulary, [positions, draft_vocab]."""
        log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return cls(log_p, log_p.exp(), log_p.argmax(-1), log_p.new_zeros(len(log_p)) if mass is None else mass)


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
        hidden = features.last_hidden[teacher_at]  # [positions, hidden]
        teacher = self._teacher(hidden)
        ahead = [batch.trained_ahead(2 + k) for k in range(objective.draft_steps)]  # x[i+2+k] is a trained token
        places = wanted_places(torch.stack(ahead).any(0))

        total = teacher.mass.new_zeros(())
        agreement = []
        steps = self.head.unroll(
            features.embeds,
            features.auxiliary,
            objective.draft_steps,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            places=places,
        )
        for k, states in enumerate(steps):
            chosen = torch.take_along_dim(ahead[k], places, dim=1)  # [batch, wanted]
            rows = torch.take_along_dim(shift_left(teacher_rows, 1 + k), places, dim=1)[chosen]
            student = self.head.logits(states[chosen], k)  # [positions at this step, draft_vocab]
            per_position = loss(student, teacher, rows)
            if objective.feature_weight:
                distance = smooth_l1_loss(widened(states[chosen]), widened(hidden[rows]), reduction="none").mean(-1)
                per_position = per_position + objective.feature_weight * distance
            total = total + objective.step_decay**k * per_position.sum()
            with torch.no_grad():
                hits = (widened(student).argmax(-1) == teacher.best[rows]).sum()
                agreement.append(torch.stack([hits, torch.tensor(len(student), device=hits.device)]))
        return total, torch.stack(agreement)

    @torch.no_grad()
    def _teacher(self, hidden: Tensor) -> Teacher:
        """The target's distributions after its last hidden states [positions, hidden]."""
        logits = self.target.logits(hidden, self.vocabulary)  # [positions, draft_vocab]
        if self.objective.loss in RENORMALISED:
            return Teacher.of(logits)
        chunks = hidden.split(POSITIONS_PER_CHUNK)
        everything = torch.cat([widened(self.target.logits(chunk)).logsumexp(-1) for chunk in chunks])
        return Teacher.of(logits, widened(logits).logsumexp(-1) - everything)


def widened(values: Tensor) -> Tensor:
    """In at least float32: sums over a vocabulary need it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _Divergence(torch.autograd.Function):
    """KL(teacher || student) a position, and its gradient, from one pass over parts that stay in a CPU's cache."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Teacher, rows: Tensor) -> Tensor:
        values = teacher.mass.new_empty(len(student))
        gradient = torch.empty_like(student)
        size = POSITIONS_IN_CACHE if student.device.type == "cpu" else POSITIONS_PER_CHUNK
        for start in range(0, len(student), size):
            part = slice(start, start + size)
            p = teacher.p[rows[part]]
            log_q = student[part].log_softmax(-1, dtype=p.dtype)
            values[part] = (p * (teacher.log_p[rows[part]] - log_q)).sum(-1)
            gradient[part] = log_q.exp_().sub_(p)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None


def kl(student: Tensor, teacher: Teacher, rows: Tensor) -> Tensor:
    """KL(teacher || student), the teacher renormalised over the draft vocabulary."""
    return _Divergence.apply(student, teacher, rows)


def acceptance_rate(student: Tensor, teacher: Teacher, rows: Tensor) -> Tensor:
    """α = Σ min(p, q): the probability that rejection sampling accepts; p is not renormalised."""
    p, q = (teacher.log_p[rows] + teacher.mass[rows, None]).exp(), widened(student).softmax(-1)
    return torch.minimum(p, q).sum(-1)


def total_variation(student: Tensor, teacher: Teacher, rows: Tensor) -> Tensor:
    """1 - α; p is not renormalised, so what lies outside the draft vocabulary counts as rejected."""
    return 1 - acceptance_rate(student, teacher, rows)


def lk_alpha(student: Tensor, teacher: Teacher, rows: Tensor) -> Tensor:
    """-log α (arXiv 2602.23881); p is not renormalised."""
    return -acceptance_rate(student, teacher, rows).clamp_min(1e-6).log()


def lk_lambda(student: Tensor, teacher: Teacher, rows: Tensor) -> Tensor:
    """λ·KL + (1 - λ)·(1 - α) with λ = exp(-3·α), α detached (arXiv 2602.23881): KL while the head is poor."""
    alpha = acceptance_rate(student, teacher, rows)
    weight = torch.exp(-3 * alpha.detach())
    return weight * kl(student, teacher, rows) + (1 - weight) * (1 - alpha)


LOSSES: dict[str, Callable[[Tensor, Teacher, Tensor], Tensor]] = {
    "kl": kl,
    "tv": total_variation,
    "lk-alpha": lk_alpha,
    "lk-lambda": lk_lambda,
}
RENORMALISED = {"kl"}  # the teacher, over the draft vocabulary
