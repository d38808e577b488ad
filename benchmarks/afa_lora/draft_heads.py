"""AFA-LoRA, LoRA and all weights on draft heads: one head adapted on several domains, judged on held-out conversations.

  acceptance  Σ_v min(p(v), q(v)) of target and head, averaged over the draft steps of all positions of the answers,
              under teacher forcing: a measure of low variance
  τ           acceptance length by greedy replay, K = 5, bonus token included

In each cell (domain, rank) each arm's learning rate is tuned on the validation part of the held-out conversations, by a
seed that is used for nothing else; fresh seeds (initialisation and order) are judged on the test part. All arms take
the same steps. The ablations run on the domain with the largest gap between LoRA and all weights, with rates tuned
again.

A run that is finished is not done again: the same command goes on after an interruption, and two copies of it share
the work.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console

from benchmarks import domains, shared
from benchmarks.adaptation_domains import draft_train
from benchmarks.afa_lora import options, report
from benchmarks.afa_lora.adaptive import AdaptiveTrainer
from benchmarks.afa_lora.experiment import AGAIN, Experiment, Run, score
from benchmarks.afa_lora.merging import merged_differences
from draft.afa import load_afa_adapter
from draft.data.dataset import Row, open_dataset
from draft.errors import UserError
from draft.evaluation.compare import DECIDING_LENGTH
from draft.evaluation.replay import Pass, generations, rejection_terms, replay, response_positions, target_passes
from draft.files import file_sha256
from draft.heads import DraftHead
from draft.heads.checkpoint import head_sha256
from draft.heads.unroll import shift_left
from draft.target import Target, load_target
from draft.training.config import RunSettings, resolve
from draft.training.merge import merge_run
from draft.training.monitor import read_lines
from draft.training.trainer import Trainer

MODULE = "benchmarks.afa_lora.draft_heads"
RATES = {"lora": [5e-4, 1e-3, 2e-3], "afa-lora": [5e-4, 1e-3, 2e-3], "full": [1e-4, 2e-4, 4e-4]}
RANK = 16  # of the ablations, and of the comparison of LoRA with itself
ALPHA_PER_RANK = 2  # so that the scaling alpha / rank is the same at every rank
VALIDATION_SHARE = 0.25  # of the held-out conversations
QUICK = {
    "domains": ["german"], "ranks": [4], "seeds": 2, "count": 16, "max_new_tokens": 24, "max_steps": 4,
    "tokens_per_batch": 512, "ablations": [],
}  # fmt: skip
# name -> the options that differ from the base cell's; rank and epochs are that cell's
ABLATIONS: dict[str, dict[str, Any]] = {
    "decay 0.6": {"decay_ratio": 0.6},
    "decay 1.0": {"decay_ratio": 1.0},
    "gelu": {"activation": "gelu"},
    "relu": {"activation": "relu"},
    "tanh": {"activation": "tanh"},
    "s-A-B": {"placement": "s-A-B"},
    "s-A-B-s": {"placement": "s-A-B-s"},
    "s-A-s-B": {"placement": "s-A-s-B"},
    "s-A-s-B-s": {"placement": "s-A-s-B-s"},
    "cosine": {"schedule": "cosine"},
    "exponential": {"schedule": "exponential"},
    "adaptive": {"schedule": "adaptive"},  # not one of draft.afa's: see `adaptive`
    "rank-stabilised": {"alpha": "stabilised"},
    "three times the steps": {"steps": 3},
}
EXAMPLES = f"""
examples:
  a smoke test:
    python -m {MODULE} --quick --out runs/quick
  everything, on two cores (the command twice; hours):
    python -m {MODULE} --out runs/afa-heads & python -m {MODULE} --out runs/afa-heads; wait
  your own target, head and data (a folder that `draft-train prepare` wrote, with held-out greedy rows):
    python -m {MODULE} --target my-model --head runs/head --data support=runs/data --ranks 16 --out runs/mine
