"""benchmarks.learning: its figures, its bars and its picture, from answers that are made up."""

from dataclasses import asdict

import pytest

from benchmarks import learning
from benchmarks.learning import Answer, Window, figures, judge


def answers(phase: int, start: float, end: float, tokens: int, verifications: int) -> list[Answer]:
    """One answer a second."""
    seconds = range(int(start), int(end))
    return [Answer(phase, "", second, second + 0.5, "x", tokens + 1, tokens, verifications) for second in seconds]


@pytest.fixture
def results():
    """Two phases of 60 s: both the acceptance length and the speed of the second half are 1.25 of the first's."""
    given, windows = [], []
    for phase in (0, 1):
        start = 60.0 * phase
        windows += [
            Window(phase, "first", start, start + 20),
            Window(phase, "learning", start + 20, start + 30),
            Window(phase, "last", start + 40, start + 60),
        ]
        given += answers(phase, start, start + 40, 39, 26) + answers(phase, start + 40, start + 60, 49, 26)
    events = [
        {"time": 22.0, "attempt": 1, "event": "begun", "rows": 20},
        {"time": 30.0, "attempt": 1, "event": "served", "head": "learned-0001"},
    ]
    return {
        "settings": {"domains": ["tickets", "sql"]},
        "windows": [asdict(window) | figures(window, given) for window in windows],
        "failed": 0,
        "different_texts": 0,
        "ledger": events,
        "answers": [asdict(answer) for answer in given],
    }


def test_figures_of_a_window_are_those_of_its_phase_and_time():
    given = [*answers(0, 0, 10, 39, 26), *answers(1, 0, 10, 99, 26), Answer(0, "", 3.0, 4.0, error="status 500")]
    found = figures(Window(0, "first", 2.0, 7.0), given)
    assert found == {"answers": 5, "tau": 1.5, "tokens_per_second": 40.0}
    assert figures(Window(0, "first", 20.0, 30.0), given) == {"answers": 0, "tau": None, "tokens_per_second": 0.0}


def test_each_bar_can_be_missed(results):
    bars = judge(results)
    assert [bar["met"] for bar in bars] == [True] * 7 and bars[0]["figure"] == pytest.approx(49 / 39)
    for change, missed in (
        ({"failed": 1}, "requests that failed"),
        ({"different_texts": 2}, "texts that differ"),
    ):
        wrong = [bar for bar in judge(results | change) if not bar["met"]]
        assert [bar["bar"][: len(missed)] for bar in wrong] == [missed]
    for place, name, missed in (
        (2, "tau", "tickets: acceptance length"),
        (2, "tokens_per_second", "tickets: tokens/s"),
        (5, "tau", "sql: acceptance length"),
        (1, "tokens_per_second", "tokens/s while learning"),
    ):
        windows = [dict(window) for window in results["windows"]]
        windows[place][name] *= 0.75
        wrong = [bar for bar in judge(results | {"windows": windows}) if not bar["met"]]
        assert [bar["bar"][: len(missed)] for bar in wrong] == [missed]
    windows = [window | {"tau": None} for window in results["windows"]]
    assert judge(results | {"windows": windows})[0]["met"] is None


def test_the_picture_and_the_table(results, tmp_path, capsys):
    learning.draw(results, tmp_path / "learning.png")
    assert (tmp_path / "learning.png").stat().st_size > 10_000
    learning.show(learning.shared.make_console(), results | {"bars": judge(results)})
    shown = capsys.readouterr().out
    assert "tickets" in shown and "attempt 1 served" in shown and "MISSED" not in shown


def test_an_earlier_run_is_not_mixed_with_another(tmp_path, capsys):
    (tmp_path / "captured").mkdir()
    assert learning.main(["--out", str(tmp_path)]) == 2
    assert "holds an earlier run (captured)" in capsys.readouterr().err
