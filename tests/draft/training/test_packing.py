"""Several conversations in a row: the loss and its gradients are those of one a row."""

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from tiny_targets import FAMILIES, target_of

from draft.data.dataset import Row
from draft.data.examples import batches, collate, packed_batches
from draft.heads.registry import ARCHITECTURES
from draft.training.batches import FeatureSource, Remembered
from draft.training.loss import LOSSES, HeadLoss, Objective


def make_rows(lengths, seed=5):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 259, (length,), generator=generator).tolist()
        # trained from the very first token on in some: what lies across a border must not count
        mask = [place >= number % 3 and place % 7 != 4 for place in range(length)]
        rows.append(Row(str(number), ids, mask, 1, 0.0, 1.0, "test"))
    return rows


def loss_and_gradients(target, rows, capacity, loss, remember=False, architecture="eagle3"):
    head = make_tiny_head(target, architecture=architecture).requires_grad_(True)
    batch = collate(rows, capacity)
    source = FeatureSource(target)
    source.layers = head.auxiliary_layers(target)
    numbers = list(range(len(rows)))
    if remember:
        source.kept = Remembered(lambda row: source.states(batch, numbers))
    features = source.get(batch, numbers)
    weight = ARCHITECTURES[architecture].feature_weight or 0.0
    objective = Objective(loss, draft_steps=head.longest or 4, step_decay=0.8, feature_weight=weight)
    total, hits = HeadLoss(head, target, objective)(batch, features)
    total.backward()
    return total.detach(), hits, [parameter.grad for parameter in head.parameters()], batch


@pytest.mark.parametrize(
    ("architecture", "loss"), [*(("eagle3", loss) for loss in LOSSES), ("eagle", "kl"), ("medusa", "kl")]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_packed_rows_have_the_same_loss(dtype, bound, architecture, loss):
    target = make_tiny_target(dtype=dtype)
    rows = make_rows([17, 5, 30, 9, 3, 22, 14])
    apart, hits, gradients, _ = loss_and_gradients(target, rows, None, loss, False, architecture)
    packed, packed_hits, packed_gradients, batch = loss_and_gradients(target, rows, 40, loss, True, architecture)
    assert batch.input_ids.shape[0] == 3 < len(rows)
    assert packed.item() == pytest.approx(apart.item(), rel=bound)
    assert torch.equal(hits, packed_hits)
    for ours, theirs in zip(packed_gradients, gradients, strict=True):
        size = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, atol=size * (1e-10 if dtype == torch.float64 else 1e-4), rtol=1e-3)


def test_a_sliding_window_ends_at_its_conversation():
    target = target_of(FAMILIES["mistral, windows of 6"])
    rows = make_rows([17, 12, 30, 9])
    apart, packed = (loss_and_gradients(target, rows, capacity, "kl")[0] for capacity in (None, 50))
    assert packed.item() == pytest.approx(apart.item(), rel=1e-12)


def test_where_conversations_lie():
    rows = make_rows([4, 3, 5, 2])
    batch = collate(rows, 8)
    assert batch.places == ((0, 0, 4), (0, 4, 3), (1, 0, 5), (1, 5, 2))
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1]]
    assert batch.input_ids[1].tolist() == rows[2].ids + rows[3].ids
    plain = collate(rows)
    assert plain.places == ((0, 0, 4), (1, 0, 3), (2, 0, 5), (3, 0, 2)) and plain.position_ids is None
    assert plain.attention_mask.tolist()[3] == [1, 1, 0, 0, 0]


def test_packed_batches_hold_every_row_once_and_waste_less():
    generator = torch.Generator().manual_seed(1)
    rows = make_rows(torch.randint(3, 60, (300,), generator=generator).tolist())
    capacity, tokens = max(len(row.ids) for row in rows), 256
    packed = packed_batches(rows, tokens, capacity, seed=3, epoch=0)
    assert sorted(index for batch in packed for index in batch) == list(range(300))
    shapes = [collate([rows[index] for index in batch], capacity).input_ids.shape for batch in packed]
    assert all(lines <= tokens // capacity and width <= capacity for lines, width in shapes)
    real = sum(len(row.ids) for row in rows)
    assert real / sum(lines * width for lines, width in shapes) > 0.95
    assert packed == packed_batches(rows, tokens, capacity, seed=3, epoch=0)
    assert packed != packed_batches(rows, tokens, capacity, seed=3, epoch=1)
    assert len(packed) <= len(batches(rows, tokens, seed=3, epoch=0))
