"""Quality and speed of a target whose matrices are rounded to int8, against the same target as it is.

int8 rounds the weights in blocks of 32 inputs with a float16 scale, and activations row by row in the same blocks.
Compared are, by passes of the compiled models (a CPU only):

  distributions  over texts that the target wrote itself, greedily and not rounded: the mean KL(a || b) of the next
                 token's distributions in nats, and the share of positions whose most probable token is the same;
                 float32 computes with the same weights, and shows how much bfloat16 itself changes
  questions      multiple choice: the answer is the option with the highest likelihood after "the correct answer is"
  problems       the last number of a greedy answer is compared with the expected one
  speed          plain decoding of the first prompts, one at a time; the formats take turns

  [low, high]    95 % bootstrap interval, resampling texts, questions or problems; differences are paired by question
  p              exact McNemar test of the questions that only one of both answers rightly
  chance         expected accuracy of guessing: a target near it shows little about its format
"""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from benchmarks import shared
from benchmarks.shared import interval_text
from benchmarks.step_costs import weight_bytes
from draft.data.examples import end_of_turn, tokenise
from draft.data.records import BadRow, records
from draft.errors import UserError
from draft.evaluation.tau import bootstrap_ratio
from draft.files import file_sha256
from draft.target import Target, load_target
from serving.engine import Engine, SamplingParams
from serving.engine.kv_cache import RaggedBatch, Segment
from serving.engine.setup import decoding_dtype

MODULE = "benchmarks.weight_formats"
EXAMPLES = f"""
examples:
  distributions and speed in two minutes:
    python -m {MODULE} --target smollm2 --limit 16 --out runs/formats
  accuracy on your own files:
    python -m {MODULE} --target mine.gguf --questions choices.jsonl --problems gsm8k.jsonl --out runs/formats

--questions takes LLM-Adapters' format: `instruction`, which ends with "Answer format: a/b/c", the right one of these
in `answer`, and a `task` to group by. --problems takes `question` and `answer`, a number or a text with it after ####.
"""
REFERENCE, ROUNDED = "float32", "int8"
LEAD = "the correct answer is "
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
AT_ONCE = 256  # problems between two steps of the progress bar


# ---- the program ----


def parse(arguments: Sequence[str]) -> Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    parser.add("--target", required=True, help="hub id, folder, .gguf file, or smollm2")
    parser.add("--target-adapter", metavar="DIR", help="PEFT LoRA adapter of the target, merged in memory")
    parser.add_prompts()
    parser.add("--questions", metavar="FILE", nargs="+", default=[], help="multiple choice, JSONL (also .gz)")
    parser.add("--problems", metavar="FILE", nargs="+", default=[], help="problems with a number as answer, the same")
    parser.add("--limit", shared.whole(1), default=200, metavar="N", help="prompts, questions a task, problems a file")
    parser.add("--max-new-tokens", shared.whole(2), default=128, metavar="N", help="of an answer to a prompt")
    parser.add("--problem-tokens", shared.whole(2), default=192, metavar="N", help="of an answer to a problem")
    parser.add("--speed-prompts", shared.whole(1), default=5, metavar="N", help="prompts that are timed")
    parser.add("--repeats", shared.whole(0), default=5, metavar="N", help="of the timing; 0 leaves it out")
    parser.add("--skip-float32", action="store_true", help="leave the model in float32 out, for want of memory")
    parser.add_dtype()
    parser.add("--threads", shared.whole(1), metavar="N", help="CPU threads (default: all of this process's)")
    parser.add_output(MODULE, check=False)
    return parser.parse_args(arguments)


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    console = shared.make_console()
    out = shared.output_folder(arguments.out)
    disable_progress_bar()
    chosen = shared.load_prompts(arguments.prompts, arguments.limit)
    data = [*arguments.questions, *arguments.problems]
    questions = [row for file in arguments.questions for row in read_questions(file)]
    problems = [row for file in arguments.problems for row in read_problems(file, arguments.limit)]
    questions = limited(questions, arguments.limit)
    engines = load_engines(arguments)
    target = engines[ROUNDED].target
    ids = fitting(target, chosen.prompts, arguments.max_new_tokens)
    both = {name: engines[name] for name in list(engines)[:2]}
    rates = time_decoding(both, ids[: arguments.speed_prompts], arguments.max_new_tokens, arguments.repeats)
    texts = compare_texts(engines, ids, arguments.max_new_tokens)
    answers = answer_questions(both, questions) + answer_problems(both, problems, arguments.problem_tokens)
    results = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, target),
        "prompts": chosen.provenance(len(ids)),
        "data": [{"file": file, "sha256": file_sha256(Path(file))} for file in data],
        "settings": vars(arguments),
        "threads": arguments.threads or shared.cores(),
        "formats": {name: about(engine) for name, engine in engines.items()},
        "distributions": summarise_texts(texts),
        "accuracy": summarise_answers(answers, list(both)),
        "speed": rates,
        "texts": texts,
        "answers": answers,
    }
    show(console, results)
    shared.finish(console, results, out / "weight_formats", draw)
    return 0


