"""The rows of a run: several data sets together, and several conversations in a row of a batch; the loss over them.

Losses against formulas written out, and their sum against a loop that says what each draft step predicts."""

import io
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target, save_tiny_target
from rich.console import Console
from tiny_targets import tiny
from torch.nn.functional import smooth_l1_loss
from written_data import prepared

from draft.data.dataset import Row, open_dataset, write_dataset
from draft.data.examples import batches, collate, packed_batches
from draft.errors import UserError
from draft.heads.registry import ARCHITECTURES
from draft.heads.unroll import wanted_places
from draft.target import load_target
from draft.training.batches import FeatureSource, Remembered, load_rows
from draft.training.config import resolve
from draft.training.loss import LOSSES, POSITIONS_IN_CACHE, RENORMALISED, HeadLoss, Objective, Teacher


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
    target = tiny("mistral, windows")
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
    assert plain.attention_mask.tolist()[3] == [1, 1, 0, 0, 0] and plain.input_ids[3].tolist() == [
        *rows[3].ids,
        0,
        0,
        0,
    ]
    assert plain.loss_mask[3].tolist() == [*rows[3].mask, False, False, False]


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


# ---- several data sets ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The same prompts prepared with two seeds: each data set holds out others of them."""
    root = tmp_path_factory.mktemp("world")
    save_tiny_target(root / "target")
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {n}"}) + "\n" for n in range(16)))
    target = load_target(str(root / "target"), "float32")
    for seed in (0, 5):
        options = {"held_out_share": 0.25, "greedy_share": 1.0, "seed": seed}
        prepared(target, root / f"data-{seed}", prompts=[prompts], max_new_tokens=6, **options)
    return root, target


def load(target, *folders):
    """The rows, and what the console showed."""
    console = Console(file=io.StringIO(), width=200)
    flags = {"data": [str(folder) for folder in folders], "eval_rows": 100}
    return load_rows(resolve("pretrain", "o", flags=flags), target, console), console.file.getvalue()


def test_what_one_data_set_holds_out_is_not_trained_on_from_another(world):
    root, target = world
    folders = [root / "data-0", root / "data-5"]
    splits = [{split: open_dataset(folder).rows(split) for split in ("train", "held-out")} for folder in folders]
    held_out = {row.id for split in splits for row in split["held-out"]}
    offered = [row for split in splits for row in split["train"]]
    (train, replayed), shown = load(target, *folders)
    assert train == [row for row in offered if row.id not in held_out]  # in their order
    assert {row.id for row in replayed} == held_out
    left_out = len(offered) - len(train)
    assert left_out > 0 and shown.count("\n") == 1 and shown.startswith(f"{left_out} training rows are left out")


def test_one_data_set_is_taken_whole_and_nothing_is_said(world):
    root, target = world
    (train, _), shown = load(target, root / "data-0", root / "data-0")
    assert train == open_dataset(root / "data-0").rows("train") * 2 and shown == ""


def test_nothing_left_to_train_on_is_told(world, tmp_path):
    root, target = world
    swapped = [
        replace(row, split={"train": "held-out", "held-out": "train"}[split])
        for split in ("train", "held-out")
        for row in open_dataset(root / "data-0").rows(split)
    ]
    write_dataset(tmp_path, swapped, open_dataset(root / "data-0").manifest)
    with pytest.raises(UserError, match="held out in another data set; prepare data of other prompts"):
        load(target, root / "data-0", tmp_path)


def test_prompts_are_trained_on_when_requested(world):
    root, _ = world
    flags = {"data": [str(root / "data-0")], "every_position": True}
    rows, _ = load_rows(resolve("pretrain", "o", flags=flags), world[1], Console(quiet=True))
    assert all(row.mask == [True] * len(row.ids) for row in rows) and any(row.prompt_length > 1 for row in rows)


