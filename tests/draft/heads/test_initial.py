"""The closed-form start: it solves what it says, and beats a random start."""

import torch
from conftest import make_tiny_head, make_tiny_target

from draft.data.examples import Batch
from draft.heads.initial import Ridge
from draft.training.batches import FeatureSource
from draft.training.config import ModelSettings
from draft.training.loss import HeadLoss, Objective
from draft.training.model import blank_head


def test_ridge_recovers_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator)
    ridge = Ridge()
    for _ in range(4):
        x = torch.randn(200, 5, generator=generator)
        ridge.add(x, x @ weight.T)
    torch.testing.assert_close(ridge.solve().float(), weight, atol=5e-3, rtol=0)


def test_a_solved_head_starts_better_than_a_random_one():
    target = make_tiny_target(dtype=torch.float32)
    ids = torch.randint(3, 200, (12, 4), generator=torch.Generator().manual_seed(0))
    length = {"max_new_tokens": 40, "min_new_tokens": 40}
    ids = target.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
    mask = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(input_ids=ids, attention_mask=mask.long(), loss_mask=mask)
    features = FeatureSource(target).get(batch, list(range(12)))
    solved = blank_head(target, torch.arange(200), ModelSettings())
    solved.initialise(target, [(features, mask)], seed=0)
    random = make_tiny_head(target)
    objective = Objective("kl", draft_steps=1, step_decay=1.0)
    with torch.no_grad():
        losses = [HeadLoss(head, target, objective)(batch, features) for head in (solved, random)]
    assert losses[0][0] < 0.7 * losses[1][0]
    assert losses[0][1][0, 0] > losses[1][1][0, 0]