def load_engines(arguments: Namespace) -> dict[str, Engine]:
    """Return engines by format, the target as it is first, then int8; each has a target of its own.

    Raises:
        UserError: where the compiled kernels cannot run.
    """

    def build(dtype: str, weights: str) -> Engine:
        wanted = decoding_dtype(dtype, "compiled", arguments.target, weights)
        target = load_target(arguments.target, wanted, device="cpu", adapter=arguments.target_adapter)
        threads = arguments.threads or shared.cores()
        options: dict[str, Any] = {"mode": "compiled", "speculation": "off", "weights": weights, "threads": threads}
        return Engine(target, None, pack_in_place=True, **options)

    engine = build(arguments.dtype, "float")
    engines = {engine.models.weights: engine, ROUNDED: build(arguments.dtype, ROUNDED)}
    if not arguments.skip_float32 and REFERENCE not in engines:
        engines[REFERENCE] = build(REFERENCE, "float")
    return engines


def about(engine: Engine) -> dict[str, Any]:
    """Return what a model computes with, the bytes that a plain step reads, and those of all its tensors."""
    model = engine.models.runner.target.model
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return {
        "dtype": str(engine.target.dtype).removeprefix("torch."),
        "arithmetic": engine.models.arithmetic,
        "bytes_read_a_step": weight_bytes(engine),
        "bytes": sum(kept.values()),
    }


def fitting(target: Target, prompts: Sequence[shared.Prompt], new_tokens: int) -> list[list[int]]:
    """Return the token ids of the prompts that fit the context together with their answers."""
    found = [shared.chat_ids(target, prompt.turns[0]) for prompt in prompts]
    chosen = [ids for ids in found if len(ids) + new_tokens <= target.max_length]
    if not chosen:
        raise shared.nothing_fits(target, new_tokens)
    return chosen


# ---- distributions ----


@torch.inference_mode()
def log_probabilities(engine: Engine, ids: list[int], first: int) -> Tensor:
    """Return log p [tokens from `first` on, vocab] of a text, in float64, by one pass of the engine's model."""
    runner = engine.models.runner
    slot = runner.cache.acquire(len(ids))
    try:
        batch = RaggedBatch.of([Segment(slot, 0, 0, ids[:-1])], runner.target.device)
        return runner.logits(runner.forward(batch)[0][first - 1 :]).double().log_softmax(dim=-1)
    finally:
        runner.cache.release(slot)


def divergence(p: Tensor, q: Tensor) -> dict[str, float]:
    """Return KL(p || q) of log probabilities [positions, vocab] and the positions that agree, each as a sum."""
    return {
        "kl": float((p.exp() * (p - q)).sum()),
        "agreeing": int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum()),
    }