def test_general_rows_are_mixed_in_by_their_tokens(world):
    root, target = world
    flags = {"data": [str(root / "data-0")], "general": str(root / "data-5"), "mix_general": 0.25}
    load = partial(load_rows, target=target, console=Console(quiet=True))
    alone, held_out = load(resolve("adapt", "o", flags={"data": flags["data"], "head": "h"}))
    mixed, replayed = load(resolve("adapt", "o", flags={**flags, "head": "h"}))
    general = mixed[len(alone) :]
    assert mixed[: len(alone)] == alone and replayed == held_out
    assert len({row.id for row in general}) == len(general) and not {row.id for row in general} & {
        row.id for row in open_dataset(root / "data-0").rows("held-out")
    }
    tokens, longest = sum(len(row.ids) for row in general), max(len(row.ids) for row in general)
    assert 0 <= tokens - sum(len(row.ids) for row in alone) / 3 < longest
    with pytest.raises(UserError, match="have [0-9,]+ tokens too few for that share"):
        load(resolve("adapt", "o", flags={**flags, "mix_general": 0.9, "head": "h"}))
    del flags["general"]
    with pytest.raises(UserError, match="no general conversations ship for target"):
        load(resolve("adapt", "o", flags={**flags, "head": "h"}))


# ---- the loss ----

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
    value = LOSSES[name](Q.log() + 3, Teacher.of(P.log() - 5, MASS), torch.tensor([0]))
    assert value.item() == pytest.approx(EXPECTED[name], abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_only_losses_of_the_unnormalised_teacher_see_the_mass(name):
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    masses = (torch.full((5,), math.log(mass)).double() for mass in (1.0, 0.5))
    full, half = (LOSSES[name](student, Teacher.of(teacher, mass), torch.arange(5)) for mass in masses)
    assert torch.allclose(full, half) == (name in RENORMALISED)


def test_gradient_of_the_divergence_is_that_of_its_formula():
    generator = torch.Generator().manual_seed(2)
    count = 2 * POSITIONS_IN_CACHE + 3
    student, logits = torch.randn(2, count, 11, dtype=torch.float64, generator=generator)
    rows, weights = torch.randperm(count, generator=generator), torch.rand(count, generator=generator).double()

    def formula(student, teacher, rows):
        log_p, log_q = teacher.log_p[rows], student.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    gradients = []
    for divergence in (LOSSES["kl"], formula):
        student = student.detach().requires_grad_()
        (divergence(student, Teacher.of(logits), rows) * weights).sum().backward()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_wanted_places_are_the_wanted_ones_first():
    wanted = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    places = wanted_places(wanted)
    assert places.shape == (3, 3) and places[0].tolist() == [1, 3, 4] and places[1, 0] == 4
    assert not torch.take_along_dim(wanted, places, 1)[1, 1:].any()


@pytest.mark.parametrize(
    ("architecture", "loss"),
    [*(("eagle3", loss) for loss in LOSSES), ("eagle", "kl"), ("eagle", "tv"), ("medusa", "kl"), ("medusa", "tv")],
)
def test_loss_equals_a_loop_over_positions(tiny_target, architecture, loss):
    tiny_head = make_tiny_head(tiny_target, architecture=architecture)
    batch = collate(make_rows([14, 9]))
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
                        taught = Teacher.of(teacher[None], mass[None])
                        value = LOSSES[loss](logits[row, i][None], taught, torch.tensor([0]))
                        there = features.last_hidden[row, i + 1 + k]
                        value = value + weight * smooth_l1_loss(hidden[row, i], there)
                        expected += 0.8**k * value.item()
                        hits[k] += torch.tensor([float(logits[row, i].argmax() == teacher.argmax()), 1.0])
    assert total.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(agreement.float(), hits)


@pytest.mark.parametrize("layers", [(2, 4, 5), (9,), (9, 3)])  # 9: after the final norm, and kept once
def test_remembered_hidden_states_are_those_of_one_pass(tiny_target, layers):
    """Whatever batch asks first: a run that goes on later than the first epoch has to read the same bits."""
    rows, asked = make_rows([14, 9]), []
    batch, alone = collate(rows), collate(rows[:1])
    source = FeatureSource(tiny_target)
    source.kept = Remembered(lambda row: asked.append(row) or source.states(batch, [5, 8]))
    source.layers = layers
    first, features = source.get(alone, [5]), source.get(batch, [5, 8])
    assert asked == [5]
    plain = FeatureSource(tiny_target)
    plain.layers = layers
    kept, passed = batch.attention_mask.bool(), tiny_target.forward(batch.input_ids, layers=layers)
    for got in (features, plain.get(batch, [5, 8])):
        assert torch.equal(got.auxiliary[kept], passed.auxiliary[kept])
        assert torch.equal(got.last_hidden[kept], passed.last_hidden[kept])
    assert all(torch.equal(getattr(first, name)[0], getattr(features, name)[0]) for name in ("auxiliary", "embeds"))
