"""Each architecture against its formula, written out from its paper; EAGLE-3 heads of other layers and LM heads."""

import copy

import pytest
import torch
from conftest import make_tiny_head
from interop.cases import random_head
from torch.nn.functional import rms_norm, silu

from draft.data.dataset import Row
from draft.errors import UserError
from draft.evaluation.replay import drafted_states, target_passes
from draft.heads import Eagle3Config, MedusaConfig
from draft.heads.checkpoint import attach_head, load_head, save_head
from draft.training.model import with_vocabulary

IDS = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(4))


def attended(head, x):
    """The output of the layer's attention for its input [tokens, width]."""
    rotation = head.rope(torch.arange(len(x))[None], x.dtype)
    q, k, v = (part[0] for part in head.attention.project(x[None], rotation))  # [heads, tokens, head_dim]
    scores = q @ k.transpose(-1, -2) / head.config.head_dim**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ head.attention.o_proj.weight.T


def normed(head, module, x):
    return rms_norm(x, x.shape[-1:], None, head.config.rms_norm_eps) * module.weight


def eagle_by_hand(head, target):
    """(logits [tokens - 1, vocab], states) of the first draft step, from the paper and SafeAILab's code."""
    layer, states = head.layers[0], target.model.model(IDS).last_hidden_state[0]
    fused = torch.cat([target.embedding(IDS[0, 1:]), states[:-1]], -1) @ head.fc.weight.T
    if head.config.fc_bias:
        fused = fused + head.fc.bias
    hidden = fused + attended(head, fused)
    hidden = hidden + layer.mlp(normed(head, layer.post_attention_layernorm, hidden))
    return hidden @ target.lm_head.weight.T, hidden


def eagle3_by_hand(head, target):
    """(logits [tokens - 1, draft_vocab], states that are fed back), from the options' definitions."""
    config, layer = head.config, head.midlayer
    captured = target.forward(IDS, layers=range(target.num_layers + 1)).auxiliary[0].chunk(target.num_layers + 1, -1)
    states = [captured[index] for index in config.auxiliary_layers or (2, 4, 5)]
    if config.norm_before_fc:
        states = normed(head, head.input_norm, torch.cat(states, -1)).chunk(len(states), -1)
    if config.fc_norm:
        states = [normed(head, head.fc_norm[index], state) for index, state in enumerate(states)]
    fused = torch.cat(states, -1)[:-1] @ head.fc.weight.T
    inner = normed(head, layer.hidden_norm, fused)
    x = torch.cat([normed(head, layer.input_layernorm, target.embedding(IDS[0, 1:])), inner], -1)
    hidden = (inner if config.norm_before_residual else fused) + attended(head, x)
    hidden = hidden + layer.mlp(normed(head, layer.post_attention_layernorm, hidden))
    lm_head = target.lm_head if config.shared_lm_head else head.lm_head
    last = normed(head, head.norm, hidden)
    return last @ lm_head.weight.T, last if config.norm_output else hidden


EAGLE3_OPTIONS = [
    {},
    {"norm_before_residual": True},
    {"norm_before_fc": True},
    {"fc_norm": True},
    {"norm_before_fc": True, "fc_norm": True},
    {"norm_output": True},
    {"auxiliary_layers": [0, 3, 7, 8]},
    {"draft_vocab_size": 259},
    {"draft_vocab_size": 259, "shared_lm_head": True},
]


@pytest.mark.parametrize(
    ("by_hand", "options"),
    [
        *((eagle3_by_hand, options) for options in EAGLE3_OPTIONS),
        (eagle_by_hand, {"architecture": "eagle"}),
        (eagle_by_hand, {"architecture": "eagle", "fc_bias": True, "qkv_bias": True}),
    ],
    ids=lambda value: ", ".join(value) or "default" if isinstance(value, dict) else value.__name__,
)
def test_the_first_step_is_the_formula(tiny_target, by_hand, options):
    head = random_head(tiny_target, **options)
    with torch.no_grad():
        logits, fed_back = by_hand(head, tiny_target)
        auxiliary = tiny_target.forward(IDS, layers=head.auxiliary_layers(tiny_target)).auxiliary
        first = next(head.unroll(tiny_target.embedding(IDS), auxiliary, 1))[0, :-1]
        torch.testing.assert_close(first, fed_back)
        torch.testing.assert_close(head.logits(first), logits)
        alone = head(tiny_target.embedding(IDS[:, 1:]), head.combine(auxiliary[:, :-1]), torch.arange(11)[None])[0]
        torch.testing.assert_close(alone, first)
    assert (head.attention.q_proj.bias is not None) == (head.fc.bias is not None) == ("fc_bias" in options)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 3, "num_heads": 2}, {"draft_vocab_size": 259, "shared_lm_head": True}],
    ids=["plain", "blocks of three layers", "the target's LM head"],
)
def test_each_position_of_medusa_is_the_formula(tiny_target, options):
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
    ("config", "options", "words"),
    [
        (MedusaConfig, {"num_heads": 0}, "num_heads = 0"),
        (MedusaConfig, {"num_layers": True}, "num_layers = True"),
        *((each, {"shared_lm_head": True}, "over 259 .* is 200") for each in (MedusaConfig, Eagle3Config)),
    ],
)
def test_impossible_shapes_are_refused(tiny_target, config, options, words):
    with pytest.raises(UserError, match=words):
        config.for_target(tiny_target, 200, **options)


# ---- auxiliary layers and LM heads of another kind than the default ----


def test_heads_of_different_layers_are_judged_by_one_pass(tiny_target):
    ids = IDS[0].tolist()
    rows = [Row("a", ids, [False] * 2 + [True] * 10, 2, 0.0, 1.0, "test")]
    heads = [random_head(tiny_target, auxiliary_layers=layers) for layers in (None, [1, 4, 8], [0, 7])]
    with torch.no_grad():
        [(_, together, output)] = target_passes(tiny_target, rows, 100, None, heads)
        assert output.layers == (0, 1, 2, 4, 5, 7, 8)
        for head in heads:
            alone = tiny_target.forward(together, layers=head.auxiliary_layers(tiny_target))
            states = (drafted_states(tiny_target, head, together, each, 3) for each in (output, alone))
            assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_a_shared_lm_head_is_the_targets_also_in_a_copy(tiny_target, tmp_path):
    head = random_head(tiny_target, draft_vocab_size=259, shared_lm_head=True)
    save_head(head, tmp_path / "head", dtype=torch.float64, about={})
    loaded, _ = load_head(tmp_path / "head")
    hidden = torch.randn(2, 32, dtype=torch.float64)
    with pytest.raises(UserError, match="use_target_lm_head"):
        loaded.logits(hidden)
    attach_head(loaded, {}, tiny_target)
    for each in (loaded, copy.deepcopy(loaded)):
        assert each.shared_target is tiny_target
        torch.testing.assert_close(each.logits(hidden), tiny_target.lm_head(loaded.norm(hidden)))
    assert not any(parameter is tiny_target.lm_head.weight for parameter in loaded.parameters())


def test_a_new_vocabulary_gives_a_head_that_shares_an_lm_head_one(tiny_target):
    head = random_head(tiny_target, draft_vocab_size=259, shared_lm_head=True)
    ids = torch.arange(10, 60)
    rebuilt = with_vocabulary(head, tiny_target, ids)
    assert torch.equal(rebuilt.lm_head.weight, tiny_target.lm_head.weight[ids])
