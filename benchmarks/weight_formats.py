"""Quality and speed of a target whose matrices are rounded to int8 and int4, against the same target as it is.

Both round the weights in blocks of 32 inputs with a float16 scale (int4: and a minimum; the LM head stays in int8), and
activations to int8, row by row in the same blocks. Compared are, by passes of the compiled models (a CPU only):

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

import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from benchmarks import shared
from benchmarks.accuracy import (
    answer_problems,
    answer_questions,
    limited,
    read_problems,
    read_questions,
    summarise_answers,
)
from benchmarks.shared import interval_text
from benchmarks.step_costs import weight_bytes
from draft.evaluation.tau import bootstrap_ratio
from draft.files import file_sha256
from draft.target import Target, load_target
from serving.engine import Engine, SamplingParams
from serving.engine.kv_cache import RaggedBatch, Segment
from serving.engine.setup import decoding_dtype

MODULE = "benchmarks.weight_formats"
EXAMPLES = f"""
examples:
  distributions and speed in three minutes:
    python -m {MODULE} --target smollm2 --limit 16 --out runs/formats
  accuracy on your own files:
    python -m {MODULE} --target mine.gguf --questions choices.jsonl --problems gsm8k.jsonl --out runs/formats

--questions takes LLM-Adapters' format: `instruction`, which ends with "Answer format: a/b/c", the right one of these
in `answer`, and a `task` to group by. --problems takes `question` and `answer`, a number or a text with it after ####.
"""
REFERENCE, ROUNDED = "float32", ("int8", "int4")


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
    parser.add(
        "--weights", choices=ROUNDED, nargs="+", default=list(ROUNDED), help="formats beside the target as it is"
    )
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
    target = next(iter(engines.values())).target
    ids = fitting(target, chosen.prompts, arguments.max_new_tokens)
    served = {name: engine for at, (name, engine) in enumerate(engines.items()) if at == 0 or name in ROUNDED}
    rates = time_decoding(served, ids[: arguments.speed_prompts], arguments.max_new_tokens, arguments.repeats)
    texts = compare_texts(engines, ids, arguments.max_new_tokens)
    answers = answer_questions(served, questions) + answer_problems(served, problems, arguments.problem_tokens)
    results = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, target),
        "prompts": chosen.provenance(len(ids)),
        "data": [{"file": file, "sha256": file_sha256(Path(file))} for file in data],
        "settings": vars(arguments),
        "threads": arguments.threads or shared.cores(),
        "formats": {name: about(engine) for name, engine in engines.items()},
        "distributions": summarise_texts(texts),
        "accuracy": summarise_answers(answers, list(served)),
        "speed": rates,
        "texts": texts,
        "answers": answers,
    }
    show(console, results)
    shared.finish(console, results, out / "weight_formats", draw)
    return 0


def load_engines(arguments: Namespace) -> dict[str, Engine]:
    """Return engines by format, the target as it is first, then the rounded ones; each has a target of its own.

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
    engines = {engine.models.weights: engine}
    engines |= {weights: build(arguments.dtype, weights) for weights in ROUNDED if weights in arguments.weights}
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
    rounded = [name for name in ROUNDED if name in engines]
    pairs = [(plain, name) for name in rounded]
    pairs += [(REFERENCE, name) for name in (plain, *rounded) if REFERENCE in engines]
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


# ---- speed ----


def time_decoding(
    engines: dict[str, Engine], prompts: list[list[int]], new_tokens: int, repeats: int
) -> dict[str, Any] | None:
    """Return tokens per second of plain decoding by format, and their ratios to the first one's within a repeat.

    Repeat 0 warms up.
    """
    params = SamplingParams(new_tokens, ignore_eos=True)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    with shared.progress_bar() as progress:
        for repeat in progress.track(range(repeats + 1 if repeats else 0), description="speed"):
            shift = repeat % len(engines)
            for name in [*engines][shift:] + [*engines][:shift]:
                stats = [engines[name].generate([prompt], params)[0].stats for prompt in prompts]
                rates[name].append(sum(one.emitted for one in stats) / sum(one.decode_seconds for one in stats))
    if not repeats:
        return None
    plain, *rounded = engines
    ratios = {name: [b / a for a, b in zip(rates[plain][1:], rates[name][1:], strict=True)] for name in rounded}
    return {
        "tokens_per_second": {name: shared.spread(values[1:]) for name, values in rates.items()},
        "over_plain": {name: shared.spread(values) for name, values in ratios.items()},
        "prompts": len(prompts),
    }


# ---- tables and picture ----


def show(console: Console, results: dict[str, Any]) -> None:
    table = shared.make_table(
        "Distributions of the next token", ("from", "to", "texts", "positions", "KL", "same top-1")
    )
    for row in results["distributions"]:
        kl, same = interval_text(row["kl"], ".5f"), interval_text(row["agreement"], ".4f")
        table.add_row(row["from"], row["to"], str(row["texts"]), str(row["positions"]), kl, same)
    console.print(table)
    plain, *others = results["formats"]
    for name in (other for other in others if other in ROUNDED and results["accuracy"]):
        headings = ("task", "count", "chance", plain, name, "difference", f"only {plain}", f"only {name}", "p")
        table = shared.make_table("Accuracy in percent", headings, ("task",))
        for row in results["accuracy"]:
            found = row["against"][name]
            chance = "–" if row["chance"] is None else f"{100 * row['chance']:.1f}"
            shown = [percent(row[plain]), percent(row[name]), percent(found["difference"], "+.1f")]
            only = [str(count) for count in found["only"].values()]
            table.add_row(row["task"], str(row["count"]), chance, *shown, *only, f"{found['p']:.2f}")
        console.print(table)
    for name, about in results["formats"].items():
        read, kept = (about[key] / 2**20 for key in ("bytes_read_a_step", "bytes"))
        speed = results["speed"] and results["speed"]["tokens_per_second"].get(name)
        rate = f"{speed['median']:.1f} tokens/s ({speed['least']:.1f}–{speed['most']:.1f}), " if speed else ""
        console.print(f"{name}: {rate}{read:.0f} MiB of weights a step, {kept:.0f} MiB with the embedding")
    for name, ratio in (results["speed"] or {"over_plain": {}})["over_plain"].items():
        spread = f"{ratio['median']:.2f} ({ratio['least']:.2f}–{ratio['most']:.2f})"
        console.print(f"{name} / {plain}, plain decoding: {spread}, {results['machine']['cpu']}")


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
    left.set_xticks(range(len(pairs)), [f"{row['from']} || {row['to']}" for row in pairs], rotation=30, ha="right")
    left.set(ylabel="mean KL, nats a token")
    tasks = results["accuracy"]
    served = [name for at, name in enumerate(results["formats"]) if at == 0 or name in ROUNDED]
    for at, name in enumerate(served):
        places = [n + (at - (len(served) - 1) / 2) * 0.8 / len(served) for n in range(len(tasks))]
        bars(right, [row[name] for row in tasks], places, width=0.8 / len(served), label=name)
        right.set_xticks(range(len(tasks)), [row["task"] for row in tasks], rotation=30, ha="right")
    right.set(ylabel="accuracy")
    right.legend(fontsize=8)
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
