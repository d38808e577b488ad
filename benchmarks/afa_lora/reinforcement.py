"""AFA-LoRA, LoRA and all weights in reinforcement learning: TRL's GRPOTrainer and PEFT, as a user would write it.

The data are word problems: `question`, and a number as `answer`. The reward is 1 where the last number of a completion
equals the answer, else 0. A target that never earns a reward learns nothing from it, so all arms start from the same
model: the target after a short supervised start on other problems of the file, which teaches to write operations on the
question's numbers that give the answer. All arms sample as many completions.
Rollouts are TRL's own, from the annealed model as it is at that step. What is judged is the share of problems that are
solved greedily.

Each arm's learning rate is tuned on problems that nothing else is done with, by a seed that is used for nothing else;
fresh seeds (initialisation of the adapter, order, sampling) are judged on the test problems. A run that is finished is
not done again: the same command goes on after an interruption, and two copies of it share the work.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from transformers import PrinterCallback, set_seed

from benchmarks import shared
from benchmarks.afa_lora import language_models, options, report, supervised
from benchmarks.afa_lora.experiment import Experiment, Run, Setup, setup
from draft.errors import UserError
from draft.evaluation.tau import bootstrap_ratio
from draft.files import file_sha256, read_json, write_json
from draft.target import Target, load_target
from draft.training.monitor import read_lines

MODULE = "benchmarks.afa_lora.reinforcement"
PLACE = "problems"
RATES = {"lora": [1e-4, 2e-4, 4e-4], "afa-lora": [1e-4, 2e-4, 4e-4], "full": [5e-6, 1e-5, 2e-5]}
WORD = re.compile(r"\w+|[+*/^%]|[-.](?=\s?\d)")  # of a question, operators among them
NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")  # the minus of 5-3 is none of the number's
SMOOTHED = 5  # steps that a point of the reward curves is the mean of
QUICK = {
    "rank": 4, "seeds": 2, "steps": 2, "completions": 4, "generations": 2, "max_new_tokens": 6, "start_epochs": 2.0,
    "start_limit": 16, "train_limit": 16, "validation_limit": 4, "test_limit": 8,
}  # fmt: skip
EXAMPLES = f"""
examples:
  a smoke test:
    python -m {MODULE} --problems problems.jsonl --quick --out runs/quick
  everything, on two cores (the command twice; many hours):
    python -m {MODULE} --problems problems.jsonl.gz --out runs/afa-reinforcement
