"""Losses of a head's logits against the target's distribution, one number a position.

Each takes `student` (head logits over the draft vocabulary, [positions, draft_vocab]) and `teacher`
(target logits over the same tokens) with `mass`: the log of the probability that the target
gives to the draft vocabulary ([positions]; None where the loss renormalises the teacher and needs none).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
