"""Losses against formulas written out, and their sum against a loop that says what each draft step predicts."""

import math

import pytest
import torch
from conftest import make_tiny_head
from torch.nn.functional import smooth_l1_loss

from draft.data.examples import Batch
from draft.training.batches import FeatureSource, Remembered
from draft.training.loss import LOSSES, RENORMALISED, HeadLoss, Objective

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


def make_batch(lengths=(14, 9)):
    generator = torch.Generator().manual_seed(3)
    width = max(lengths)
    ids = torch.full((len(lengths), width), 2)
    attention = torch.zeros(len(lengths), width, dtype=torch.bool)
    loss = torch.zeros_like(attention)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 190, (length,), generator=generator)
        attention[row, :length] = True
        loss[row, 4:length] = True
        loss[row, 6] = False  # a hole, as between two turns
    return Batch(input_ids=ids, attention_mask=attention, loss_mask=loss)


@pytest.mark.parametrize(
    ("architecture", "loss"),
    [*(("eagle3", loss) for loss in LOSSES), ("eagle", "kl"), ("eagle", "tv"), ("medusa", "kl"), ("medusa", "tv")],
)
def test_loss_equals_a_loop_over_positions(tiny_target, architecture, loss):
    tiny_head = make_tiny_head(tiny_target, architecture=architecture)
    batch = make_batch()
    source = FeatureSource(tiny_target)
    source.layers = tiny_head.auxiliary_layers(tiny_target)
    features = source.get(batch, [0, 1])
    weight = 7.0 if architecture == "eagle" else 0.0
    objective = Objective(loss, draft_steps=3, step_decay=0.8, feature_weight=weight)
    with torch.no_grad():
        total, agreement = HeadLoss(tiny_head, tiny_target, objective)(batch, features)
        expected, hits = 0.0, torch.zeros(3, 2)
        full = tiny_target.logits(features.last_hidden)
        steps = tiny_head.unroll(features.embeds, features.auxiliary, 3, attention_mask=batch.attention_mask)
        for k, hidden in enumerate(steps):
            logits = tiny_head.logits(hidden, k)
            for row in range(2):
                for i in range(batch.input_ids.shape[1] - 2 - k):
                    if batch.loss_mask[row, i + 2 + k]:
                        at = full[row, i + 1 + k]
                        teacher = at[tiny_head.vocabulary]
                        mass = teacher.logsumexp(-1) - at.logsumexp(-1)
                        value = LOSSES[loss](logits[row, i][None], teacher[None], mass[None])
                        there = features.last_hidden[row, i + 1 + k]
                        value = value + weight * smooth_l1_loss(hidden[row, i], there)
                        expected += 0.8**k * value.item()
                        hits[k] += torch.tensor([float(logits[row, i].argmax() == teacher.argmax()), 1.0])
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(agreement.float(), hits)


@pytest.mark.parametrize("layers", [(2, 4, 5), (9,), (9, 3)])  # 9: after the final norm, and kept once
def test_remembered_hidden_states_are_those_of_one_pass(tiny_target, layers):
    """Whatever batch asks first: a run that goes on later than the first epoch has to read the same bits."""
    batch, alone, asked = make_batch((14, 9)), make_batch((14,)), []
    source = FeatureSource(tiny_target)
    source.kept = Remembered(lambda row: asked.append(row) or source.states(batch, [5, 8]))
    source.layers = layers
    first, features = source.get(alone, [5]), source.get(batch, [5, 8])
    assert asked == [5]
    kept, passed = batch.attention_mask, tiny_target.forward(batch.input_ids, layers=layers)
    assert torch.equal(features.auxiliary[kept], passed.auxiliary[kept])
    assert torch.equal(features.last_hidden[kept], passed.last_hidden[kept])
    assert all(torch.equal(getattr(first, name)[0], getattr(features, name)[0]) for name in ("auxiliary", "embeds"))
