"""AFA-LoRA, LoRA and all weights in supervised fine-tuning: transformers' Trainer and PEFT, as a user would write it.

The data are LLM-Adapters': `instruction`, which ends in "Answer format: a/b/c", `output`, and `answer`, which is one of
these and a part of the output; `task` groups them. The model learns outputs.

  accuracy    share of questions whose right option has the most likely output; mean over tasks
  likelihood  probability of the right option among the options; mean over tasks. Rates are tuned by it, since accuracy
              on some hundred questions says little about neighbouring rates

Each arm's learning rate is tuned on a part of the training file that nothing is trained on, by a seed that is used for
nothing else; fresh seeds (initialisation of the adapter, and order) are judged on the test file. A run that is finished
is not done again: the same command goes on after an interruption, and two copies of it share the work.
"""

from __future__ import annotations

import math
import os
import random
import re
import statistics
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from peft import get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from benchmarks import shared
from benchmarks.afa_lora import language_models, options, report
from benchmarks.afa_lora.experiment import AGAIN, Run
from draft.errors import UserError
from draft.files import file_sha256, read_json, write_json
from draft.target import Target, load_target

MODULE = "benchmarks.afa_lora.supervised"
RATES = {"lora": [4e-4, 8e-4, 1.6e-3], "afa-lora": [4e-4, 8e-4, 1.6e-3], "full": [4e-5, 8e-5, 1.6e-4]}
MICRO = 4  # questions of a pass: larger ones are mostly padding
MEASURES = ("accuracy", "likelihood")
RANK = 32  # of the comparison of LoRA with itself
STEM, PADDING = -1, -2  # of a packed token, beside the options 0, 1, ...
FORMAT = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)\s*$")
QUICK = {
    "ranks": [8], "seeds": 2, "full_seeds": 2, "train_limit": 4, "validation_limit": 4, "test_limit": 8, "epochs": 1.0,
    "batch_size": 2, "max_tokens": 96,
}  # fmt: skip
EXAMPLES = f"""
examples:
  a smoke test:
    python -m {MODULE} --train train.jsonl --test test.jsonl --quick --out runs/quick
  everything, on two cores (the command twice; many hours):
    python -m {MODULE} --train train.jsonl.gz --test test.jsonl.gz --out runs/afa-supervised
"""


def parse(arguments: Sequence[str]) -> Namespace:
    parser = options.Parser(MODULE, __doc__, EXAMPLES)
    parser.add("--target", default="smollm2", help="hub id, folder, .gguf file, or smollm2")
    parser.add("--train", metavar="FILE", required=True, help="JSON or JSONL, also .gz")
    parser.add("--test", metavar="FILE", required=True, help="the same, of other questions")
    parser.add(
        "--answers", choices=("names", "texts"), default="names",
        help="what the target writes: the option's name after all options, as LLM-Adapters do (names), or the option's "
        "text without seeing the others (texts); likelihoods are not divided by lengths",
    )  # fmt: skip
    parser.add("--train-limit", shared.whole(1), default=2000, metavar="N", help="questions, the tasks taking turns")
    parser.add("--validation-limit", shared.whole(1), default=300, metavar="N", help="questions of --train held back")
    parser.add("--test-limit", shared.whole(1), default=1600, metavar="N", help="questions, the tasks taking turns")
    parser.add("--max-tokens", shared.whole(8), default=256, metavar="N", help="longer questions are left out")
    parser.add("--ranks", shared.whole(1), nargs="+", default=[8, 32], metavar="R")
    parser.add("--layers", nargs="+", default=language_models.LAYERS, metavar="NAME", help="that get an adapter")
    parser.add("--full-seeds", shared.whole(1), default=5, metavar="N", help="fresh seeds of all weights")
    parser.add("--epochs", shared.real(0.01, 1000), default=1.0, metavar="N")
    parser.add("--batch-size", shared.whole(1), default=16, metavar="N", help="questions of an optimiser step")
    parser.add("--bf16", action="store_true", help="train under autocast to bfloat16")
    parser.add_experiment(MODULE, RATES)
    parsed = parser.parse_args(arguments)
    options.apply_quick(parsed, QUICK, arguments)
    return parsed


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    out = shared.output_folder(arguments.out)
    study = Supervised(arguments)
    experiment = options.make_experiment(
        arguments, study.perform, "likelihood", out, keep=("metrics.jsonl",), data=study.identity
    )
    start = study.before(out)
    results: dict[str, Any] = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, study.target),
        "data": study.about,
        "settings": vars(arguments),
        "before": study.without_training(start),
        "cells": [],
    }
    before = {name: f"{results['before'][name]:.4f}" for name in (*MEASURES, "chance", "majority")}
    tasks = [question.task for question in study.questions["test"]]
    text = (
        f"Target {results['target']['name']}, commit {results['commit']}; {study.about['train']} training, "
        f"{study.about['validation']} validation and {study.about['test']} test questions. Means over tasks "
        "and fresh seeds, with 95 % intervals over questions and seeds.\n\n"
        f"Before: accuracy {before['accuracy']}, likelihood {before['likelihood']}. Accuracy by chance "
        f"{before['chance']}, of the option that is right most often in its task {before['majority']}."
    )
    rank = min(arguments.ranks, key=lambda each: abs(each - RANK))
    for each in arguments.ranks:
        cell = report.run_cell(
            experiment,
            "questions",
            {"rank": each, "alpha": 2 * each},
            options.grids(arguments),
            label=f"rank {each}",
            arms=[arm for arm in arguments.arms if arm != AGAIN or each == rank],
            measures=MEASURES,
            seeds={"full": arguments.full_seeds},
            groups=tasks,
        )
        cell["gains"] = {name: report.gains(experiment, cell, name, start[name], tasks) for name in MEASURES}
        text += f"\n\nRank {each}, likelihood after minus before: {report.gains_text(cell['gains']['likelihood'])}."
        results["cells"].append(cell)
        report.write(out, "supervised", results, options.about(arguments, text), {"Ranks": "cells"}, "accuracy")
    shared.make_console().print((out / "supervised.md").read_text())
    return 0