def compare_texts(engines: dict[str, Engine], prompts: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Return a row for each text, and each pair of formats; the first engine writes the texts."""
    plain = next(iter(engines))
    pairs = [(plain, ROUNDED), *((REFERENCE, other) for other in (plain, ROUNDED) if REFERENCE in engines)]
    pairs = [(a, b) for a, b in dict.fromkeys(pairs) if a != b]
    rows = []
    with shared.progress_bar() as progress:
        for index, prompt in enumerate(progress.track(prompts, description="distributions")):
            written = engines[plain].generate([prompt], SamplingParams(new_tokens))[0].token_ids
            ids = [*prompt, *written]
            log_p = {name: log_probabilities(engine, ids, len(prompt)) for name, engine in engines.items()}
            for a, b in pairs:
                found = divergence(log_p[a], log_p[b])
                rows.append({"text": index, "from": a, "to": b, "positions": len(written), **found})
    return rows


def summarise_texts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    summary = []
    for pair in dict.fromkeys((row["from"], row["to"]) for row in rows):
        own = [row for row in rows if (row["from"], row["to"]) == pair]
        positions = [row["positions"] for row in own]
        figures = {
            name: shared.interval_values(bootstrap_ratio([row[key] for row in own], positions), len(own))
            for name, key in (("kl", "kl"), ("agreement", "agreeing"))
        }
        summary.append({"from": pair[0], "to": pair[1], "texts": len(own), "positions": sum(positions), **figures})
    return summary


# ---- accuracy ----


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
    """Return a row for each task, and one for all questions of multiple choice when they are of several tasks."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["task"]), []).append(row)
    if sum(kind == "question" for kind, _ in groups) > 1:
        groups["question", "all questions"] = [row for row in rows if row["kind"] == "question"]
    plain, rounded = formats
    summary = []
    for (kind, task), own in groups.items():
        ones = [1] * len(own)

        def mean(values: Iterable[int], ones: list[int] = ones) -> dict[str, float | None]:
            return shared.interval_values(bootstrap_ratio(list(values), ones), len(ones))

        only = [sum(row[a] and not row[b] for row in own) for a, b in ((plain, rounded), (rounded, plain))]
        summary.append(
            {
                "kind": kind,
                "task": task,
                "count": len(own),
                "chance": statistics.fmean(1 / row["options"] for row in own) if kind == "question" else None,
                **{name: mean(row[name] for row in own) for name in formats},
                "difference": mean(row[rounded] - row[plain] for row in own),
                "only": dict(zip(formats, only, strict=True)),
                "p": mcnemar(*only),
            }
        )
    return summary


def mcnemar(one: int, other: int) -> float:
    """Return the p of the exact, two-sided McNemar test; one, other: pairs in which only that one is right."""
    count = one + other
    tail = sum(math.comb(count, k) for k in range(min(one, other) + 1)) / 2**count
    return min(1.0, 2 * tail)


# ---- speed ----


def time_decoding(
    engines: dict[str, Engine], prompts: list[list[int]], new_tokens: int, repeats: int
) -> dict[str, Any] | None:
    """Return tokens per second of plain decoding by format, and their ratio within a repeat; repeat 0 warms up."""
    params = SamplingParams(new_tokens, ignore_eos=True)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    with shared.progress_bar() as progress:
        for repeat in progress.track(range(repeats + 1 if repeats else 0), description="speed"):
            for name in list(engines)[:: -1 if repeat % 2 else 1]:
                stats = [engines[name].generate([prompt], params)[0].stats for prompt in prompts]
                rates[name].append(sum(one.emitted for one in stats) / sum(one.decode_seconds for one in stats))
    if not repeats:
        return None
    plain, rounded = engines
    ratios = [b / a for a, b in zip(rates[plain][1:], rates[rounded][1:], strict=True)]
    tokens = {name: shared.spread(values[1:]) for name, values in rates.items()}
    return {"tokens_per_second": tokens, "ratio": shared.spread(ratios), "prompts": len(prompts)}


# ---- tables and picture ----


def show(console: Console, results: dict[str, Any]) -> None:
    table = shared.make_table(
        "Distributions of the next token", ("from", "to", "texts", "positions", "KL", "same top-1")
    )
    for row in results["distributions"]:
        kl, same = interval_text(row["kl"], ".5f"), interval_text(row["agreement"], ".4f")
        table.add_row(row["from"], row["to"], str(row["texts"]), str(row["positions"]), kl, same)
    console.print(table)
    plain, rounded = list(results["formats"])[:2]
    if results["accuracy"]:
        headings = ("task", "count", "chance", plain, rounded, "difference", f"only {plain}", f"only {rounded}", "p")
        table = shared.make_table("Accuracy in percent", headings, ("task",))
        for row in results["accuracy"]:
            chance = "–" if row["chance"] is None else f"{100 * row['chance']:.1f}"
            shown = [percent(row[name]) for name in (plain, rounded)] + [percent(row["difference"], "+.1f")]
            only = [str(count) for count in row["only"].values()]
            table.add_row(row["task"], str(row["count"]), chance, *shown, *only, f"{row['p']:.2f}")
        console.print(table)
    for name, about in results["formats"].items():
        read, kept = (about[key] / 2**20 for key in ("bytes_read_a_step", "bytes"))
        speed = results["speed"] and results["speed"]["tokens_per_second"].get(name)
        rate = f"{speed['median']:.1f} tokens/s ({speed['least']:.1f}–{speed['most']:.1f}), " if speed else ""
        console.print(f"{name}: {rate}{read:.0f} MiB of weights a step, {kept:.0f} MiB with the embedding")
    if results["speed"]:
        ratio = results["speed"]["ratio"]
        spread = f"{ratio['median']:.2f} ({ratio['least']:.2f}–{ratio['most']:.2f})"
        console.print(f"{rounded} / {plain}, plain decoding: {spread}, {results['machine']['cpu']}")


def percent(values: dict[str, float | None], form: str = ".1f") -> str:
    return interval_text({key: None if value is None else 100 * value for key, value in values.items()}, form)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw KL of each pair of formats, and accuracy by task."""
    figure, (left, right) = shared.make_figure(2, f"Formats of the weights of {Path(results['target']['name']).name}")

    def bars(axis: Any, rows: list[dict[str, float | None]], places: list[float], **settings: Any) -> None:
        values = [row["value"] or 0.0 for row in rows]
        ends = [
            [abs((row[end] or value) - value) for row, value in zip(rows, values, strict=True)]
            for end in ("low", "high")
        ]
        axis.bar(places, values, yerr=ends, capsize=3, **settings)

    pairs = results["distributions"]
    bars(left, [row["kl"] for row in pairs], list(range(len(pairs))), width=0.5)
    left.set_xticks(range(len(pairs)), [f"{row['from']} || {row['to']}" for row in pairs])
    left.set(ylabel="mean KL, nats a token")
    for at, name in enumerate(list(results["formats"])[:2]):
        tasks = results["accuracy"]
        bars(
            right, [row[name] for row in tasks], [n + 0.4 * at - 0.2 for n in range(len(tasks))], width=0.4, label=name
        )
        right.set_xticks(range(len(tasks)), [row["task"] for row in tasks], rotation=30, ha="right")
    right.set(ylabel="accuracy")
    right.legend(fontsize=8)
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
