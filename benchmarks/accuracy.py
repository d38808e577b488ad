"""Accuracy of the same target in several formats of its weights, on a user's questions and problems."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import shared
from draft.data.examples import end_of_turn, tokenise
from draft.data.records import BadRow, records
from draft.errors import UserError
from draft.evaluation.tau import bootstrap_ratio
from serving.engine import Engine, SamplingParams
from serving.engine.kv_cache import RaggedBatch, Segment

LEAD = "the correct answer is "
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
AT_ONCE = 256  # problems between two steps of the progress bar


class Question(NamedTuple):
    """A question of multiple choice, and the place of the right option."""

    task: str
    text: str
    options: tuple[str, ...]
    right: int


class Problem(NamedTuple):
    """A question whose answer is a number."""

    task: str
    text: str
    expected: float


def rows_of(file: str, column: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield the place and content of the rows of a file; UserError for one without text in `column`, or an answer."""
    for where, row in records(file):
        if isinstance(row, BadRow):
            raise UserError(f"{where}: {row}") from row
        if not isinstance(row, dict) or not isinstance(row.get(column), str) or row.get("answer") is None:
            raise UserError(f"{where}: needs `{column}`, a text, and `answer`; correct that line.")
        yield where, row


def read_questions(file: str) -> list[Question]:
    found = []
    for where, row in rows_of(file, "instruction"):
        options = tuple(dict.fromkeys(row["instruction"].rpartition("Answer format:")[2].strip().split("/")))
        if len(options) < 2 or row["answer"] not in options:
            raise UserError(
                f'{where}: `instruction` must end with "Answer format: a/b/c", of which `answer`, '
                f"{row['answer']!r}, must be one; correct that line."
            )
        task = str(row.get("task") or stem(file))
        found.append(Question(task, row["instruction"], options, options.index(row["answer"])))
    return found


def read_problems(file: str, limit: int) -> list[Problem]:
    found = []
    for where, row in rows_of(file, "question"):
        expected = last_number(str(row["answer"]).rpartition("####")[2])
        if expected is None:
            raise UserError(f"{where}: `answer` has no number: {row['answer']!r}; correct that line.")
        found.append(Problem(stem(file), row["question"], expected))
    return [found[at] for at in spaced(len(found), limit)]


def stem(file: str) -> str:
    return Path(file).name.partition(".")[0]


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def spaced(count: int, limit: int) -> list[int]:
    """Return at most `limit` of the places 0 to count - 1, at equal distances: a file may be sorted."""
    kept = min(count, limit)
    return [index * count // kept for index in range(kept)]


def limited(questions: list[Question], limit: int) -> list[Question]:
    """Return at most `limit` questions of each task."""
    tasks: dict[str, list[Question]] = {}
    for question in questions:
        tasks.setdefault(question.task, []).append(question)
    return [rows[at] for rows in tasks.values() for at in spaced(len(rows), limit)]


@torch.inference_mode()
def option_scores(engine: Engine, prompt: list[int], options: list[list[int]]) -> list[float]:
    """Return the log likelihood of each option after the prompt, up to what all have in common: two passes.

    The options are branches of one tree, none of them the beginning of another.
    """
    runner = engine.models.runner
    common = len(os.path.commonprefix(options))
    known, branches = prompt + options[0][:common], [option[common:] for option in options]
    ids, parents, ends = list[int](), list[int](), list[int]()
    for branch in branches:  # whose last token is predicted, and not read
        parents += [-1 if at == 0 else len(ids) + at - 1 for at in range(len(branch) - 1)]
        ids += branch[:-1]
        ends.append(len(ids))
    slot = runner.cache.acquire(len(known) + len(ids))
    try:
        segments = [Segment(slot, 0, 0, known), Segment(slot, len(known), len(known), ids, parents)]
        passes = [runner.forward(RaggedBatch.of([each], runner.target.device))[0] for each in segments if each.ids]
        hidden = torch.cat([passes[0][-1:], *passes[1:]])
        log_p = runner.logits(hidden).double().log_softmax(dim=-1)
    finally:
        runner.cache.release(slot)
    scores = []
    for branch, end in zip(branches, ends, strict=True):
        rows = [0, *range(end - len(branch) + 2, end + 1)]
        scores.append(float(log_p[rows, branch].sum()))
    return scores


def answer_questions(engines: dict[str, Engine], questions: list[Question]) -> list[dict[str, Any]]:
    target = next(iter(engines.values())).target
    end, rows = end_of_turn(target), []
    with shared.progress_bar() as progress:
        for task, text, options, right in progress.track(questions, description="questions"):
            prompt = shared.chat_ids(target, text)
            choices = [[*tokenise(target, LEAD + option), end] for option in options]
            row: dict[str, Any] = {"kind": "question", "task": task, "options": len(options)}
            for name, engine in engines.items():
                scores = option_scores(engine, prompt, choices)
                row[name] = scores.index(max(scores)) == right
            rows.append(row)
    return rows


def answer_problems(engines: dict[str, Engine], problems: list[Problem], new_tokens: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"kind": "problem", "task": problem.task} for problem in problems]
    with shared.progress_bar() as progress:
        bar = progress.add_task("problems", total=len(engines) * len(problems))
        for name, engine in engines.items():
            prompts = [shared.chat_ids(engine.target, problem.text) for problem in problems]
            for first in range(0, len(prompts), AT_ONCE):
                answers = engine.generate(prompts[first : first + AT_ONCE], SamplingParams(new_tokens))
                for at, answer in enumerate(answers, first):
                    found = last_number(answer.text)
                    rows[at][name] = found is not None and math.isclose(found, problems[at].expected, rel_tol=1e-6)
                progress.advance(bar, len(answers))
    return rows


def summarise_answers(rows: list[dict[str, Any]], formats: list[str]) -> list[dict[str, Any]]:
    """Return a row for each task, and one for all questions of multiple choice when they are of several tasks.

    formats: the plain one first, which each of the others is compared with.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["task"]), []).append(row)
    if sum(kind == "question" for kind, _ in groups) > 1:
        groups["question", "all questions"] = [row for row in rows if row["kind"] == "question"]
    plain, *rounded = formats
    summary = []
    for (kind, task), own in groups.items():
        ones = [1] * len(own)

        def mean(values: Iterable[int], ones: list[int] = ones) -> dict[str, float | None]:
            return shared.interval_values(bootstrap_ratio(list(values), ones), len(ones))

        def only(one: str, other: str, own: list[dict[str, Any]] = own) -> int:
            return sum(row[one] and not row[other] for row in own)

        summary.append(
            {
                "kind": kind,
                "task": task,
                "count": len(own),
                "chance": statistics.fmean(1 / row["options"] for row in own) if kind == "question" else None,
                **{name: mean(row[name] for row in own) for name in formats},
                "against": {
                    name: {
                        "difference": mean(row[name] - row[plain] for row in own),
                        "only": {plain: only(plain, name), name: only(name, plain)},
                        "p": mcnemar(only(plain, name), only(name, plain)),
                    }
                    for name in rounded
                },
            }
        )
    return summary


def mcnemar(one: int, other: int) -> float:
    """Return the p of the exact, two-sided McNemar test; one, other: pairs in which only that one is right."""
    count = one + other
    tail = sum(math.comb(count, k) for k in range(min(one, other) + 1)) / 2**count
    return min(1.0, 2 * tail)
