"""benchmarks.kernels: its sums, its bars, and a whole run on tiny interpreted layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernels
from benchmarks.kernels import COMPILED, CONTENDERS, EAGER, KERNELS, LINEAR, SHAPES, Work, geometric_mean, judge, work

ROOT = Path(__file__).resolve().parents[2]


def test_the_frozen_product_is_most_of_the_arithmetic() -> None:
    # the figure that the layer is known by: 275 GFLOP at 8192 tokens, 4096 to 4096
    frozen = 2 * 8192 * 4096 * 4096
    forward = work(8192, 4096, 4096, 16, "forward")
    assert frozen == pytest.approx(275e9, rel=1e-3)
    assert forward.flops - frozen == 2 * 8192 * 16 * 8192 and forward.flops / frozen < 1.01
    assert forward.bytes == 2 * (8192 * 4096 * 2 + 4096 * 4096) + 4 * (16 * 8192 + 8192 * 16)


def test_the_backward_counts_every_product_and_every_tensor_once() -> None:
    tokens, width, out, rank = 3, 5, 7, 2
    products = [(tokens, out, width), (tokens, rank, width)]  # dy W, dz A
    products += [(tokens, out, rank), (rank, tokens, width), (out, tokens, rank)]  # dy B, dz^T x, dy^T h
    backward = work(tokens, width, out, rank, "backward")
    assert backward.flops == sum(2 * a * b * c for a, b, c in products)
    halves = tokens * out + tokens * width + out * width + tokens * width  # dy, x, W, dx
    assert backward.bytes == 2 * halves + 4 * (tokens * rank + 2 * rank * (width + out))
    assert work(tokens, width, out, rank, "both") == backward + work(tokens, width, out, rank, "forward")


def test_the_floor_is_the_slower_of_the_two() -> None:
    assert Work(2_000, 10).floor({"flops": 1e6, "bytes": 1e6}) == pytest.approx(2.0)
    assert Work(2_000, 5_000).floor({"flops": 1e6, "bytes": 1e6}) == pytest.approx(5.0)
    assert geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)


def row(out: int = 4096, rank: int = 16, tokens: int = 8192, error: float = 2e-3, **ms: float) -> dict[str, Any]:
    times = dict.fromkeys(CONTENDERS, 1.0) | ms
    return {"phase": "both", "out": out, "rank": rank, "tokens": tokens, "ms": times, "errors": {"y": error}}


def test_the_bars() -> None:
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
def test_a_mistake_is_one_sentence(
    arguments: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    try:
        status = kernels.main([*arguments, "--out", str(tmp_path)])
    except SystemExit as end:  # argparse's own way
        status = end.code
    assert status == 2 and word in capsys.readouterr().err


def test_a_whole_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", "cpu", "--shapes", "24x40", "40x24"]
    command += ["--tokens", "20", "--ranks", "4", "--repeats", "1", "--out", str(tmp_path), "--check"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([path, *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr  # the interpreter is slow, so the bars are missed
    assert "MISSED" in done.stdout and "interpreted on the CPU" in done.stdout and "40" in done.stdout
    results = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert [(r["in"], r["out"], r["phase"]) for r in results["rows"]] == [
        (i, o, phase) for i, o in ((24, 40), (40, 24)) for phase in ("forward", "backward", "both")
    ]
    for r in results["rows"]:
        assert set(r["ms"]) == set(r["peak_mib"]) == set(CONTENDERS) and all(t > 0 for t in r["ms"].values())
        assert set(r["errors"]) == {"y", "dx", "dA", "dB"} and max(r["errors"].values()) < 1e-2
        assert r["floor_ms"] > 0
    assert results["device"] == "cpu" and results["ceilings"]["flops"] > 0 and "--tokens 20" in results["command"]
    assert (tmp_path / "kernels-cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_the_published_shapes_are_the_heads() -> None:
    assert SHAPES["q"] == (8192, 4096) and SHAPES["fc"] == (3 * 4096, 4096) and SHAPES["down"] == (14336, 4096)
