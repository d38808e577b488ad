"""Medusa against its formula, in float64, and by position."""

import pytest
import torch
from conftest import make_tiny_head
from torch.nn.functional import silu

from draft.errors import UserError
from draft.heads import MedusaConfig

IDS = torch.randint(3, 259, (1, 9), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 3, "num_heads": 2}, {"draft_vocab_size": 259, "shared_lm_head": True}],
    ids=["plain", "blocks of three layers", "the target's LM head"],
)
def test_each_position_is_the_formula(tiny_target, options):
    head = make_tiny_head(tiny_target, architecture="medusa", **options)
    with torch.no_grad():
        states = tiny_target.model.model(IDS).last_hidden_state
        auxiliary = tiny_target.forward(IDS, layers=head.auxiliary_layers(tiny_target)).auxiliary
        steps = list(head.unroll(tiny_target.embedding(IDS), auxiliary, 99, attention_mask=None))
        assert len(steps) == head.config.num_heads == options.get("num_heads", 5)
        for step, hidden in enumerate(steps):
            x = states
            for layer in head.blocks[step].layers:
                x = x + silu(x @ layer.weight.T + layer.bias)
            torch.testing.assert_close(hidden, x)
            lm_head = tiny_target.lm_head if head.config.shared_lm_head else head.lm_heads[step]
            torch.testing.assert_close(head.logits(hidden, step), x @ lm_head.weight.T)
    assert len(list(head.unroll(None, auxiliary, 1))) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 0}, "num_heads = 0"),
        ({"num_layers": True}, "num_layers = True"),
        ({"shared_lm_head": True}, "over 259 tokens, and the draft vocabulary has 200"),
    ],
)
def test_impossible_shapes_are_refused(tiny_target, options, words):
    with pytest.raises(UserError, match=words):
        MedusaConfig.for_target(tiny_target, 200, **options)
