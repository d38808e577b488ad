"""The rows of a run: several data sets together."""

import io
import json
from dataclasses import replace

import pytest
from conftest import save_tiny_target
from rich.console import Console
from written_data import prepared

from draft.data.dataset import open_dataset, write_dataset
from draft.errors import UserError
from draft.target import load_target
from draft.training.batches import load_rows
from draft.training.config import resolve


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
