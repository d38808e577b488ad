"""The training loss against a loop that says what each draft step predicts."""

import pytest
import torch

from draft.data.examples import Batch
from draft.training.features import Features, FeatureSource
from draft.training.losses import LOSSES
from draft.training.objective import Objective, loss_sum
from draft.training.step import unroll


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


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_a_loop_over_positions(tiny_target, tiny_head, loss):
    batch = make_batch()
    features = FeatureSource(tiny_target, remember=False).get(batch, [0, 1])
    objective = Objective(loss, draft_steps=3, step_decay=0.8)
    with torch.no_grad():
        total, agreement = loss_sum(tiny_head, tiny_target, batch, features, objective)
        expected, hits = 0.0, torch.zeros(3, 2)
        full = tiny_target.logits(features.last_hidden)
        steps = unroll(tiny_head, features.embeds, features.auxiliary, 3, attention_mask=batch.attention_mask)
        for k, hidden in enumerate(steps):
            logits = tiny_head.logits(hidden)
            for row in range(2):
                for i in range(batch.input_ids.shape[1] - 2 - k):
                    if batch.loss_mask[row, i + 2 + k]:
                        at = full[row, i + 1 + k]
                        teacher = at[tiny_head.vocabulary]
                        mass = teacher.logsumexp(-1) - at.logsumexp(-1)
                        value = LOSSES[loss].function(logits[row, i][None], teacher[None], mass[None])
                        expected += 0.8**k * value.item()
                        hits[k] += torch.tensor([float(logits[row, i].argmax() == teacher.argmax()), 1.0])
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(agreement.float(), hits)


def test_remembered_hidden_states_are_the_same(tiny_target):
    batch = make_batch()
    source = FeatureSource(tiny_target, remember=True)
    fresh, again = source.get(batch, [5, 8]), source.get(batch, [5, 8])
    kept = batch.attention_mask
    for name in Features.__dataclass_fields__:
        assert torch.equal(getattr(fresh, name)[kept], getattr(again, name)[kept]), name
