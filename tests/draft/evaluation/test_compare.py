"""The paired comparison, its gate, and what it writes; τ and its intervals."""

import hashlib
import io
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_tiny_head
from rich.console import Console
from trained_heads import make_row, responses_of, train_briefly

import draft.evaluation.compare
from draft.data.dataset import conversation_id, open_dataset, write_dataset
from draft.errors import UserError
from draft.evaluation.compare import Contender, compare, general_rows, record_trained_rows, row_ids, trained_row_ids
from draft.evaluation.replay import replay
from draft.evaluation.report import print_report, summary, write_report
from draft.evaluation.tau import Interval, acceptance_length, bootstrap_gain, bootstrap_ratio
from draft.files import read_json
from draft.heads.checkpoint import PRETRAINED

ROWS = 24


@pytest.fixture(scope="module")
def rows(tiny_target):
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 259, (4,), generator=generator).tolist() for _ in range(ROWS)]
    made = []
    for temperature in (0.0, 1.0):
        responses = responses_of(tiny_target, prompts, 10, temperature)
        for prompt, response in zip(prompts, responses, strict=True):
            made.append(make_row(prompt, response, temperature, id=conversation_id(prompt)))
    return made


@pytest.fixture(scope="module")
def better(tiny_target, tiny_head, rows):
    """The tiny head after some steps on the rows' own text."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    return train_briefly(make_tiny_head(tiny_target), tiny_target, ids, draft_steps=2, rate=5e-3, steps=25)


COMMAND = "draft-train merge /home/me/run --out ~/heads/new --data=/srv/x/data runs/a/b Hugging/Face https://a.b/c/d"
PUBLIC = "draft-train merge run --out new --data=data runs/a/b Hugging/Face https://a.b/c/d"


def contender(name, head, **about):
    return Contender(name, head, {"trained_rows": [], **about})


@pytest.fixture(scope="module")
def comparison(tiny_target, tiny_head, better, rows):
    base = contender("base", tiny_head)
    new = contender("/home/someone/heads/new", better, command=COMMAND)
    new.about["trained_rows"].extend(["0" * 12, "1" * 12])
    return compare(tiny_target, base, new, rows, rows[: ROWS // 2], max_steps=5, resamples=500)


def test_numbers_are_those_of_replay(tiny_target, tiny_head, better, rows, comparison):
    alone = replay(tiny_target, {"baseline": tiny_head, "candidate": better}, rows, 5)
    domain, general = (comparison.measurements[name] for name in ("domain", "general"))
    for length in (1, 3, 5):
        for name, result in alone.items():
            assert domain.greedy.taus[name][length - 1].value == result.tau(length)
            assert (domain.replay(name).blocks == result.blocks).all()
        gain = bootstrap_gain(*(result.units(length).tolist() for result in alone.values()), resamples=500)
        assert domain.greedy.gains[length - 1] == gain
    assert domain.greedy.conversations == domain.sampled.conversations == ROWS
    # the first rows are the greedy ones
    assert general.greedy.conversations == ROWS // 2 and general.sampled is None


def test_a_better_head_ships_and_a_worse_one_does_not(tiny_target, tiny_head, better, rows, comparison):
    assert comparison.gain(comparison.measurements["domain"]).low > 0
    assert comparison.ship and comparison.verdict == "ship"
    options = {"max_steps": 2, "deciding_length": 2, "resamples": 200}
    back = compare(tiny_target, contender("new", better), contender("base", tiny_head), rows, **options)
    assert not back.ship and back.verdict == "don't ship"
    same = compare(tiny_target, contender("new", better), contender("copy", better), rows, **options)
    assert same.gain(same.measurements["domain"]) == Interval(0, 0, 0)
    assert not same.ship


@pytest.mark.parametrize(
    ("domain_low", "general_low", "ship"),
    [
        (0.01, None, True),
        (0.0, None, False),
        (-0.01, None, False),
        (math.nan, None, False),
        (0.01, -0.019, True),
        (0.01, -0.02, False),
        (0.01, 0.05, True),
        (-0.01, 0.05, False),
        (0.01, math.nan, False),
    ],
)
def test_the_gate(comparison, domain_low, general_low, ship):
    def measurement(low):
        gains = [Interval(9.0, 9.0, 9.0)] * 4 + [Interval(0.5, low, 0.9)]  # only the deciding length counts
        domain = comparison.measurements["domain"]
        return replace(domain, greedy=replace(domain.greedy, gains=gains))

    lows = {"domain": domain_low, "general": general_low}
    measurements = {name: measurement(low) for name, low in lows.items() if low is not None}
    assert replace(comparison, measurements=measurements).ship is ship


@pytest.mark.parametrize("listed", [False, True], ids=["packed", "an older file's list"])
def test_rows_that_either_head_was_trained_on_are_refused(tiny_target, tiny_head, rows, listed):
    record = sorted(row_ids(rows[:3])) if listed else record_trained_rows(rows[:3], {})
    base = contender("base", tiny_head)
    trained = contender("new", tiny_head, trained_rows=record)
    with pytest.raises(UserError, match=f"3 of the {ROWS} domain .*the candidate was.* held-out .* other prompts"):
        compare(tiny_target, base, trained, rows[:ROWS], max_steps=1, deciding_length=1)
    with pytest.raises(UserError, match="3 of the 4 general rows"):
        compare(tiny_target, base, trained, rows[4:ROWS], rows[:4], max_steps=1, deciding_length=1)
    # the same prompts answered at temperature 1 are the same conversations
    with pytest.raises(UserError, match="3 of the 48 domain rows"):
        compare(tiny_target, base, trained, rows[ROWS:] + rows[3:ROWS] + rows[:3], max_steps=1, deciding_length=1)
    # a baseline that knows the rows is measured too high, and a better candidate would not ship
    with pytest.raises(UserError, match=f"3 of the {ROWS} domain rows .*the baseline was"):
        compare(tiny_target, trained, base, rows[:ROWS], max_steps=1, deciding_length=1)
    compare(tiny_target, trained, trained, rows[3:ROWS], max_steps=1, deciding_length=1, resamples=100)


def test_rows_that_a_head_was_trained_on_are_left_out_when_asked(tiny_target, tiny_head, rows, caplog):
    base, trained = (
        contender("base", tiny_head),
        contender("new", tiny_head, trained_rows=record_trained_rows(rows[:3], {})),
    )
    options = {"max_steps": 1, "deciding_length": 1, "resamples": 100}
    left = compare(tiny_target, base, trained, rows[:ROWS], leave_out_trained=True, **options)
    alone = compare(tiny_target, base, trained, rows[3:ROWS], **options)
    assert left.measurements["domain"].greedy.conversations == alone.measurements["domain"].greedy.conversations > 0
    assert left.measurements["domain"].greedy.taus == alone.measurements["domain"].greedy.taus
    assert "3 domain rows are left out, since the candidate was trained on them" in caplog.text
    both = contender("base", tiny_head, trained_rows=record_trained_rows(rows[:3], {}))
    caplog.clear()
    compare(tiny_target, both, trained, rows[:ROWS], leave_out_trained=True, **options)
    assert [record.getMessage()[:20] for record in caplog.records] == ["3 domain rows are le"]
    with pytest.raises(UserError, match="greed"):
        compare(tiny_target, base, trained, rows[:3], leave_out_trained=True, **options)


def test_the_bundled_head_was_not_trained_on_the_general_rows_that_ship():
    trained = trained_row_ids(read_json(PRETRAINED / "smollm2-eagle3" / "draftsmith.json"))
    shipped = row_ids(open_dataset(draft.evaluation.compare.GENERAL_ROWS).rows("held-out"))
    assert len(trained) == 15860 and shipped and not trained & shipped


def test_the_record_of_trained_rows_is_compact_and_exact(rows):
    names = [f"{number:064x}" for number in range(0, 2**62, 2**62 // 997)]
    ids = {hashlib.sha256(name.encode()).hexdigest()[:16] for name in names}
    record = record_trained_rows([replace(rows[0], id=id) for id in ids], {})
    assert len(json.dumps(record)) < 8 * len(ids) + 80
    assert trained_row_ids({"trained_rows": record}) == {id[:12] for id in ids}
    # the rows of the base head are kept, whether it has the list of older files or a record
    old = {"trained_rows": ["0011351f8585"]}
    for base in (old, {"trained_rows": record_trained_rows([], old)}):
        assert trained_row_ids({"trained_rows": record_trained_rows(rows, base)}) == row_ids(rows) | {"0011351f8585"}
    assert trained_row_ids({}) is None and trained_row_ids({"trained_rows": []}) == set()
    for damage in ({"format": "bloom"}, {"ids": "%"}, {"ids": record["ids"][8:]}, {"count": None}):
        with pytest.raises(UserError, match="trained_rows in the head's draftsmith.json"):
            trained_row_ids({"trained_rows": {**record, **damage}})
    with pytest.raises(UserError, match="trained_rows"):
        trained_row_ids({"trained_rows": "all"})


def test_mistakes_are_told(tiny_target, tiny_head, rows):
    base = contender("base", tiny_head)
    with pytest.raises(UserError, match="deciding_length = 9"):
        compare(tiny_target, base, base, rows, deciding_length=9)
    with pytest.raises(UserError, match="0123"):
        compare(tiny_target, base, contender("new", tiny_head, target_fingerprint="0123"), rows)
    with pytest.raises(UserError, match="temperature 0"):
        compare(tiny_target, base, base, rows[ROWS:])


def test_warnings(tiny_target, tiny_head, rows, comparison):
    assert comparison.warnings == [w for w in comparison.warnings if w.startswith("general: only 12 greedy")]
    first, second = (Contender(name, tiny_head, {}) for name in "ab")
    few = compare(tiny_target, first, second, rows[:3], max_steps=1, deciding_length=1)
    assert [w.split()[0] for w in few.warnings] == ["domain:", "the", "general"]
    assert "only 3 greedy conversations" in few.warnings[0]
    chosen = Contender("c", tiny_head, {"kept_by": [rows[0].id, "another"]})
    warned = compare(tiny_target, first, chosen, rows[:3], max_steps=1, deciding_length=1).warnings
    assert "domain: 1 of the 3 conversations also chose the candidate's checkpoint" in warned[1]


def test_the_report(comparison, tiny_target, tmp_path):
    write_report(comparison, tmp_path / "out", Console(quiet=True))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"comparison.json", "comparison.md", "comparison.png"}
    text = (tmp_path / "out" / "comparison.json").read_text()
    values = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
    assert values["verdict"] == "ship" and values["deciding_length"] == 5
    assert values["target"] == {"name": "tiny", "fingerprint": tiny_target.fingerprint}
    assert values["heads"]["candidate"] == {"name": "new", "about": {"trained_rows": 2, "command": PUBLIC}}
    fifth = values["domain"]["greedy"]["speculation_lengths"][4]
    replayed = comparison.measurements["domain"].replay("candidate")
    assert fifth["speculation_length"] == 5
    assert fifth["candidate"]["acceptance_length"]["value"] == replayed.tau(5)
    assert fifth["candidate"]["acceptance_per_position"] == replayed.acceptance_per_position(5)
    assert fifth["candidate"]["conditional_acceptance_per_position"][0] == replayed.acceptance_per_position(5)[0]
    assert fifth["candidate"]["emitted"] / fifth["candidate"]["verifications"] == replayed.tau(5)
    assert fifth["gain"]["low"] == comparison.gain(comparison.measurements["domain"]).low
    assert values["domain"]["temperature_1"]["conversations"] == ROWS
    assert values["general"]["temperature_1"] is None
    markdown = (tmp_path / "out" / "comparison.md").read_text()
    assert markdown.startswith("# Ship\n") and summary(comparison) in markdown
    assert "/home" not in text + markdown
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_costs_the_picture_only(comparison, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    console = Console(file=io.StringIO(), width=200)
    write_report(comparison, tmp_path, console)
    assert {path.name for path in tmp_path.iterdir()} == {"comparison.json", "comparison.md"}
    assert "comparison.png is not drawn" in console.file.getvalue()
    assert "pip install 'draftsmith[train]'" in console.file.getvalue()


def test_unknown_numbers_are_null(comparison, tmp_path):
    domain = comparison.measurements["domain"]
    empty = {name: replace(result, blocks=result.blocks * 0) for name, result in domain.greedy.results.items()}
    domain = replace(domain, greedy=replace(domain.greedy, results=empty))
    write_report(replace(comparison, measurements={"domain": domain}), tmp_path, Console(quiet=True))
    values = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert values["general"] is None
    assert values["domain"]["greedy"]["speculation_lengths"][0]["baseline"]["acceptance_per_position"] == [None]


def test_the_table(comparison):
    console = Console(file=io.StringIO(), width=110)
    print_report(comparison, console)
    shown = console.file.getvalue()
    for title in ("Domain, temperature 1", "General, greedy, 12 conv", "Verdict at K = 5: ship"):
        assert title in shown
    assert "General, temperature 1" not in shown
    assert str(comparison.measurements["domain"].greedy.taus["candidate"][4]) in shown


def test_general_rows(tiny_target, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(draft.evaluation.compare, "GENERAL_ROWS", tmp_path / "general")
    with pytest.raises(UserError, match="--general"):
        general_rows(tiny_target)
    (tmp_path / "general").mkdir()
    held_out = [replace(row, split="held-out") for row in rows]
    manifest = {"target": "tiny", "target_fingerprint": tiny_target.fingerprint, "template_hash": "", "seed": 0}
    manifest |= {"eos_token_ids": [2], "sources": [], "counts": {"train": {}, "held-out": {}}}
    write_dataset(tmp_path / "general", held_out, manifest)
    assert general_rows(tiny_target) == held_out
    write_dataset(tmp_path / "general", held_out, {**manifest, "target_fingerprint": "another"})
    assert general_rows(tiny_target) is None


# ---- τ and its intervals ----


def test_the_bonus_token_counts():
    assert acceptance_length(emitted=12, verifications=5) == 2.4
    assert math.isnan(acceptance_length(0, 0))


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios():
    interval = bootstrap_ratio([10, 1], [2, 1])
    assert interval.value == pytest.approx(11 / 3)
    assert interval.low <= interval.value <= interval.high


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        verifications = rng.integers(20, 60, size=60)
        emitted = verifications * rng.normal(2.0, 0.3, size=60)
        interval = bootstrap_ratio(emitted, verifications, resamples=1000, seed=seed)
        covered += interval.low <= 2.0 <= interval.high
    assert 180 <= covered <= 199


def test_pairing_removes_what_both_have_in_common():
    rng = np.random.default_rng(1)
    difficulty = rng.normal(2.0, 0.6, size=50)
    baseline = [(100 * d, 100.0) for d in difficulty]
    candidate = [(103 * d, 100.0) for d in difficulty]
    gain = bootstrap_gain(baseline, candidate)
    assert gain.value == pytest.approx(0.03) and gain.low == pytest.approx(0.03) and gain.high == pytest.approx(0.03)
    assert bootstrap_gain(baseline, baseline).high == 0
    shuffled = bootstrap_gain(baseline, candidate[::-1])
    assert shuffled.high - shuffled.low > 0.1


def test_nothing_measured_is_not_a_number():
    assert math.isnan(bootstrap_ratio([], []).value)
