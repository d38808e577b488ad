"""benchmarks.kernels on a tiny interpreted layer."""

import json

import pytest
from kernel_cases import INTERPRETING

from benchmarks import kernels


@pytest.mark.skipif(not INTERPRETING, reason="a card is measured by the benchmark itself")
def test_a_whole_run(tmp_path, capsys):
    options = "--device cpu --shapes 24x40 --tokens 20 --ranks 4 --repeats 1 --check"
    assert kernels.main([*options.split(), "--out", str(tmp_path)]) == 1  # the interpreter is slow: the bars are missed
    printed = capsys.readouterr().out
    assert "MISSED" in printed and "interpreted on the CPU" in printed and "40" in printed
    results = json.loads((tmp_path / "kernels-cpu.json").read_text())
    phases = [(row["in"], row["out"], row["phase"]) for row in results["rows"]]
    assert phases == [(24, 40, phase) for phase in ("forward", "backward", "both")]
    for row in results["rows"]:
        assert set(row["ms"]) == set(row["peak_mib"]) == set(kernels.CONTENDERS) and all(row["ms"].values())
        assert set(row["errors"]) == {"y", "dx", "dA", "dB"} and max(row["errors"].values()) < 1e-2
        assert row["floor_ms"] > 0
    assert results["device"] == "cpu" and results["ceilings"]["flops"] > 0 and "--tokens 20" in results["command"]
    assert (tmp_path / "kernels-cpu.png").read_bytes()[:4] == b"\x89PNG"
