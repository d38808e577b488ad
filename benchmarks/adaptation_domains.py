"""The gain of adapting a head on each of several domains by each method, by replay of held-out conversations.

The prompts are put together by `benchmarks.domains`; the target answers them (`draft-train prepare`). Each method is a
`draft-train adapt` of its own from the same head, merged and replayed on the same greedy held-out rows as the base
head. tickets-fine-tuned has the prompts of tickets without their system prompt, for a target that a LoRA adapter has
fine-tuned on them (`benchmarks.fine_tuned_target`).

  domain τ    acceptance length on the domain's held-out rows, K = 5, bonus included; the gain paired by conversation
  general τ   the same on general conversations that this target wrote
  tokens/s    with --serve: draft-serve in its automatic mode, a server of each head in turn, median of the answers

What is finished is not done again: the same command goes on after an interruption.
"""

from __future__ import annotations

import shlex
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import domains, shared
from draft import demo
from draft.data.dataset import Row, open_dataset
from draft.errors import UserError
from draft.evaluation.compare import DECIDING_LENGTH, GENERAL_ROWS
from draft.evaluation.replay import replay, target_passes
from draft.evaluation.tau import bootstrap_gain, bootstrap_ratio
from draft.files import read_json, write_json
from draft.target import Target, load_target

MODULE = "benchmarks.adaptation_domains"
FINE_TUNED = "tickets-fine-tuned"
CASES = (*domains.DOMAINS, FINE_TUNED)
BASE = "--epochs 2 --tokens-per-batch 1024 --draft-steps 3"
METHODS = {
    "afa-lora": "--method afa-lora --rank 16",
    "lora": "--method lora --rank 16",
    "full": "--method full",
    "full-rebuilt": "--method full --rebuild-vocabulary",
}
EXAMPLES = f"""
examples:
  all domains by all methods (an hour on one core):
    python -m {MODULE} --out runs/domains
  the fine-tuned target, and what is served:
    python -m {MODULE} --only {FINE_TUNED} --serve full --out runs/domains
  your own settings, from a YAML file of names and flags (full 1e-3: --method full --learning-rate 1e-3):
    python -m {MODULE} --only sql --methods mine.yaml --out runs/domains
"""


@dataclass(frozen=True)
class Case:
    """A domain with its target: the options that name it, and its data."""

    name: str
    model: list[str]
    data: Path
    general: Path  # a data set that the target wrote to general prompts
    adapter: str | None


@dataclass
class Judge:
    """Replays of heads, with the passes of each target kept."""

    rows: int
    targets: dict[str | None, Target] = field(default_factory=dict)  # by adapter
    passes: dict[Path, tuple[list[Row], Any]] = field(default_factory=dict)  # by data set

    def units(self, target_name: str, case: Case, head_folder: str, file: Path) -> dict[str, list[list[float]]]:
        """Return (emitted, verifications) of each conversation, by "domain" and "general"; kept in `file`."""
        if file.is_file():
            return read_json(file)
        if case.adapter not in self.targets:
            self.targets[case.adapter] = load_target(target_name, adapter=case.adapter)
        target = self.targets[case.adapter]
        head = shared.load_fitting_head(head_folder, target)
        found = {}
        for what, folder in (("domain", case.data), ("general", case.general)):
            if folder not in self.passes:
                rows = [row for row in open_dataset(folder).rows("held-out") if row.greedy][: self.rows]
                self.passes[folder] = rows, list(target_passes(target, rows, 4096, None, [head]))
            rows, passes = self.passes[folder]
            result = replay(target, {"head": head}, rows, DECIDING_LENGTH, passes=passes)["head"]
            found[what] = result.units(DECIDING_LENGTH).tolist()
        write_json(file, found)
        return found


