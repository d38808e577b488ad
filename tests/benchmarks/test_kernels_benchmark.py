"""benchmarks.kernels: its sums and its bars; tests/kernels/on_triton has a whole run."""

from typing import Any

import pytest

from benchmarks import kernels
from benchmarks.kernels import COMPILED, CONTENDERS, EAGER, KERNELS, LINEAR, Work, geometric_mean, judge, work


def test_the_frozen_product_is_most_of_the_arithmetic():
    # the figure that the layer is known by: 275 GFLOP at 8192 tokens, 4096 to 4096
    frozen = 2 * 8192 * 4096 * 4096
    forward = work(8192, 4096, 4096, 16, "forward")
    assert frozen == pytest.approx(275e9, rel=1e-3)
    assert forward.flops - frozen == 2 * 8192 * 16 * 8192 and forward.flops / frozen < 1.01
    assert forward.bytes == 2 * (8192 * 4096 * 2 + 4096 * 4096) + 4 * (16 * 8192 + 8192 * 16)


def test_the_backward_counts_every_product_and_every_tensor_once():
    tokens, width, out, rank = 3, 5, 7, 2
    products = [(tokens, out, width), (tokens, rank, width)]  # dy W, dz A
    products += [(tokens, out, rank), (rank, tokens, width), (out, tokens, rank)]  # dy B, dz^T x, dy^T h
    backward = work(tokens, width, out, rank, "backward")
    assert backward.flops == sum(2 * a * b * c for a, b, c in products)
    halves = tokens * out + tokens * width + out * width + tokens * width  # dy, x, W, dx
    assert backward.bytes == 2 * halves + 4 * (tokens * rank + 2 * rank * (width + out))
    assert work(tokens, width, out, rank, "both") == backward + work(tokens, width, out, rank, "forward")
    assert Work(2_000, 10).floor({"flops": 1e6, "bytes": 1e6}) == pytest.approx(2.0)  # the slower of the two
    assert Work(2_000, 5_000).floor({"flops": 1e6, "bytes": 1e6}) == pytest.approx(5.0)
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


def row(out: int = 4096, rank: int = 16, tokens: int = 8192, error: float = 2e-3, **ms: float) -> dict[str, Any]:
    times = dict.fromkeys(CONTENDERS, 1.0) | ms
    return {"phase": "both", "out": out, "rank": rank, "tokens": tokens, "ms": times, "errors": {"y": error}}


def test_the_bars():
    good = row(**{KERNELS: 1.0, EAGER: 1.4, COMPILED: 1.2, LINEAR: 0.9})
    small = row(out=1024, **{KERNELS: 1.3, EAGER: 1.7, COMPILED: 1.5, LINEAR: 1.0})
    found = judge([good, small])
    assert len(found) == 7 and all(bar["met"] for bar in found)
    slow = row(rank=64, **{KERNELS: 1.0, EAGER: 0.9, COMPILED: 1.2})
    missed = [bar["bar"] for bar in judge([good, small, slow]) if not bar["met"]]
    assert missed == [f"over {EAGER}, geometric mean", f"over {EAGER}, worst shape"]
    assert [bar["met"] for bar in judge([row(out=1024, error=0.02, **{KERNELS: 1.4})])] == [False] * 6
    assert len(judge([row(tokens=2048)])) == 5


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--device", "cpu"], "TRITON_INTERPRET=1"),
        (["--ranks", "257"], "257 is above 256"),
        (["--shapes", "q", "8x"], "'8x' is neither one of q, kv"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    try:
        status = kernels.main([*arguments, "--out", str(tmp_path)])
    except SystemExit as end:  # argparse's own way
        status = end.code
    assert status == 2 and word in capsys.readouterr().err
