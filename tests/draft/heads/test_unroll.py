"""Training-time test sees exactly what decoding will see; the closed-form start solves what it says."""

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from interop.cases import random_head

from draft.data.examples import Batch
from draft.heads.initial import Ridge
from draft.training.batches import FeatureSource
from draft.training.config import ModelSettings
from draft.training.loss import HeadLoss, Objective
from draft.training.model import blank_head

STEPS = 5


class GrowingCache:
    """The simplest cache that can be: what decoding does, one token at a time."""

    def __init__(self):
        self.keys = self.values = None

    def __call__(self, query, key, value):
        self.keys = key if self.keys is None else torch.cat([self.keys, key], dim=2)
        self.values = value if self.values is None else torch.cat([self.values, value], dim=2)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, self.keys, self.values, enable_gqa=True)
        return mixed.transpose(1, 2)

    def cut(self, length):
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


def decode_step_by_step(head, embeds, auxiliary, steps):
    """Hidden states [tokens, steps, hidden] from a cache that holds true states up to i and drafts after it."""
    cache, out = GrowingCache(), []
    tokens = embeds.shape[1]
    for i in range(tokens - steps):
        hidden, row = head.combine(auxiliary[:, i : i + 1]), []
        for k in range(steps):
            hidden = head(embeds[:, i + 1 + k][:, None], hidden, torch.tensor([[i + k]]), cache)
            row.append(hidden[0, 0])
        cache.cut(i + 1)
        out.append(torch.stack(row))
    return torch.stack(out)


OPTIONS = {
    "default": {},
    "grouped values": {},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "EAGLE-3.1 of four layers": {"fc_norm": True, "norm_output": True, "auxiliary_layers": [1, 3, 6, 8]},
    "shared LM head": {"draft_vocab_size": 259, "shared_lm_head": True},
    "EAGLE-1": {"architecture": "eagle"},
    "EAGLE-1 with biases": {"architecture": "eagle", "fc_bias": True, "qkv_bias": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_training_time_test_equals_decoding_through_the_cache(option):
    target = make_tiny_target()
    head = random_head(target, **OPTIONS[option])
    if option == "grouped values":
        head.config.num_key_value_heads = 2
        head = type(head)(head.config).to(torch.float64)
    ids = torch.randint(3, 259, (1, 24), generator=torch.Generator().manual_seed(1))
    output = target.forward(ids, layers=head.auxiliary_layers(target))
    embeds = target.embedding(ids)
    with torch.no_grad():
        unrolled = torch.stack(list(head.unroll(embeds, output.auxiliary, STEPS)), dim=2)[0]  # [tokens, steps, hidden]
        decoded = decode_step_by_step(head, embeds, output.auxiliary, STEPS)
        difference = (head.logits(unrolled[: len(decoded)]) - head.logits(decoded)).abs().max()
    assert difference < 1e-9


def test_right_padding_changes_nothing(tiny_target, tiny_head):
    ids = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(2))
    padded = torch.cat([ids, torch.full((1, 5), 2)], dim=1)
    mask = torch.arange(17)[None] < 12
    runs = []
    for tokens, attention in ((ids, None), (padded, mask)):
        visible = None if attention is None else attention.long()
        output = tiny_target.forward(tokens, layers=tiny_target.default_auxiliary_layers, attention_mask=visible)
        with torch.no_grad():
            steps = tiny_head.unroll(tiny_target.embedding(tokens), output.auxiliary, 3, attention_mask=attention)
            runs.append([hidden[:, :8] for hidden in steps])
    for alone, batched in zip(*runs, strict=True):
        torch.testing.assert_close(alone, batched, atol=1e-10, rtol=0)


# ---- the closed-form start ----


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