def parse(arguments: Sequence[str]) -> Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    parser.add_models(default=True)
    parser.add("--target-adapter", metavar="DIR", help=f"adapter of {FINE_TUNED} (default: the one that ships)")
    parser.add("--only", metavar="NAME", nargs="+", default=list(CASES), help="domains")
    parser.add("--methods", metavar="FILE", help="YAML: name -> flags (default: the built-in ones)")
    parser.add("--base", default=BASE, metavar="FLAGS", help="flags of every run")
    parser.add("--count", shared.whole(8), default=160, metavar="N", help="conversations of a domain")
    parser.add("--max-new-tokens", shared.whole(2), default=demo.NEW_TOKENS, metavar="N", help="of an answer")
    parser.add("--rows", shared.whole(1), default=64, metavar="N", help="replayed rows, at most")
    parser.add("--seed", shared.whole(0), default=1, metavar="N", help="of the prompts")
    parser.add("--serve", metavar="METHOD", help="serve the heads of this method, too; the machine must be idle")
    parser.add_output(MODULE, check=False)
    return parser.parse_args(arguments)


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    console = shared.make_console()
    methods = choose(arguments)
    out = shared.output_folder(arguments.out)
    judge = Judge(arguments.rows)
    results: dict[str, Any] = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, load_target(arguments.target)),
        "head": shared.head_provenance("base", arguments.head),
        "settings": vars(arguments),
        "methods": methods,
        "runs": [],
        "served": [],
    }
    for name in arguments.only:
        case = make_case(name, arguments, out)
        folder = out / name
        base = judge.units(arguments.target, case, arguments.head, folder / "base.json")
        for method, flags in methods.items():
            run = folder / method.replace(" ", "-")
            seconds = train(run, case, arguments, flags)
            units = judge.units(arguments.target, case, str(run / "merged"), run / "units.json")
            results["runs"].append({"case": name, "method": method, "seconds": seconds, **figures(base, units)})
            shared.write_results(out / "adaptation_domains.json", results)
        if arguments.serve:
            results["served"].append({"case": name, **serve(case, arguments, folder)})
            shared.write_results(out / "adaptation_domains.json", results)
    show(console, results)
    (out / "adaptation_domains.md").write_text(markdown(results), encoding="utf-8")
    draw(results, out / "adaptation_domains.png")
    return 0


def choose(arguments: Namespace) -> dict[str, str]:
    """Return the methods to compare, by name.

    Raises:
        UserError: for a domain or a method that is none.
    """
    for name in arguments.only:
        if name not in CASES:
            raise UserError(f"--only {name!r} is no domain; they are {', '.join(CASES)}.")
    methods = shared.named_flags("--methods", arguments.methods) if arguments.methods else METHODS
    if arguments.serve and arguments.serve not in methods:
        raise UserError(f"--serve {arguments.serve!r} is no method; they are {', '.join(methods)}.")
    return dict(methods)


def make_case(name: str, arguments: Namespace, out: Path) -> Case:
    """Let the target write the data of a domain, and general ones where none ship for it."""
    tuned = name == FINE_TUNED
    adapter = arguments.target_adapter or str(demo.FINE_TUNED) if tuned else None
    model = ["--target", arguments.target, *(["--target-adapter", adapter] if adapter else [])]
    prompts, data, general = out / name / "prompts.jsonl", out / name / "data", GENERAL_ROWS
    domains.write(prompts, "tickets" if tuned else name, arguments.count, arguments.seed, system=not tuned)
    shares = ["--greedy-share", "0.75", "--held-out-share", "0.25", "--max-new-tokens", str(arguments.max_new_tokens)]
    draft_train("prepare", *model, "--prompts", str(prompts), *shares, "--out", str(data))
    if tuned or arguments.target != "smollm2":
        general = out / ("general-fine-tuned" if tuned else "general")
        shares = ["--greedy-share", "0.75", "--held-out-share", "0.5", "--max-new-tokens", "128"]
        draft_train("prepare", *model, "--prompts", str(demo.GENERAL_PROMPTS), *shares, "--out", str(general))
    return Case(name, model, data, general, adapter)


def draft_train(*words: str) -> None:
    status = subprocess.run([sys.executable, "-m", "draft.cli", *words], check=False).returncode
    if status:
        raise UserError(f"`draft-train {shlex.join(words)}` ended with status {status}; its message is above.")


