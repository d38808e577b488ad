"""The training benchmark on a tiny target, and what its figures mean."""

import json

import pytest
import torch

from benchmarks import training_speed
from benchmarks.training_speed import make_rows, spread_lengths
from draft.data.examples import collate


@pytest.fixture
def arguments(small, tmp_path):
    options = f"{small} --out {tmp_path} --device cpu --rows 2 --length 32 --rank 4 --repeats 2 --conversations 8"
    return f"{options} --packing-repeats 1 --check".split()


def test_a_whole_run(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training_speed, "SIZES", (128, 256))
    status = training_speed.main(arguments)
    results = json.loads((tmp_path / "training_speed.json").read_text())
    rows = {row["method"]: row for row in results["methods"]}
    assert list(rows) == ["pretrain", "lora", "afa-lora"]
    for row in rows.values():
        assert set(row["parts"]) == {"target forward", "head forward", "backward", "optimiser"}
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"]["median"], rel=0.5)
        assert 0 < row["share_of_product"] < 1 and row["memory_peak_bytes"] > 2**20
    assert results["products"].keys() == {"bfloat16", "float32"}
    assert results["packing"]["padding"]["packed"] < 0.5 and (tmp_path / "training_speed.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "best float32 product" in printed and "AFA-LoRA step / LoRA step" in printed
    assert status == int("MISSED" in printed)


def test_counted_operations_are_those_of_the_formula(arguments):
    """2 · in · out a token and weight; the gradient of the input and of the weight each as much again."""
    parsed = training_speed.parse(arguments)
    target = training_speed.load_target(parsed.target, "float32")
    step = training_speed.make_steps(target, parsed)["pretrain"]
    batch = collate(make_rows([32, 32], target.vocab_size))
    tokens, k = 64, step.settings.training.draft_steps
    layers = sum(m.weight.numel() for m in target.decoder.layers.modules() if isinstance(m, torch.nn.Linear))
    own = sum(m.weight.numel() for m in step.head.midlayer.modules() if isinstance(m, torch.nn.Linear))
    attention = step.head.midlayer.self_attn
    keys = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
    fc, vocabulary = step.head.fc.weight.numel(), step.head.lm_head.weight.numel()
    predicted = [int(batch.trained_ahead(2 + step).sum()) for step in range(k)]
    teacher = int(batch.trained_ahead(1).sum())
    # of a row of 32, trained from token 8 on, step k predicts from entry 6 - k to entry 29 - k; all need keys at step 0
    wanted = range(6 - (k - 1), 30)
    in_layer = 3 * (tokens * keys + 2 * len(wanted) * (k * own - keys))
    # at step 0 the embeddings need no gradient, but the fused states beside them do
    expected = 2 * (tokens * (layers + 2 * fc) + in_layer) + 2 * vocabulary * (teacher + 3 * sum(predicted))
    expected += 4 * 2 * (32 * 33 / 2 * 4 * 8 * target.num_layers + sum(i + 1 for i in wanted) * 3 * 4 * 8 * k)
    assert step.flops(batch) == pytest.approx(expected, rel=1e-9)


def test_bars():
    rows = [{"method": "afa-lora", "share_of_product": 0.46}]
    results = {"methods": rows, "settings": {"dtype": "float32"}, "afa_over_lora": {"median": 1.06}}
    assert [bar["met"] for bar in training_speed.judge(results)] == [True, False]
    samples, others = [{"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}], [{"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 1.0}]
    assert training_speed.ratios(samples, others) == {"median": 2.0, "least": 2.0, "most": 2.0}


def test_lengths_are_spread():
    lengths = spread_lengths(100, 200)
    assert max(lengths) == 200 and min(lengths) < 40 and len(lengths) == 100
