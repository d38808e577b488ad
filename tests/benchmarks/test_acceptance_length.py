"""benchmarks.acceptance_length, run as a user runs it: on folders, through `main`, judged by the files it writes."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import acceptance_length
from draft.target import load_target

PROMPTS = [
    {"id": "a", "category": "chat", "turns": ["Hello there", "And then?"]},
    {"id": "b", "category": "chat", "turns": ["What is a fox?"]},
    {"question_id": 3, "category": "code", "prompt": "print the first primes"},
]
CATEGORIES = {"overall": 3, "chat": 2, "code": 1}  # prompts of each
VARIANT_KEYS = ("temperature", "head", "rule", "speculation_length")


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(models: Path, out: Path, *options: str, heads: tuple[str, ...] = ("first",)) -> int:
    named = [part for head in heads for part in ("--head", str(models / head))]
    common = ["--target", str(models / "target"), *named, "--dtype", "float64", "--out", str(out)]
    return acceptance_length.main([*common, "--max-new-tokens", "12", *options])


@pytest.fixture(scope="module")
def outcome(models, tmp_path_factory):
    """One whole run: two identical heads and another one, two temperatures, both rules, two lengths."""
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    file = write_jsonl(out.parent.parent / "prompts.jsonl", PROMPTS)
    options = ("--prompts", str(file), "--temperature", "0", "1", "--speculation-length", "1", "3")
    assert run(models, out, *options, heads=("first", "copy", "other")) == 0
    return out


@pytest.fixture(scope="module")
def results(outcome):
    return json.loads((outcome / "acceptance_length.json").read_text())


def members(results: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The records that a row of the summary is made of."""
    alike = [record for record in results["records"] if all(record[key] == row[key] for key in VARIANT_KEYS)]
    return [record for record in alike if row["category"] in ("overall", record["category"])]


def test_every_row_of_the_summary_is_what_its_records_say(results):
    found = [tuple(row[key] for key in (*VARIANT_KEYS, "category")) for row in results["summary"]]
    heads, decoded = ("first", "copy", "other"), ((0.0, "greedy"), (1.0, "shared-noise"), (1.0, "rejection"))
    parts = itertools.product(decoded, heads, (1, 3), CATEGORIES)
    assert sorted(found) == sorted((degrees, head, rule, k, part) for (degrees, rule), head, k, part in parts)
    for row in results["summary"]:
        records, length = members(results, row), row["speculation_length"]
        plain = members(results, {**row, "head": None, "rule": None, "speculation_length": 0})
        assert [(r["prompt"], r["turn"]) for r in plain] == [(r["prompt"], r["turn"]) for r in records]
        assert all(record["verifications"] == record["tokens"] - 1 for record in plain)
        assert (row["answers"], row["prompts"]) == (len(records), CATEGORIES[row["category"]])
        emitted = sum(record["tokens"] - 1 for record in records)  # the prefill gave the first token
        tau, speed_up = row["acceptance_length"], row["speed_up"]
        assert tau["value"] == pytest.approx(emitted / sum(r["verifications"] for r in records), rel=1e-12)
        drafted, accepted = (
            [sum(record[name][at] for record in records) for at in range(length)]
            for name in ("drafted_per_position", "accepted_per_position")
        )
        assert row["acceptance_per_position"] == [a / d for a, d in zip(accepted, drafted, strict=True)]
        assert row["acceptance_rate"] == sum(accepted) / sum(drafted)
        assert accepted == sorted(accepted, reverse=True)  # a later token is accepted only behind the earlier ones
        speeds = [sum(r["emitted"] for r in part) / sum(r["decode_seconds"] for r in part) for part in (plain, records)]
        assert [row["plain_tokens_per_second"], row["tokens_per_second"]] == pytest.approx(speeds)
        assert speed_up["value"] == pytest.approx(speeds[1] / speeds[0])
        if row["prompts"] == 1:  # one prompt has no spread to tell
            assert tau["low"] is tau["high"] is speed_up["low"] is speed_up["high"] is None
        else:
            assert all(each["low"] <= each["value"] <= each["high"] for each in (tau, speed_up))
        assert row["identical_share"] == (None if row["rule"] == "rejection" else 1.0), row
    assert any(row["acceptance_length"]["value"] > 1 for row in results["summary"])  # something was accepted
    rejected = [record for record in results["records"] if record["rule"] == "rejection"]
    assert any(record["first_difference"] is not None for record in rejected)  # so a difference would be seen


def test_every_variant_sees_the_same_context_and_seed(results):
    contexts: dict[tuple[str, int, float], set[tuple[int, int]]] = {}
    for record in results["records"]:
        key = record["prompt"], record["turn"], record["temperature"]
        contexts.setdefault(key, set()).add((record["prompt_tokens"], record["seed"]))
    assert all(len(seen) == 1 for seen in contexts.values())
    seeds = {key: next(iter(seen))[1] for key, seen in contexts.items() if key[2] == 1}
    assert len(set(seeds.values())) == len(seeds) == 4
    expected = int.from_bytes(hashlib.sha256(b"0:a:1").digest()[:8], "big") >> 1
    assert seeds["a", 1, 1.0] == expected