"""


def parse(arguments: Sequence[str]) -> Namespace:
    parser = options.Parser(MODULE, __doc__, EXAMPLES)
    parser.add_models(default=True)
    parser.add("--domains", choices=tuple(domains.DOMAINS), nargs="+", default=["sql", "german", "tests"])
    parser.add("--data", type=named_folder, action="append", default=[], metavar="NAME=DIR", help="your own, instead")
    parser.add("--count", shared.whole(12), default=160, metavar="N", help="conversations of a domain")
    parser.add("--max-new-tokens", shared.whole(8), default=128, metavar="N", help="of an answer")
    parser.add("--ranks", shared.whole(1), nargs="+", default=[2, 4, 16, 64], metavar="R")
    parser.add("--epochs", shared.real(0.01, 1000), default=2.0, metavar="N", help="passes over the training rows")
    parser.add("--max-steps", shared.whole(2), metavar="N", help="optimiser steps, instead of epochs")
    parser.add("--tokens-per-batch", shared.whole(64), default=1024, metavar="N")
    parser.add("--ablations", choices=tuple(ABLATIONS), nargs="*", default=list(ABLATIONS), metavar="NAME")
    parser.add("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_experiment(MODULE, RATES)
    parsed = parser.parse_args(arguments)
    options.apply_quick(parsed, QUICK, arguments)
    return parsed


def named_folder(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not folder or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, folder


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    out = shared.output_folder(arguments.out)
    study = Heads(arguments, out)
    identity: dict[str, Any] = {
        "target_fingerprint": study.target.fingerprint,
        "head_sha256": head_sha256(arguments.head),
    }
    if arguments.data:  # what the target writes for a domain is known by the options
        identity["data_sha256"] = {
            name: file_sha256(*sorted(Path(folder).glob("*.parquet"))) for name, folder in arguments.data
        }
    experiment = options.make_experiment(
        arguments, study.perform, "acceptance", out, keep=("metrics.jsonl",), data=identity
    )
    results: dict[str, Any] = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, study.target),
        "head": shared.head_provenance("base", arguments.head),
        "settings": vars(arguments),
        "data": [study.describe(place) for place in study.places],
        "cells": [],
        "ablations": [],
    }
    rank = min(arguments.ranks, key=lambda each: abs(each - RANK))
    for place in study.places:
        for each in arguments.ranks:
            arms = [arm for arm in arguments.arms if arm != AGAIN or each == rank]
            results["cells"].append(cell(experiment, study, place, each, arms))
            save(arguments, out, results)
    results["all"] = report.pooled(experiment, results["cells"], "acceptance")
    save(arguments, out, results)
    place = largest_gap(results["cells"], rank)
    for name in arguments.ablations:
        arms = [arm for arm in arguments.arms if arm != AGAIN]
        results["ablations"].append(cell(experiment, study, place, rank, arms, name))
        save(arguments, out, results)
    shared.make_console().print((out / "draft_heads.md").read_text())
    return 0


def cell(
    experiment: Experiment, study: Heads, place: str, rank: int, arms: Sequence[str], ablation: str | None = None
) -> dict[str, Any]:
    changed = dict(ABLATIONS[ablation]) if ablation else {}
    chosen: dict[str, Any] = {"rank": rank, "alpha": ALPHA_PER_RANK * rank, **changed}
    if chosen["alpha"] == "stabilised":  # alpha / √rank, written as an alpha that is divided by the rank
        chosen["alpha"] = round(ALPHA_PER_RANK * rank * math.sqrt(rank), 6)
    label = f"{place}, {ablation or f'rank {rank}'}"
    grids = options.grids(study.arguments)
    return report.run_cell(experiment, place, chosen, grids, label=label, arms=arms, measures=("acceptance", "tau"))


def largest_gap(cells: Sequence[dict[str, Any]], rank: int) -> str:
    """Return the domain where all weights gain most over LoRA at this rank; the first one without that arm."""
    gaps = {}
    for each in cells:
        if each["options"]["rank"] == rank:
            difference = each["measures"]["acceptance"]["all"]["differences"].get("full", {"value": 0.0})
            gaps[each["place"]] = difference["value"]
    return max(gaps, key=lambda place: gaps[place])


def save(arguments: Namespace, out: Path, results: dict[str, Any]) -> None:
    text = (
        f"Target {results['target']['name']}, head {results['head']['path']}, commit {results['commit']}. Means over "
        "fresh seeds and test conversations with 95 % intervals over both; τ at K = 5."
    )
    if together := results.get("all", {}).get("differences", {}).get("afa-lora"):
        share = report.interval(results["all"].get("share"), ".2f")
        text += (
            "\n\nMean of all domains and ranks, acceptance: AFA-LoRA - LoRA "
            f"{report.interval(together, '+.4f')}; share of the gap to all weights that AFA-LoRA closes {share}."
        )
    tables = {"Domains and ranks": "cells", "Ablations": "ablations"}
    report.write(out, "draft_heads", results, options.about(arguments, text), tables, "acceptance")


# ---- runs ----


@dataclass
class Part:
    """Held-out rows that a head is judged on, with the target's passes over them."""

    rows: list[Row]
    passes: list[Pass]


