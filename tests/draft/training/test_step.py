"""Training-time test sees exactly what decoding will see."""

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target

from draft.training.step import shift_left, unroll

STEPS = 5


class GrowingCache:
    """The simplest cache that can be: what decoding does, one token at a time."""

    def __init__(self):
        self.keys = self.values = None

    def update(self, keys, values):
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)
        return self.keys, self.values

    def cut(self, length):
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


def decode_step_by_step(head, embeds, auxiliary, steps):
    """Hidden states [tokens, steps, hidden] from a cache that holds true states up to i and drafts after it."""
    cache, out = GrowingCache(), []
    tokens = embeds.shape[1]
    for i in range(tokens - steps):
        hidden, row = head.fuse(auxiliary[:, i : i + 1]), []
        for k in range(steps):
            hidden = head(embeds[:, i + 1 + k][:, None], hidden, torch.tensor([[i + k]]), cache)
            row.append(hidden[0, 0])
        cache.cut(i + 1)
        out.append(torch.stack(row))
    return torch.stack(out)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_training_time_test_equals_decoding_through_the_cache(kv_heads):
    target = make_tiny_target()
    head = make_tiny_head(target)
    if kv_heads != head.config.num_key_value_heads:
        head.config.num_key_value_heads = kv_heads
        head = type(head)(head.config).to(torch.float64)
    ids = torch.randint(3, 259, (1, 24), generator=torch.Generator().manual_seed(1))
    output = target.forward(ids, layers=target.default_auxiliary_layers)
    embeds = target.embedding(ids)
    with torch.no_grad():
        unrolled = torch.stack(list(unroll(head, embeds, output.auxiliary, STEPS)), dim=2)[0]  # [tokens, steps, hidden]
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
            steps = unroll(tiny_head, tiny_target.embedding(tokens), output.auxiliary, 3, attention_mask=attention)
            runs.append([hidden[:, :8] for hidden in steps])
    for alone, batched in zip(*runs, strict=True):
        torch.testing.assert_close(alone, batched, atol=1e-10, rtol=0)


def test_shift_left():
    assert shift_left(torch.tensor([[[1], [2], [3]]])).flatten().tolist() == [2, 3, 0]