def test_a_second_turn_follows_the_plain_answer(results, models):
    plain = [record for record in results["records"] if record["head"] is None and record["temperature"] == 0]
    first, second = [record for record in plain if record["prompt"] == "a"]
    template = len("<>user\n<>\n") + len("<>assistant\n")  # one token for each of the chat marks
    assert first["prompt_tokens"] == len("Hello there") + template - 2 - 1
    target = load_target(str(models / "target"), "float64")
    ids = target.encode_chat([{"role": "user", "content": "Hello there"}], add_generation_prompt=True)
    answer = target.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert len(answer) == first["tokens"]
    history = [("user", "Hello there"), ("assistant", target.decode(answer)), ("user", "And then?")]
    messages = [{"role": role, "content": text} for role, text in history]
    assert second["prompt_tokens"] == len(target.encode_chat(messages, add_generation_prompt=True))


def test_identical_heads_gain_nothing_and_others_are_compared(results):
    pairs = {(row["baseline"], row["candidate"]) for row in results["comparisons"]}
    assert pairs == {("first", "copy"), ("first", "other")}
    summary = {tuple(row[key] for key in (*VARIANT_KEYS, "category")): row for row in results["summary"]}
    for row in results["comparisons"]:
        below, above = (
            summary[row["temperature"], row[side], row["rule"], row["speculation_length"], row["category"]]
            for side in ("baseline", "candidate")
        )
        ratio = above["acceptance_length"]["value"] / below["acceptance_length"]["value"]
        assert row["value"] == pytest.approx(ratio - 1, abs=1e-12)
        assert row["candidate"] == "other" or row["value"] == 0
        assert row["prompts"] == CATEGORIES[row["category"]]
        if row["prompts"] == 1:
            assert row["low"] is row["high"] is None
        else:
            assert row["low"] <= row["value"] + 1e-12 and row["value"] - 1e-12 <= row["high"]
    assert any(row["value"] != 0 for row in results["comparisons"])


def test_gain_is_paired_by_prompt():
    """Twice the tokens a verification on every prompt is a gain of exactly 1, however different the prompts are."""

    def record(prompt, head, emitted, verifications):
        variant = {"temperature": 0.0, "head": head, "rule": "greedy", "speculation_length": 5}
        return {**variant, "prompt": prompt, "category": "c", "emitted": emitted, "verifications": verifications,
                "decode_seconds": 1.0}  # fmt: skip

    sizes = {"short": (10, 9), "long": (90, 30), "empty": (0, 0)}
    records = [record(prompt, "a", emitted, steps) for prompt, (emitted, steps) in sizes.items()]
    records += [record(prompt, "b", 2 * emitted, steps) for prompt, (emitted, steps) in sizes.items()]
    rows = acceptance_length.compare(acceptance_length.group(records), ["a", "b"])
    assert [row["category"] for row in rows] == ["overall", "c"]
    for row in rows:
        assert [row["value"], row["low"], row["high"]] == pytest.approx([1, 1, 1])
        assert row["prompts"] == 2  # the empty answer has no verifications to compare


def test_provenance_and_picture(results, outcome, models):
    assert results["commit"] and results["command"].startswith("python -m benchmarks.acceptance_length --target")
    assert results["machine"].items() >= {"dtype": "float64"}.items() and results["machine"]["cores"] >= 1
    file = outcome.parent.parent / "prompts.jsonl"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert results["prompts"] == {"files": [str(file)], "sha256": sha256, "count": 3}
    assert results["target"]["fingerprint"] == load_target(str(models / "target"), "float64").fingerprint
    weights = (models / "first" / "model.safetensors").read_bytes()
    assert results["heads"][0]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert (outcome / "acceptance_length.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in outcome.iterdir()) == ["acceptance_length.json", "acceptance_length.png"]


def test_prints_the_tables_and_leaves_out_prompts_too_long_for_the_context(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # heads of one name are told apart by their paths, which are long here
    prompts = [{"id": "long", "turns": ["x" * 500]}, {"id": "short", "category": "[/red]", "question": "Hi"}]
    options = ("--prompts", str(write_jsonl(tmp_path / "p.jsonl", prompts)), "--speculation-length", "2")
    assert run(models, tmp_path, *options, "--temperature", "0", heads=("first", "first")) == 0
    printed = capsys.readouterr().out.replace(str(models) + "/", "")
    for words in ("All categories", "By category at K = 2", "[/red]", "first (1)", "first (2)", "no difference shown"):
        assert words in printed
    results = json.loads((tmp_path / "acceptance_length.json").read_text())
    assert results["skipped"] == ["long"] and {record["prompt"] for record in results["records"]} == {"short"}


def test_an_interrupted_run_keeps_complete_prompts(models, tmp_path, monkeypatch):
    whole = acceptance_length.Measurement.run

    def until_the_third(self, index, *rest):
        if index == 2:
            raise KeyboardInterrupt
        return whole(self, index, *rest)

    monkeypatch.setattr(acceptance_length.Measurement, "run", until_the_third)
    file = write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    assert run(models, tmp_path, "--prompts", str(file), "--temperature", "0", "--speculation-length", "2") == 130
    results = json.loads((tmp_path / "acceptance_length.json").read_text())
    assert results["interrupted"] is True
    assert {record["prompt"] for record in results["records"]} == {"a", "3"}  # categories take turns