# ---- questions ----


@dataclass(frozen=True)
class Question:
    """A question as token ids: the prompt, the output of each option, and which of them is right."""

    task: str
    prompt: list[int]
    outputs: list[list[int]]
    right: int

    @property
    def tokens(self) -> int:
        return len(self.prompt) + max(map(len, self.outputs))


def read_questions(path: str, tokenizer: Any, end: int, answers: str = "names") -> tuple[list[Question], int]:
    """Read a file in LLM-Adapters' format; outputs end with the token `end`. For `answers` see --help.

    Returns:
        the questions, and the number of those that are left out because the texts of their options are not clear.

    Raises:
        UserError: with the line of a row that is not in it.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    found, unclear = [], 0
    for where, row in language_models.rows(path, {"instruction": str, "output": str, "answer": str}):
        named = FORMAT.search(row["instruction"])
        choices = named[1].split("/") if named else []
        if row["answer"] not in choices:
            raise UserError(
                f"{where}: the answer {row['answer']!r} is none of the options {choices}, which `instruction` names at "
                "its end as `Answer format: a/b/c`; correct or remove that row."
            )
        instruction, texts = row["instruction"], choices
        if answers == "texts":
            texts_of = option_texts(instruction, choices)
            if texts_of is None:
                unclear += 1
                continue
            instruction, texts = texts_of
        around = re.split(rf"(?<!\w){re.escape(row['answer'])}(?!\w)", row["output"])
        if len(around) != 2:
            raise UserError(
                f"{where}: `output` holds the answer {row['answer']!r} {len(around) - 1} times, and not once; correct "
                "or remove that row."
            )
        outputs = [[*encode(text.join(around)), end] for text in texts]
        prompt = list(tokenizer(f"{instruction}\n\n").input_ids)  # with BOS, where the target has one
        found.append(Question(str(row.get("task", "all")), prompt, outputs, choices.index(row["answer"])))
    return found, unclear


def option_texts(instruction: str, choices: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the question and the text of each option, from `... Answer1: text Answer2: text ... Answer format: ...`.

    All of it and the options' names where they have no texts (true/false). None where it is not clear which text
    belongs to which option, or two have the same.
    """
    marks = [list(re.finditer(rf"(?i)(?<!\w){re.escape(choice)}:\s*", instruction)) for choice in choices]
    if not any(marks):
        return instruction, [*choices]
    if any(len(each) != 1 for each in marks):
        return None
    starts, stops = zip(*((each.start(), each.end()) for (each,) in marks), strict=True)
    end = cast(re.Match[str], FORMAT.search(instruction)).start()
    texts = [instruction[stop:start].strip() for stop, start in zip(stops, [*starts[1:], end], strict=True)]
    clear = [*starts] == sorted(starts) and all(texts) and len(set(texts)) == len(texts)
    return (instruction[: starts[0]].strip(), texts) if clear else None


