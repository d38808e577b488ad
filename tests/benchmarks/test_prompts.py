"""The shipped prompts: benchmark prompts over 8 categories, and the word problems of the demo's domain."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROMPT_FOLDER = ROOT / "benchmarks" / "prompts"
WORD_PROBLEMS = ROOT / "draft" / "data" / "word_problems.jsonl"
CATEGORIES = (
    "chat",
    "writing",
    "code",
    "maths",
    "extraction",
    "summarising",
    "translation",
    "question_answering",
)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every line parsed as JSON; a blank or malformed line fails the test that asked for it."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def normalised(text: str) -> str:
    """Letters and digits only, so that a change of spacing or punctuation does not hide a duplicate."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


@pytest.fixture(scope="module")
def benchmark_prompts() -> list[dict[str, Any]]:
    return [row for path in sorted(PROMPT_FOLDER.glob("*.jsonl")) for row in read_jsonl(path)]


@pytest.fixture(scope="module")
def word_problems() -> list[str]:
    rows = read_jsonl(WORD_PROBLEMS)
    assert all(set(row) == {"prompt"} for row in rows)
    return [row["prompt"] for row in rows]


def test_one_file_for_each_category_and_enough_prompts(benchmark_prompts: list[dict[str, Any]]) -> None:
    assert {path.stem for path in PROMPT_FOLDER.glob("*.jsonl")} == set(CATEGORIES)
    assert len(benchmark_prompts) >= 80


@pytest.mark.parametrize("category", CATEGORIES)
def test_rows_of_a_category_are_well_formed(category: str) -> None:
    rows = read_jsonl(PROMPT_FOLDER / f"{category}.jsonl")
    assert len(rows) >= 10
    for row in rows:
        assert set(row) == {"id", "category", "turns"}
        assert row["category"] == category
        assert row["id"].startswith(category.replace("_", "-") + "-")
        assert isinstance(row["turns"], list) and 1 <= len(row["turns"]) <= 2
        for turn in row["turns"]:
            assert isinstance(turn, str) and turn == turn.strip() and 3 <= len(turn.split()) <= 200, row["id"]
    assert any(len(row["turns"]) == 2 for row in rows)


def test_ids_and_texts_are_unique(benchmark_prompts: list[dict[str, Any]]) -> None:
    ids = [row["id"] for row in benchmark_prompts]
    turns = [normalised(turn) for row in benchmark_prompts for turn in row["turns"]]
    assert len(set(ids)) == len(ids)
    assert len(set(turns)) == len(turns)


def test_word_problems_are_many_unique_and_of_sensible_length(word_problems: list[str]) -> None:
    assert len({normalised(problem) for problem in word_problems}) == len(word_problems) >= 150
    for problem in word_problems:
        assert problem == problem.strip()
        assert 25 <= len(problem.split()) <= 70, problem
        assert "?" in problem and sum(c.isdigit() for c in problem) >= 1, problem


def test_word_problems_are_not_one_problem_with_other_numbers(word_problems: list[str]) -> None:
    openings = {" ".join(problem.split()[:6]) for problem in word_problems}
    wordings = {normalised("".join(c for c in problem if not c.isdigit())) for problem in word_problems}
    assert len(openings) >= 0.95 * len(word_problems)
    assert len(wordings) == len(word_problems)


def test_word_problems_do_not_overlap_the_benchmark(
    benchmark_prompts: list[dict[str, Any]], word_problems: list[str]
) -> None:
    """The demo trains on answers to the word problems, so not one sentence may be a benchmark sentence."""

    def sentences(text: str) -> set[str]:
        marked = text.replace("?", ".").replace("!", ".").replace("\n", ".")
        return {normalised(part) for part in marked.split(".") if len(part.split()) >= 4}

    benchmark = set().union(*(sentences(turn) for row in benchmark_prompts for turn in row["turns"]))
    trained = set().union(*(sentences(problem) for problem in word_problems))
    assert len(benchmark) > 100 and len(trained) > 300
    assert not benchmark & trained
