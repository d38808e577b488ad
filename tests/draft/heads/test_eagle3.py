"""Heads with auxiliary layers and LM heads of another kind than the default: trained, judged and copied."""

import copy

import pytest
import torch
from interop.cases import random_head

from draft.data.dataset import Row
from draft.data.examples import collate
from draft.errors import UserError
from draft.evaluation.replay import drafted_states, target_passes
from draft.heads import Eagle3Config
from draft.heads.checkpoint import attach_head, load_head, save_head
from draft.training.batches import FeatureSource, Remembered
from draft.training.model import with_vocabulary

IDS = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(4))


def test_heads_of_different_layers_are_judged_by_one_pass(tiny_target):
    ids = IDS[0].tolist()
    rows = [Row("a", ids, [False] * 2 + [True] * 10, 2, 0.0, 1.0, "test")]
    heads = [random_head(tiny_target, auxiliary_layers=layers) for layers in (None, [1, 4, 8], [0, 7])]
    with torch.no_grad():
        [(_, together, output)] = target_passes(tiny_target, rows, 100, None, heads)
        assert output.layers == (0, 1, 2, 4, 5, 7, 8)
        for head in heads:
            alone = tiny_target.forward(together, layers=head.auxiliary_layers(tiny_target))
            pairs = zip(
                drafted_states(tiny_target, head, together, output, 3),
                drafted_states(tiny_target, head, together, alone, 3),
                strict=True,
            )
            assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("remember", [False, True])
def test_training_reads_the_heads_own_layers(tiny_target, remember):
    source = FeatureSource(tiny_target)
    source.layers = random_head(tiny_target, auxiliary_layers=[1, 8]).auxiliary_layers(tiny_target)
    batch = collate([Row("a", IDS[0].tolist(), [True] * 12, 1, 0.0, 1.0, "test")])
    if remember:
        source.kept = Remembered(lambda row: source.states(batch, [row]))
    for _ in range(2):  # the second time from memory
        features = source.get(batch, [0])
        expected = tiny_target.forward(IDS, layers=[1, 8])
        torch.testing.assert_close(features.auxiliary, expected.auxiliary)
        torch.testing.assert_close(features.last_hidden, expected.last_hidden)


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


def test_a_reduced_vocabulary_needs_an_lm_head(tiny_target):
    with pytest.raises(UserError, match="over 259 tokens, and draft_vocab_size is 200"):
        Eagle3Config.for_target(tiny_target, 200, shared_lm_head=True)
