"""The shipped prompts: benchmark prompts over 8 categories, and the word problems of the demonstration."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CATEGORIES = ("chat", "writing", "code", "maths", "extraction", "summarising", "translation", "question_answering")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def normalised(text: str) -> str:
    """Keep letters and digits only, so that a change of spacing or punctuation does not hide a duplicate."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def sentences(texts: list[str]) -> set[str]:
    return {normalised(part) for text in texts for part in re.split(r"[.?!\n]", text) if len(part.split()) >= 4}


@pytest.fixture(scope="module")
def benchmark_rows() -> dict[str, list[dict[str, Any]]]:
    return {path.stem: read_jsonl(path) for path in (ROOT / "benchmarks" / "prompts").glob("*.jsonl")}


@pytest.fixture(scope="module")
def word_problems() -> list[str]:
    return [row["prompt"] for row in read_jsonl(ROOT / "draft" / "data" / "word_problems.jsonl")]


def test_benchmark_prompts_are_well_formed_and_unique(benchmark_rows: dict[str, list[dict[str, Any]]]) -> None:
    assert benchmark_rows.keys() == set(CATEGORIES)
    for category, rows in benchmark_rows.items():
        assert len(rows) >= 10 and any(len(row["turns"]) == 2 for row in rows)
        for row in rows:
            assert set(row) == {"id", "category", "turns"} and row["category"] == category
            assert row["id"].startswith(category.replace("_", "-") + "-")
            assert isinstance(row["turns"], list) and 1 <= len(row["turns"]) <= 2
            assert all(turn == turn.strip() and 3 <= len(turn.split()) <= 200 for turn in row["turns"]), row["id"]
    together = [row for rows in benchmark_rows.values() for row in rows]
    turns = [normalised(turn) for row in together for turn in row["turns"]]
    assert len({row["id"] for row in together}) == len(together) >= 80 and len(set(turns)) == len(turns)


def test_word_problems_are_many_and_different(word_problems: list[str]) -> None:
    for problem in word_problems:
        assert problem == problem.strip() and 25 <= len(problem.split()) <= 70, problem
        assert "?" in problem and any(c.isdigit() for c in problem), problem
    openings = {" ".join(problem.split()[:6]) for problem in word_problems}
    wordings = {normalised(re.sub(r"\d", "", problem)) for problem in word_problems}  # not one with other numbers
    assert len(openings) >= 0.95 * len(word_problems) and len(wordings) == len(word_problems) >= 150


def test_word_problems_do_not_overlap_the_benchmark(
    benchmark_rows: dict[str, list[dict[str, Any]]], word_problems: list[str]
) -> None:
    """The demonstration trains on answers to the word problems: not one sentence may be a benchmark sentence."""
    benchmark = sentences([turn for rows in benchmark_rows.values() for row in rows for turn in row["turns"]])
    trained = sentences(word_problems)
    assert len(benchmark) > 100 and len(trained) > 300 and not benchmark & trained
