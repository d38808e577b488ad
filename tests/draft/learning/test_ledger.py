"""The ledger: lines that are whole, whatever kills their writer, and the table made of them."""

import json

from rich.console import Console

from draft.learning.ledger import Ledger, status_table


def shown(attempts) -> str:
    console = Console(record=True, width=200)
    console.print(status_table(attempts))
    return console.export_text()


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.events() == [] and ledger.attempts() == []
    ledger.append("begun", 1, rows=3)
    whole = ledger.path.read_bytes()
    for cut in (b'{"time": 1, "att', b'{"time": 1}', b"\xff\xfe"):
        ledger.path.write_bytes(whole + cut)
        assert [event["event"] for event in ledger.events()] == ["begun"]
    ledger.append("kept", 1, reason="because")
    lines = ledger.path.read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["begun", "kept"]
    assert ledger.path.stat().st_mode & 0o777 == 0o600
    (attempt,) = ledger.attempts()
    assert attempt.ended and attempt.begun["rows"] == 3


def test_the_table_tells_what_was_measured_and_served(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    interval = {"value": 0.25, "low": 0.125, "high": 0.375}
    tau = {"before": {"value": 1.5}, "after": {"value": 1.875}}
    ledger.append("begun", 1, rows=200)
    ledger.append("judged", 1, domain={**tau, "gain": interval}, general_gain=None)
    ledger.append("served", 1, head="learned-0001-abc")
    ledger.append("rolled back", 1, head="learned-0001-abc", reason="worse than before")
    ledger.append("begun", 2, rows=300)
    text = shown(ledger.attempts())
    for part in ("1.500 → 1.875", "+25.0 % [+12.5, +37.5]", "not measured", "served as learned-0001-abc"):
        assert part in text
    assert text.index("served as") < text.index("rolled back: worse") and "unfinished, after begun" in text
