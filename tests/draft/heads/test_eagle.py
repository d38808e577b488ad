"""EAGLE-1 against its formula, in float64."""

import pytest
import torch
from conftest import make_tiny_head
from torch.nn.functional import rms_norm

IDS = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(4))


def by_hand(head, target, ids):
    """(logits [tokens - 1, vocab], states) of the first draft step, written out from the paper and SafeAILab's code."""
    config, layer = head.config, head.layers[0]
    states = target.model.model(ids).last_hidden_state[0]
    fused = torch.cat([target.embedding(ids[0, 1:]), states[:-1]], -1) @ head.fc.weight.T
    if config.fc_bias:
        fused = fused + head.fc.bias
    rotation = head.rope(torch.arange(len(fused))[None], fused.dtype)
    q, k, v = (part[0] for part in layer.self_attn.project(fused[None], rotation))  # [heads, tokens, head_dim]
    scores = q @ k.transpose(-1, -2) / config.head_dim**0.5
    scores = scores.masked_fill(torch.ones(len(fused), len(fused)).triu(1).bool(), -torch.inf)
    hidden = fused + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ layer.self_attn.o_proj.weight.T
    normed = rms_norm(hidden, hidden.shape[-1:], None, config.rms_norm_eps) * layer.post_attention_layernorm.weight
    hidden = hidden + layer.mlp(normed)
    return hidden @ target.lm_head.weight.T, hidden


@pytest.mark.parametrize("options", [{}, {"fc_bias": True, "qkv_bias": True}], ids=["plain", "biases"])
def test_the_first_step_is_the_formula(tiny_target, options):
    head = make_tiny_head(tiny_target, architecture="eagle", **options)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() == 1:  # norms and biases
                parameter.add_(0.3 * torch.randn_like(parameter))
        logits, states = by_hand(head, tiny_target, IDS)
        auxiliary = tiny_target.forward(IDS, layers=head.auxiliary_layers(tiny_target)).auxiliary
        first = next(head.unroll(tiny_target.embedding(IDS), auxiliary, 1))[0, :-1]
        torch.testing.assert_close(first, states)
        torch.testing.assert_close(head.logits(first), logits)
    assert (head.attention.q_proj.bias is not None) == (head.fc.bias is not None) == bool(options)


def test_it_reads_the_state_after_the_final_norm(tiny_target):
    output = tiny_target.forward(IDS, layers=[8, tiny_target.output_layer])
    before, after = output.auxiliary.chunk(2, dim=-1)
    assert torch.equal(after, output.last_hidden) and not torch.allclose(before, after)