class Heads:
    """The data of each place, the training runs, and the judgement of what they give."""

    def __init__(self, arguments: Namespace, out: Path) -> None:
        self.arguments, self.out = arguments, out
        self.data = {name: Path(folder) for name, folder in arguments.data}
        if not self.data:
            self.data = {name: self._prepare(name) for name in arguments.domains}
        self.places = list(self.data)
        self.parts: dict[tuple[str, str], Part] = {}

    @cached_property
    def target(self) -> Target:
        return load_target(self.arguments.target, self.arguments.dtype)

    def _prepare(self, name: str) -> Path:
        """Let the target write a domain's answers, all of them greedily, since all of them are replayed."""
        folder, prompts = self.out / "data" / name, self.out / "data" / f"{name}.jsonl"
        prompts.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            domains.write(prompts, name, self.arguments.count, seed=1)
            draft_train(
                "prepare", "--target", self.arguments.target, "--prompts", str(prompts), "--greedy-share", "1",
                "--held-out-share", "0.4", "--max-new-tokens", str(self.arguments.max_new_tokens), "--out", str(folder),
            )  # fmt: skip
        return folder

    def describe(self, place: str) -> dict[str, Any]:
        """Return the counts of a place's rows, and what the head has on the test part before it is trained."""
        counts = open_dataset(self.data[place]).manifest["counts"]
        rows = {part: len(self._part(place, part).rows) for part in ("validation", "test")}
        head, part = shared.load_fitting_head(self.arguments.head, self.target), self._part(place, "test")
        untrained = {"units": {"acceptance": self.acceptance(head, part), "tau": self.tau(head, part)}}
        before = {measure: score(untrained, measure) for measure in untrained["units"]}
        return {"name": place, **rows, "before": before, **counts}

    def _part(self, place: str, name: str) -> Part:
        """The greedy held-out rows: the first VALIDATION_SHARE of the conversations by id are the validation part."""
        if (place, name) not in self.parts:
            dataset = open_dataset(self.data[place])
            dataset.check_target(self.target)
            greedy = [row for row in dataset.rows("held-out") if row.greedy and row.trained > 1]
            ids = sorted({row.id for row in greedy})
            if len(ids) < 4:
                raise UserError(f"{place}: {len(ids)} held-out greedy conversations are too few to judge by; add some.")
            first = set(ids[: max(1, round(VALIDATION_SHARE * len(ids)))])
            rows = [row for row in greedy if (row.id in first) == (name == "validation")]
            head = shared.load_fitting_head(self.arguments.head, self.target)
            with torch.no_grad():
                self.parts[place, name] = Part(rows, list(target_passes(self.target, rows, 2048, None, [head])))
        return self.parts[place, name]

    def perform(self, run: Run, folder: Path) -> dict[str, Any]:
        """Adapt the head as `draft-train adapt` does, merge it, and judge the file that was written."""
        place, given = run.setup.place, dict(run.setup.options)
        times = given.pop("steps", 1)
        make: Callable[[RunSettings, Console], Trainer] = Trainer
        if given.get("schedule") == "adaptive":
            del given["schedule"]
            make = AdaptiveTrainer
        length: dict[str, Any] = {"epochs": self.arguments.epochs * times}
        if self.arguments.max_steps:
            length["max_steps"] = self.arguments.max_steps * times
        flags = {
            "method": run.setup.method, "target": self.arguments.target, "head": self.arguments.head,
            "data": [str(self.data[place])], "dtype": self.arguments.dtype, "draft_steps": 3, "eval_every": 0,
            "tokens_per_batch": self.arguments.tokens_per_batch, "log_with": ["none"],
            "cache_hidden_states": str(self.out / "states" / place),
            "learning_rate": run.rate, "seed": run.seed, **length, **given,
        }  # fmt: skip
        trained = folder / "run"
        try:
            make(resolve("adapt", str(trained), flags=flags), Console(quiet=True)).train()
        except UserError as error:
            if "not finite" not in str(error):  # a rate that is too high is an answer, not a mistake
                raise
            return {"diverged": str(error)}
        shutil.copyfile(trained / "metrics.jsonl", folder / "metrics.jsonl")
        last = read_lines(folder / "metrics.jsonl")[-1]
        result: dict[str, Any] = {"steps": last["step"], "beta": last.get("beta")}
        merged = merge_run(trained, folder / "merged").head
        head = shared.load_fitting_head(str(merged), self.target)
        part = self._part(place, run.part)
        result["units"] = {"acceptance": self.acceptance(head, part), "tau": self.tau(head, part)}
        if run.setup.method == "afa-lora":
            result["merged_differences"] = self.differences(trained, part)
        return result

    def tau(self, head: DraftHead, part: Part) -> list[list[float]]:
        """(emitted, verifications) of each conversation."""
        result = replay(self.target, {"head": head}, part.rows, DECIDING_LENGTH, passes=part.passes)["head"]
        return result.units(DECIDING_LENGTH).tolist()

    @torch.no_grad()
    def acceptance(self, head: DraftHead, part: Part) -> list[list[float]]:
        """(sum of Σ_v min(p, q), number of drafts) of each conversation, EOS left out of the sum over v."""
        spans = [generations(row, self.target.eos_token_ids) for row in part.rows]
        ids, unit = np.unique([row.id for row in part.rows], return_inverse=True)
        sums = np.zeros((len(ids), 2))
        for indices, tokens, output in part.passes:
            wanted = response_positions([spans[index] for index in indices], tokens)
            _, overlaps = rejection_terms(self.target, head, tokens, output, wanted, DECIDING_LENGTH)
            inside = wanted  # entries whose draft step is about a token of the same response
            for step in range(overlaps.shape[-1]):
                if step:
                    inside = inside & shift_left(wanted, step)
                totals = (overlaps[..., step] * inside).sum(dim=1), inside.sum(dim=1)
                np.add.at(sums, unit[indices], torch.stack([total.double() for total in totals], dim=1).cpu().numpy())
        return sums[sums[:, 1] > 0].tolist()

    def differences(self, run: Path, part: Part) -> dict[str, float]:
        """Logits of the adapter beside those of the same adapter merged, on a batch of the target's states."""
        head = shared.load_fitting_head(self.arguments.head, self.target).float()
        model = load_afa_adapter(head, run / "adapter", is_trainable=False)
        _, tokens, output = part.passes[0]

        def outputs(head: DraftHead) -> torch.Tensor:
            states = output.states_of(head.auxiliary_layers(self.target)).to(head.dtype)
            hidden = next(iter(head.unroll(self.target.embedding(tokens).to(head.dtype), states, 1)))
            return head.logits(hidden, 0)

        return merged_differences(model, outputs)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
