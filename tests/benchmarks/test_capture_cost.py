"""benchmarks.capture_cost: its bars, and a whole small run."""

import json

from benchmarks import capture_cost


def results(ratio: float, captured: int) -> dict:
    return {"settings": {"requests": 4, "repeats": 2}, "ratio": {"median": ratio}, "captured": captured}


def test_each_bar_can_be_missed():
    assert [bar["met"] for bar in capture_cost.judge(results(0.995, 12))] == [True, True]
    assert [bar["met"] for bar in capture_cost.judge(results(0.985, 12))] == [False, True]
    assert [bar["met"] for bar in capture_cost.judge(results(1.0, 11))] == [True, False]


def test_a_run_captures_every_request_of_one_server(small, two_prompts, tmp_path):
    options = f"{small} {two_prompts} --concurrency 2 --requests 4 --repeats 2 --max-new-tokens 3 --out {tmp_path}/out"
    assert capture_cost.main(options.split()) == 0
    found = json.loads((tmp_path / "out" / "capture_cost.json").read_text())
    assert found["captured"] == 12  # of the three loops, the first of which warms up
    assert len(found["ratios"]) == 2 and all(ratio > 0 for ratio in found["ratios"])
    assert (tmp_path / "out" / "capture_cost.png").stat().st_size > 1000