def taking_turns(questions: Iterable[Question], limit: int, seed: int) -> list[Question]:
    """Choose questions by chance, as many of each task as there are."""
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question)
    for task in by_task.values():
        random.Random(seed).shuffle(task)
    turns = [question for turn in zip_longest(*by_task.values()) for question in turn if question is not None]
    return turns[:limit]


# ---- training, as a user would write it ----


def train(model: Any, rows: list[dict[str, list[int]]], run: Run, folder: Path, arguments: Namespace, end: int) -> Any:
    """Fine-tune a model by an arm's method and return it: the PeftModel, or the model itself.

    rows: `input_ids` and `labels` of each question. end: the token id to pad with.
    """
    set_seed(run.seed)
    config = language_models.adapter_config(run.setup.method, dict(run.setup.options), arguments.layers)
    if config is not None:
        model = get_peft_model(model, config)
    training = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=math.gcd(arguments.batch_size, MICRO),
        gradient_accumulation_steps=arguments.batch_size // math.gcd(arguments.batch_size, MICRO),
        learning_rate=run.rate,
        lr_scheduler_type="linear",
        warmup_steps=0.05,  # a share of the steps
        max_grad_norm=1.0,
        seed=run.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": end, "labels": -100}
        found = {
            name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])
            for name, value in padding.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {**found, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    log = folder / "metrics.jsonl"
    trainer = Trainer(
        model,
        training,
        data_collator=collate,
        train_dataset=cast(Any, rows),  # a list has what it needs
        callbacks=language_models.callbacks(config, log),
    )
    trainer.remove_callback(PrinterCallback)  # a line a step; StepLog writes them
    with language_models.multiplying(model.device, arguments.bf16):
        trainer.train()
    return model


# ---- runs ----


class Supervised:
    """The questions, the training runs, and the accuracy of what they give."""

    def __init__(self, arguments: Namespace) -> None:
        self.arguments = arguments
        self.target: Target = load_target(arguments.target, "float32")
        way = self.target.tokenizer, min(self.target.eos_token_ids), arguments.answers
        (offered, unclear), (test, unclear_test) = (read_questions(f, *way) for f in (arguments.train, arguments.test))
        limit = min(arguments.max_tokens, self.target.max_length)
        asked = {tuple(question.prompt) for question in test}
        fits = [question for question in offered if question.tokens < limit and tuple(question.prompt) not in asked]
        kept = taking_turns((question for question in test if question.tokens < limit), arguments.test_limit, seed=1)
        chosen = taking_turns(fits, arguments.validation_limit + arguments.train_limit, seed=0)
        held_back = chosen[: arguments.validation_limit]
        asked = {tuple(question.prompt) for question in held_back}
        self.training = [each for each in chosen[arguments.validation_limit :] if tuple(each.prompt) not in asked]
        self.questions = {"validation": held_back, "test": kept}
        if not (self.training and held_back and kept):
            raise UserError(
                f"of {len(offered)} and {len(test)} questions too few fit --max-tokens {limit} ({unclear} and "
                f"{unclear_test} more are left out, as their options are not clear); raise it, or give more questions."
            )
        self.about = {
            "files": {name: file_sha256(Path(name)) for name in (arguments.train, arguments.test)},
            "train": len(self.training),
            "validation": len(held_back),
            "test": len(kept),
            "left_out": len(offered) + len(test) - len(fits) - sum(question.tokens < limit for question in test),
            "unclear": unclear + unclear_test,
        }
        self.identity = {"files": [*self.about["files"].values()], "target_fingerprint": self.target.fingerprint}

    def perform(self, run: Run, folder: Path) -> dict[str, Any]:
        end = min(self.target.eos_token_ids)  # to pad with
        rows = []
        for question in self.training:
            output = question.outputs[question.right]
            labels = [-100] * len(question.prompt) + output
            rows.append({"input_ids": question.prompt + output, "labels": labels})
        model = train(language_models.copy_of(self.target), rows, run, folder, self.arguments, end).eval()
        if not language_models.is_finite(model):
            return {"diverged": "a weight is not finite"}
        questions = self.questions[run.part]
        result: dict[str, Any] = {"units": judged(model, questions)}
        if run.setup.method == "afa-lora":
            result["beta"] = model.peft_config["default"].beta
            result["merged_differences"] = language_models.logits_differences(model, questions[0].prompt)
        return result

    def before(self, out: Path) -> dict[str, list[list[float]]]:
        """The units of the untrained target on the test questions; kept in a file."""
        file, questions = out / "before.json", self.questions["test"]
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                units = judged(self.target.model, questions)
                write_json(file, {name: [value for value, _ in pairs] for name, pairs in units.items()})
        return {name: [[value, 1.0] for value in values] for name, values in read_json(file).items()}

    def without_training(self, units: dict[str, list[list[float]]]) -> dict[str, Any]:
        """Mean over tasks of the untrained target's measures, and of those of a blind answer; and by task."""
        questions = self.questions["test"]
        values = {name: [value for value, _ in pairs] for name, pairs in units.items()}
        values["chance"] = [1 / len(question.outputs) for question in questions]
        common: dict[str, int] = {}
        for task in {question.task for question in questions}:
            ((common[task], _),) = Counter(q.right for q in questions if q.task == task).most_common(1)
        values["majority"] = [float(question.right == common[question.task]) for question in questions]
        tasks = {
            task: {
                name: statistics.mean(
                    value for question, value in zip(questions, each, strict=True) if question.task == task
                )
                for name, each in values.items()
            }
            for task in sorted(common)
        }
        means = {name: statistics.mean(of_task[name] for of_task in tasks.values()) for name in values}
        return {**means, "tasks": tasks}


def judged(model: Any, questions: Sequence[Question]) -> dict[str, list[list[float]]]:
    """Return the units of both measures."""
    accuracy, likelihood = [], []
    for question, totals in zip(questions, log_likelihoods(model, questions), strict=True):
        best = max(range(len(totals)), key=totals.__getitem__)
        accuracy.append([float(best == question.right), 1.0])
        likelihood.append([float(torch.tensor(totals).softmax(0)[question.right]), 1.0])
    return {"accuracy": accuracy, "likelihood": likelihood}


@dataclass(frozen=True)
class Packed:
    """A question with all its options as one row of tokens."""

    ids: list[int]
    places: list[int]  # of each token in its own text
    option: list[int]  # that each token belongs to, or STEM
    predicted_at: list[list[int]]  # for each option, where in the row each token of its output is predicted

    @property
    def length(self) -> int:
        return len(self.ids)


def pack(question: Question) -> Packed:
    """Lay out the stem, which is the prompt and what all outputs begin with, and after it the rest of each output."""
    common = list(os.path.commonprefix(question.outputs))
    stem = question.prompt + common
    row = Packed([*stem], [*range(len(stem))], [STEM] * len(stem), [])
    for number, output in enumerate(question.outputs):
        tail = output[len(common) : -1]  # the last token is predicted only
        at = [*range(len(question.prompt) - 1, len(stem)), *range(row.length, row.length + len(tail))]
        row.predicted_at.append(at[: len(output)])
        row.ids.extend(tail)
        row.places.extend(range(len(stem), len(stem) + len(tail)))
        row.option.extend([number] * len(tail))
    return row


@torch.no_grad()
def log_likelihoods(model: Any, questions: Sequence[Question], tokens_per_batch: int = 2048) -> list[list[float]]:
    """Return the log-likelihood of each option's output, for each question; options do not see each other."""
    totals: list[list[float]] = [[] for _ in questions]
    packed = [(pack(question), number) for number, question in enumerate(questions)]
    waiting = sorted(packed, key=lambda each: each[0].length)
    embeddings = model.get_input_embeddings().weight
    while waiting:
        batch = waiting[: max(1, tokens_per_batch // waiting[0][0].length)]
        del waiting[: len(batch)]
        ids, places, option = (
            pad_sequence([torch.tensor(getattr(row, name)) for row, _ in batch], True, filler)
            for name, filler in (("ids", 0), ("places", 0), ("option", PADDING))
        )
        read, reader = option[:, None, :], option[:, :, None]
        seen = ((read == STEM) | (read == reader)).tril()
        mask = torch.zeros(seen.shape, dtype=embeddings.dtype).masked_fill(~seen, torch.finfo(embeddings.dtype).min)
        inputs = {"input_ids": ids, "position_ids": places, "attention_mask": mask[:, None]}
        first = min(len(questions[number].prompt) for _, number in batch) - 1  # nothing before it is predicted
        wanted = {**inputs, "logits_to_keep": torch.arange(first, ids.shape[1])}
        logits = model(**{name: value.to(embeddings.device) for name, value in wanted.items()}).logits
        for place, (row, number) in enumerate(batch):
            start = len(questions[number].prompt) - 1
            log_p = logits[place, start - first : row.length - first].float().log_softmax(-1).cpu()
            for output, at in zip(questions[number].outputs, row.predicted_at, strict=True):
                totals[number].append(float(log_p[torch.tensor(at) - start, torch.tensor(output)].sum()))
    return totals


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
