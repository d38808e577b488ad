"""Losses against formulas written out, and what each says of the teacher's missing mass."""

import math

import pytest
import torch

from draft.training.loss import LOSSES, RENORMALISED

P = torch.tensor([[0.5, 0.2, 0.1]], dtype=torch.float64)  # the target; 0.2 lies outside the draft vocabulary
Q = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
MASS = torch.tensor([math.log(0.8)], dtype=torch.float64)
ALPHA = 0.2 + 0.2 + 0.1
KL = sum(p / 0.8 * math.log(p / 0.8 / q) for p, q in ((0.5, 0.2), (0.2, 0.3), (0.1, 0.5)))
EXPECTED = {
    "kl": KL,
    "tv": 1 - ALPHA,
    "lk-alpha": -math.log(ALPHA),
    "lk-lambda": math.exp(-3 * ALPHA) * KL + (1 - math.exp(-3 * ALPHA)) * (1 - ALPHA),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_the_formula(name):
    # logits are log-probabilities up to a constant
    value = LOSSES[name](Q.log() + 3, P.log() - 5, MASS)
    assert value.item() == pytest.approx(EXPECTED[name], abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_only_losses_of_the_unnormalised_teacher_see_the_mass(name):
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    full, half = (LOSSES[name](student, teacher, torch.full((5,), math.log(m)).double()) for m in (1.0, 0.5))
    assert torch.allclose(full, half) == (name in RENORMALISED)


@pytest.mark.parametrize("name", LOSSES)
def test_the_target_itself_has_the_least_loss(name):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(30, 6, dtype=torch.float64, generator=generator)
    mass = torch.full((30,), -0.2, dtype=torch.float64)
    other = teacher + 0.3 * torch.randn(30, 6, dtype=torch.float64, generator=generator)
    loss = LOSSES[name]
    if name in RENORMALISED:
        assert (loss(teacher, teacher, mass) < loss(other, teacher, mass)).all()
    else:  # many distributions overlap with the unnormalised teacher equally well; none does better
        assert (loss(teacher, teacher, mass) <= loss(other, teacher, mass) + 1e-12).mean(dtype=torch.float64) > 0.6