"""


def parse(arguments: Sequence[str]) -> Namespace:
    parser = options.Parser(MODULE, __doc__, EXAMPLES)
    parser.add("--target", default="smollm2", help="hub id, folder, .gguf file, or smollm2")
    parser.add("--problems", metavar="FILE", required=True, help="JSON or JSONL, also .gz, with question and answer")
    parser.add("--test-limit", shared.whole(1), default=800, metavar="N", help="problems")
    parser.add("--validation-limit", shared.whole(1), default=450, metavar="N", help="problems")
    parser.add("--start-limit", shared.whole(1), default=800, metavar="N", help="problems of the supervised start")
    parser.add("--train-limit", shared.whole(1), default=430, metavar="N", help="problems of the rollouts")
    parser.add("--start-epochs", shared.real(0.01, 1000), default=2.0, metavar="N", help="of the supervised start")
    parser.add("--start-rate", shared.real(1e-9, 1), default=3e-5, metavar="R", help="of the supervised start")
    parser.add("--rank", shared.whole(1), default=16, metavar="R")
    parser.add("--layers", nargs="+", default=language_models.LAYERS, metavar="NAME", help="that get an adapter")
    parser.add("--steps", shared.whole(1), default=80, metavar="N", help="optimiser steps")
    parser.add("--completions", shared.whole(2), default=32, metavar="N", help="sampled for each step")
    parser.add("--generations", shared.whole(2), default=8, metavar="N", help="completions of a problem")
    parser.add("--max-new-tokens", shared.whole(1), default=40, metavar="N", help="of a completion")
    parser.add("--bf16", action="store_true", help="train under autocast to bfloat16")
    parser.add_experiment(MODULE, RATES)
    parser.set_defaults(seeds=3)
    parsed = parser.parse_args(arguments)
    options.apply_quick(parsed, QUICK, arguments)
    if parsed.completions % parsed.generations:
        parser.error(f"--completions {parsed.completions} is no multiple of --generations {parsed.generations}")
    return parsed


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    out = shared.output_folder(arguments.out)
    study = Reinforcement(arguments, out)
    experiment = options.make_experiment(
        arguments, study.perform, "accuracy", out, keep=("metrics.jsonl",), data=study.identity
    )
    chosen = {"rank": arguments.rank, "alpha": 2 * arguments.rank}
    cell = report.run_cell(
        experiment,
        PLACE,
        chosen,
        options.grids(arguments),
        label=f"rank {arguments.rank}",
        arms=arguments.arms,
        measures=("accuracy",),
    )
    results: dict[str, Any] = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, study.target),
        "data": study.about,
        "settings": vars(arguments),
        "cells": [cell],
        "before": {
            "score": report.values(bootstrap_ratio(*zip(*study.before(), strict=True))),
            "gains": report.gains(experiment, cell, "accuracy", study.before()),
        },
        "curves": curves(experiment, chosen, cell),
    }
    score = report.interval(results["before"]["score"])
    gains = report.gains_text(results["before"]["gains"])
    text = (
        f"Target {arguments.target} after a supervised start, commit {results['commit']}; "
        f"{len(study.parts['test'])} test problems, {arguments.steps} steps of {arguments.completions} completions. "
        "Share of problems solved greedily, with 95 % intervals over problems and seeds.\n\n"
        f"Before: {score}. After minus before: {gains}."
    )
    report.write(out, "reinforcement", results, options.about(arguments, text), {"Arms": "cells"}, "accuracy")
    with FileLock(out / ".reinforcement.lock"):  # two copies of the command may draw at once
        draw_curves(results["curves"], out / "reinforcement_rewards.png")
    shared.make_console().print((out / "reinforcement.md").read_text())
    return 0


# ---- problems ----


@dataclass(frozen=True)
class Problem:
    """A word problem and its answer."""

    question: str
    answer: float

    @property
    def prompt(self) -> str:
        return f"{self.question}\n\n"

    @property
    def solution(self) -> str:
        """The text that the supervised start teaches: one or two operations that give the answer, else it alone.

        A small target that writes the answer at once has to guess it. Operations are found by their result: now and
        then they are not the ones that the question asks for.
        """
        numbers = [float(number.replace(",", "")) for number in NUMBER.findall(self.question)]
        return working(numbers, self.answer) or f"The answer is {self.answer:.12g}."


def working(numbers: Sequence[float], answer: float) -> str | None:
    """Return one operation on two of the numbers that gives the answer, or two on three: `3 + 4 = 7, 7 * 2 = 14`."""
    pairs = list(itertools.combinations(range(len(numbers)), 2))
    first = [(pair, *step) for pair in pairs for step in operations(*(numbers[place] for place in pair))]
    for _, text, result in first:
        if math.isclose(result, answer):
            return text
    for pair, text, result in first:
        for number in (number for place, number in enumerate(numbers) if place not in pair):
            for second, end in operations(result, number):
                if math.isclose(end, answer):
                    return f"{text}, {second}"
    return None


def operations(a: float, b: float) -> Iterator[tuple[str, float]]:
    """Yield the sums, differences, products and quotients of two numbers; no negative results, and no long ones."""
    for x, y in ((a, b), (b, a)):
        results = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else -1}
        for sign, result in results.items():
            if result >= 0 and math.isclose(result, round(result, 2)):
                yield f"{x:.12g} {sign} {y:.12g} = {result:.12g}", result


def read_problems(path: str) -> list[Problem]:
    """Read problems, each once: those that differ only in case, spaces and punctuation outside numbers are the same.

    Raises:
        UserError: with the line of a row that is no problem.
    """
    found: dict[str, Problem] = {}
    for _, row in language_models.rows(path, {"question": str, "answer": (int, float)}):
        words = " ".join(WORD.findall(row["question"].lower()))
        found.setdefault(words, Problem(row["question"].strip(), float(row["answer"])))
    return list(found.values())


def divided(problems: Sequence[Problem], counts: Mapping[str, int]) -> dict[str, list[Problem]]:
    """Draw disjoint parts by chance; problems that differ in their numbers only are in one part."""
    alike: dict[str, list[Problem]] = {}
    for problem in problems:
        alike.setdefault(re.sub(r"\d[\d.,]*", "#", problem.question.lower()), []).append(problem)
    groups = list(alike.values())
    random.Random(0).shuffle(groups)
    parts: dict[str, list[Problem]] = {}
    for name, count in counts.items():
        parts[name] = []
        while groups and len(parts[name]) < count:
            parts[name] += groups.pop()
        del parts[name][count:]  # the others of its last group are in no part
    return parts


def is_right(completion: str, answer: float) -> bool:
    """True where the last number equals the answer."""
    numbers = NUMBER.findall(completion)
    return bool(numbers) and abs(float(numbers[-1].replace(",", "")) - answer) < 1e-6 * max(1.0, abs(answer))


# ---- training, as a user would write it ----


def reward(completions: list[str], answer: list[float], **_: Any) -> list[float | None]:
    """Return 1 for each completion of which the last number equals the answer, else 0."""
    return [float(is_right(text, right)) for text, right in zip(completions, answer, strict=True)]


def make_trainer(
    model: Any, tokenizer: Any, problems: Sequence[Problem], run: Run, folder: Path, arguments: Namespace
) -> Any:
    """Return a GRPOTrainer of an arm, with its adapter."""
    from datasets import Dataset

    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise UserError(
            "reinforcement learning needs the package trl, which is not installed; install it with "
            "`pip install -c constraints.txt 'draftsmith[evidence]'`."
        ) from error

    set_seed(run.seed)
    config = language_models.adapter_config(run.setup.method, dict(run.setup.options), arguments.layers)
    training = GRPOConfig(
        output_dir=str(folder / "trainer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.completions,
        num_generations=arguments.generations,
        max_completion_length=arguments.max_new_tokens,
        temperature=1.0,
        beta=0.0,  # GRPO's weight of the divergence from the start, which is not AFA-LoRA's β
        learning_rate=run.rate,
        lr_scheduler_type="linear",
        warmup_steps=0.05,  # a share of the steps
        seed=run.seed,
        bf16=False,  # TRL's default is true; see language_models.multiplying
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": problem.prompt, "answer": problem.answer} for problem in problems])
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=training,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=language_models.callbacks(config, folder / "metrics.jsonl"),
    )
    trainer.remove_callback(PrinterCallback)  # a line a step; StepLog writes them
    return trainer


# ---- runs ----


class Reinforcement:
    """The problems, the common start, the training runs, and the accuracy of what they give."""

    def __init__(self, arguments: Namespace, out: Path) -> None:
        self.arguments, self.out = arguments, out
        problems, names = read_problems(arguments.problems), ("test", "validation", "start", "train")
        self.parts = divided(problems, {name: getattr(arguments, f"{name}_limit") for name in names})
        for name, part in self.parts.items():
            if not part:
                raise UserError(
                    f"--problems {arguments.problems!r}: {len(problems)} problems leave none for {name}; add some."
                )
        taught = "".join(f"{problem.prompt}{problem.solution}\n" for problem in self.parts["start"])
        self.identity = {
            "target_fingerprint": load_target(arguments.target, "float32").fingerprint,
            "sha256": file_sha256(Path(arguments.problems)),
            "start_sha256": hashlib.sha256(taught.encode()).hexdigest(),
        }
        self.about = {**self.identity, **{name: len(part) for name, part in self.parts.items()}}

    @cached_property
    def target(self) -> Target:
        """The target after the supervised start, which is made once for all arms."""
        folder = self.out / "start"
        with FileLock(f"{folder}.lock"):
            if not (folder / "config.json").is_file():
                target = load_target(self.arguments.target, "float32")
                rows = []
                for problem in self.parts["start"]:
                    prompt = target.tokenizer(problem.prompt).input_ids
                    output = target.tokenizer(problem.solution, add_special_tokens=False).input_ids
                    output = [*output, target.tokenizer.eos_token_id]
                    rows.append({"input_ids": prompt + output, "labels": [-100] * len(prompt) + output})
                given = {**vars(self.arguments), "epochs": self.arguments.start_epochs, "batch_size": 16}
                run = Run(Setup("start", "full", ()), self.arguments.start_rate, 0, "start")
                model = language_models.copy_of(target)
                with tempfile.TemporaryDirectory(dir=self.out) as work:
                    supervised.train(model, rows, run, Path(work), Namespace(**given), target.tokenizer.eos_token_id)
                    saved = Path(work) / "start"
                    model.save_pretrained(saved)
                    target.tokenizer.save_pretrained(saved)
                    saved.rename(folder)
        return load_target(str(folder), "float32")

    def perform(self, run: Run, folder: Path) -> dict[str, Any]:
        model, problems = language_models.copy_of(self.target), self.parts["train"]
        trainer = make_trainer(model, self.target.tokenizer, problems, run, folder, self.arguments)
        try:
            with language_models.multiplying(model.device, self.arguments.bf16):
                trainer.train()
        except RuntimeError as error:
            if "probability tensor" not in str(error):  # what sampling says when logits are not finite
                raise
            return {"diverged": str(error)}
        model = trainer.model.eval()
        if not language_models.is_finite(model):
            return {"diverged": "a weight is not finite"}
        result: dict[str, Any] = {"units": {"accuracy": self.solved(model, self.parts[run.part])}}
        if run.setup.method == "afa-lora":
            result["beta"] = model.peft_config["default"].beta
            prompt = self.target.tokenizer(self.parts[run.part][0].prompt).input_ids
            result["merged_differences"] = language_models.logits_differences(model, prompt)
        return result

    @torch.no_grad()
    def solved(self, model: Any, problems: Sequence[Problem], batch: int = 32) -> list[list[float]]:
        """(1 where the greedy completion is right, 1) of each problem."""
        tokenizer = self.target.tokenizer
        end = tokenizer.eos_token_id
        found = []
        for start in range(0, len(problems), batch):
            some = problems[start : start + batch]
            prompts = [tokenizer(problem.prompt).input_ids for problem in some]
            longest = max(map(len, prompts))
            ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
            lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
            mask = (torch.arange(longest, device=model.device) >= longest - lengths[:, None]).long()
            written = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, eos_token_id=end, pad_token_id=end,
                max_new_tokens=self.arguments.max_new_tokens,
            )  # fmt: skip
            texts = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
            found += [[float(is_right(text, problem.answer)), 1.0] for text, problem in zip(texts, some, strict=True)]
        return found

    def before(self) -> list[list[float]]:
        """The units of the start on the test problems; kept in a file."""
        file = self.out / "before.json"
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                write_json(file, {"units": self.solved(self.target.model, self.parts["test"])})
        return read_json(file)["units"]


def curves(experiment: Experiment, chosen: dict[str, Any], cell: dict[str, Any]) -> dict[str, list[list[float]]]:
    """Return the mean reward of each step, a list a seed, by arm."""
    found = {}
    for arm, about in cell["arms"].items():
        runs = experiment.fresh(setup(PLACE, arm, chosen), about["rate"])
        logs = [read_lines(experiment.folder / "runs" / run.name / "metrics.jsonl") for run in runs]
        found[arm] = [[line["reward"] for line in log if "reward" in line] for log in logs]
    return found


def draw_curves(rewards: dict[str, list[list[float]]], path: Path) -> None:
    """Draw the reward against the step: the mean of the seeds, and their range."""
    figure, (axis,) = shared.make_figure(1, "mean reward of the completions")
    for arm, seeds in rewards.items():
        window = np.ones(SMOOTHED) / SMOOTHED
        smooth = [np.convolve(seed, window, "valid") if len(seed) >= SMOOTHED else np.array(seed) for seed in seeds]
        steps = np.arange(len(seeds[0]) - len(smooth[0]) + 1, len(seeds[0]) + 1)
        (line,) = axis.plot(steps, np.mean(smooth, axis=0), label=report.NAMES[arm])
        axis.fill_between(steps, np.min(smooth, axis=0), np.max(smooth, axis=0), alpha=0.15, color=line.get_color())
    axis.set(xlabel="optimiser step", ylabel=f"reward, mean of {SMOOTHED} steps; band: range of the seeds")
    axis.legend(fontsize=8)
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