def train(run: Path, case: Case, arguments: Namespace, flags: str) -> float:
    """Adapt the head by one method and merge it, if that is not finished; return the seconds that it took."""
    done = run / "seconds.json"
    if not done.is_file():
        began = time.monotonic()
        given = [*shlex.split(arguments.base), *shlex.split(flags), "--eval-every", "0", "--log-with", "none"]
        if "--mix-general" in given and "--general" not in given:
            given += ["--general", str(case.general)]
        source = ["--head", arguments.head, "--data", str(case.data)]
        draft_train("adapt", *case.model, *source, *given, "--out", str(run / "run"))
        draft_train("merge", str(run / "run"), "--out", str(run / "merged"))
        write_json(done, {"seconds": time.monotonic() - began})
    return float(read_json(done)["seconds"])


def figures(base: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return τ of both heads and the paired gain, by "domain" and "general"."""
    found = {}
    for what, units in base.items():
        taus = {
            name: asdict(bootstrap_ratio(*zip(*each, strict=True)))
            for name, each in (("base", units), ("adapted", new[what]))
        }
        found[what] = {"conversations": len(units), **taus, "gain": asdict(bootstrap_gain(units, new[what]))}
    return found


def serve(case: Case, arguments: Namespace, folder: Path) -> dict[str, Any]:
    """Return the tokens per second of draft-serve with both heads; kept in a file."""
    file = folder / f"served-{arguments.serve.replace(' ', '-')}.json"
    if not file.is_file():
        chosen = demo.held_out_prompts(arguments.target, folder / "prompts.jsonl", case.data, demo.SERVED)
        heads = {"base": arguments.head, "adapted": str(folder / arguments.serve.replace(" ", "-") / "merged")}
        texts = [text for _, text in chosen]
        answers = demo.serve_in_turn(case.model, heads, texts, arguments.max_new_tokens)
        rates = {name: demo.speeds(each) for name, each in answers.items()}
        ratios = [new / old for old, new in zip(rates["base"], rates["adapted"], strict=True)]
        medians = {name: statistics.median(values) for name, values in rates.items()}
        write_json(file, {"method": arguments.serve, "answers": len(ratios), **medians, "ratio": shared.spread(ratios)})
    return read_json(file)


# ---- output ----


HEADINGS = ("domain", "method", "domain τ", "gain", "general τ", "gain", "seconds")


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for run in results["runs"]:
        cells = []
        for what in ("domain", "general"):
            each = run[what]
            cells.append(f"{each['base']['value']:.2f} → {each['adapted']['value']:.2f}")
            cells.append(shared.interval_text({key: 100 * value for key, value in each["gain"].items()}, "+.1f"))
        rows.append((run["case"], run["method"], *cells, f"{run['seconds']:.0f}"))
    return rows


def served_lines(results: dict[str, Any]) -> list[str]:
    return [
        f"{each['case']}, {each['method']}: {each['base']:.0f} → {each['adapted']:.0f} tokens/s, ratio "
        f"{each['ratio']['median']:.2f} [{each['ratio']['least']:.2f}, {each['ratio']['most']:.2f}], "
        f"{each['answers']} answers"
        for each in results["served"]
    ]


def show(console: Console, results: dict[str, Any]) -> None:
    table = shared.make_table(f"greedy replay, K = {DECIDING_LENGTH}, gains in %", HEADINGS, ("domain", "method"))
    for row in table_rows(results):
        table.add_row(*row)
    console.print(table)
    for line in served_lines(results):
        console.print(line)


def markdown(results: dict[str, Any]) -> str:
    lines = [" | ".join(HEADINGS), " | ".join("---" for _ in HEADINGS), *map(" | ".join, table_rows(results))]
    text = "".join(f"| {line} |\n" for line in lines)
    return f"# {MODULE}\n\nHead {results['head']['path']}, commit {results['commit']}; gains in %.\n\n{text}" + "".join(
        f"\n{line}\n" for line in served_lines(results)
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the gains on the domain, with their intervals."""
    figure, (axis,) = shared.make_figure(1, "gain in acceptance length on the domain")
    names = [f"{run['case']}, {run['method']}" for run in results["runs"]]
    for place, run in enumerate(results["runs"]):
        gain = {key: 100 * value for key, value in run["domain"]["gain"].items()}
        axis.plot([gain["low"], gain["high"]], [place, place], color="tab:blue")
        axis.plot(gain["value"], place, "o", color="tab:blue")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="%")
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
