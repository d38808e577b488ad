"""Settings of pretraining at an equal budget of tokens, judged by replay on held-out rows of every kind.

Each setting is a `draft-train pretrain` of its own: the flags of --base, then its own. All see the same conversations
in the order of their seed, each at most once, until the budget is spent, padding included; the hidden states of the
target are computed once and shared.

  τ            acceptance length of greedy replay over the rows of a kind (their source file), K = 5, bonus included
  mean         of the kinds' τ, each weighing the same
  position 1   share of first drafts that are accepted, over all rows
  tokens/s     of training from these states (a run that trains from text adds the target's pass)

`--heads` judges heads that are there, beside the settings. What is finished is not done again: the same command goes on
after an interruption.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import shared
from draft.data.dataset import Row, open_dataset
from draft.errors import UserError
from draft.evaluation.replay import replay, target_passes
from draft.evaluation.tau import acceptance_length
from draft.files import read_json, write_json
from draft.target import Target, load_target

MODULE = "benchmarks.pretraining"
EXAMPLES = f"""
examples:
  all built-in settings, two seeds (hours):
    python -m {MODULE} --data data/mixed --held-out data/kinds --tokens 1000000 --out runs/settings
  two of them:
    python -m {MODULE} --data data/mixed --held-out data/kinds --only base "muon 4e-3" --out runs/settings
  your own, from a YAML file of names and flags (medusa: --architecture medusa):
    python -m {MODULE} --data data/mixed --held-out data/kinds --settings mine.yaml --out runs/settings
  heads that are there, by kind:
    python -m {MODULE} --heads smollm2-eagle3 runs/head/head --held-out data/kinds --out runs/judged
"""
K = 5
SIDE_BY_SIDE = 5  # runs
BASE = "--optimizer adamw --weight-average 0 --draft-steps 3 --learning-rate 1e-3"
SETTINGS = {
    "base": "",
    "adamw 5e-4": "--learning-rate 5e-4",
    "adamw 2e-3": "--learning-rate 2e-3",
    "muon 1e-3": "--optimizer muon --learning-rate 1e-3",
    "muon 4e-3": "--optimizer muon --learning-rate 4e-3",
    "muon 1e-2": "--optimizer muon --learning-rate 1e-2",
    "512 tokens a batch": "--tokens-per-batch 512",
    "1024 tokens a batch": "--tokens-per-batch 1024",
    "4096 tokens a batch": "--tokens-per-batch 4096",
    "frozen LM head": "--freeze-lm-head",
    "average of weights 0.99": "--weight-average 0.99",
    "loss lk-lambda": "--loss lk-lambda",
    "every position": "--every-position",
    "1 draft step": "--draft-steps 1",
    "5 draft steps": "--draft-steps 5",
    "vocabulary 8192": "--draft-vocab-size 8192",
    "vocabulary 16384": "--draft-vocab-size 16384",
}


def parse(arguments: Sequence[str]) -> Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    parser.add("--target", default="smollm2", help="hub id, folder, .gguf file, or smollm2")
    parser.add(
        "--data",
        metavar="DIR",
        nargs="+",
        default=[],
        help="data sets to train on; the target's states of all their rows are kept in --out (up to 10 kB a token of "
        "the bundled target), so take ones that are not much larger than --tokens",
    )
    parser.add(
        "--held-out",
        metavar="DIR",
        nargs="+",
        required=True,
        help="data sets whose held-out greedy rows are replayed, a source file a kind: prepare them with "
        "--held-out-share 1 --greedy-share 1",
    )
    parser.add(
        "--heads", metavar="HEAD", nargs="+", default=[], help="heads to judge; without --data nothing is trained"
    )
    parser.add("--tokens", shared.whole(1), default=1_000_000, metavar="N", help="budget of a run")
    parser.add("--seeds", shared.whole(0), default=[0, 1], metavar="N", nargs="+", help="of start and order")
    parser.add("--base", default=BASE, metavar="FLAGS", help="flags of every run")
    parser.add("--settings", metavar="FILE", help="YAML: name -> flags (default: the built-in ones)")
    parser.add("--only", metavar="NAME", nargs="+", help="settings to run")
    parser.add("--rows", shared.whole(1), default=40, metavar="N", help="replayed rows a kind")
    parser.add_output(MODULE, check=False)
    return parser.parse_args(arguments)


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    console = shared.make_console()
    settings = choose(arguments) if arguments.data else {}
    if not settings and not arguments.heads:
        raise UserError("nothing to judge: give --data to train settings on, --heads, or both.")
    out = shared.output_folder(arguments.out)
    target = load_target(arguments.target)
    kinds = rows_by_kind(target, arguments)
    offered = sum(len(row.ids) for folder in arguments.data for row in open_dataset(folder).rows("train"))
    if settings and offered < arguments.tokens:
        raise UserError(
            f"--tokens {arguments.tokens}: --data has {offered:,}, and none is read twice; give fewer or more."
        )
    results = {
        "benchmark": MODULE,
        **shared.provenance(MODULE, command, target),
        "kinds": {kind: len(rows) for kind, rows in kinds.items()},
        "settings": vars(arguments),
        "runs": [],
    }
    passes: dict[Any, Any] = {}
    for name in arguments.heads:
        results["runs"].append({"setting": name, "flags": "", "seed": None, **judge(target, name, kinds, passes)})
        show(console, results, kinds)
        shared.write_results(out / "pretraining.json", results)
    for name, flags in settings.items():
        for seed in arguments.seeds:
            folder = out / f"{name.replace(' ', '-')}-{seed}"
            train(folder, arguments, flags, seed, out)
            judged = judge(target, str(folder / "head"), kinds, passes)
            results["runs"].append({"setting": name, "flags": flags, "seed": seed, **judged, **trained(folder)})
            show(console, results, kinds)
            shared.write_results(out / "pretraining.json", results)
    draw(results, out / "pretraining.png")
    return 0


def choose(arguments: Namespace) -> dict[str, str]:
    """Return the settings to run, by name."""
    settings = shared.named_flags("--settings", arguments.settings) if arguments.settings else SETTINGS
    for name in arguments.only or ():
        if name not in settings:
            raise UserError(f"--only {name!r} is no setting; they are {', '.join(settings)}.")
    return {name: settings[name] for name in arguments.only or settings}


def rows_by_kind(target: Target, arguments: Namespace) -> dict[str, list[Row]]:
    """Return the greedy held-out rows of each source file, at most --rows of each."""
    kinds: dict[str, list[Row]] = {}
    for folder in arguments.held_out:
        dataset = open_dataset(folder)
        dataset.check_target(target)
        for row in dataset.rows("held-out"):
            rows = kinds.setdefault(Path(row.source).stem, [])
            if row.greedy and len(rows) < arguments.rows:
                rows.append(row)
    if not any(kinds.values()):
        raise UserError(f"{', '.join(arguments.held_out)}: no greedy held-out rows; prepare some with a greedy share.")
    return {kind: rows for kind, rows in sorted(kinds.items()) if rows}


def train(folder: Path, arguments: Namespace, flags: str, seed: int, out: Path) -> None:
    """Run one setting, if it is not finished.

    Raises:
        UserError: when the folder holds a run of another command, and when the command fails.
    """
    words = ["pretrain", "--target", arguments.target, "--out", str(folder), "--epochs", "1", "--seed", str(seed)]
    words += ["--eval-every", "0", "--log-with", "none"]
    words += [word for data in arguments.data for word in ("--data", data)]
    words += [*shlex.split(arguments.base), *shlex.split(flags)]
    given = dict(zip(words, words[1:], strict=False))
    states = f"states-{given['--architecture']}" if "--architecture" in given else "states"  # each reads other layers
    words += ["--cache-hidden-states", str(out / states)]
    steps = arguments.tokens // int(given.get("--tokens-per-batch", 2048))
    words += ["--max-steps", str(max(1, steps))]
    done = folder / "finished.json"
    if done.is_file():
        if (before := read_json(done)["command"]) != words:
            raise UserError(
                f"{str(folder)!r} holds a run of another command (`draft-train {shlex.join(before)}`); choose another "
                "--out, or delete it."
            )
        return
    status = subprocess.run([sys.executable, "-m", "draft.cli", *words], check=False).returncode
    if status:
        raise UserError(f"`draft-train {shlex.join(words)}` ended with status {status}; its message is above.")
    write_json(done, {"command": words})


def judge(target: Target, name: str, kinds: dict[str, list[Row]], passes: dict[Any, Any]) -> dict[str, Any]:
    """Return the figures of a head by its name or folder."""
    head = shared.load_fitting_head(name, target)
    taus, accepted, drafted = {}, 0, 0
    for kind, rows in kinds.items():
        key = kind, head.auxiliary_layers(target)
        if key not in passes:
            passes[key] = list(target_passes(target, rows, 4096, None, [head]))
        result = replay(target, {"head": head}, rows, K, passes=passes[key])["head"]
        taus[kind] = acceptance_length(result.emitted[:, K - 1].sum(), result.verifications[:, K - 1].sum())
        accepted, drafted = accepted + result.accepted(K)[0], drafted + result.drafted(K)[0]
    return {"tau": taus, "mean": statistics.mean(taus.values()), "position_1": accepted / drafted}


def trained(folder: Path) -> dict[str, Any]:
    """Return what a run read, how fast, and its last loss."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens = sum(line.get("tokens", 0) for line in lines)
    return {"tokens": tokens, "tokens_per_second": lines[-1]["tokens_per_second"], "loss": lines[-1]["loss"]}


def show(console: Console, results: dict[str, Any], kinds: dict[str, list[Row]]) -> None:
    """Print a line a run, and a line a kind where the runs fit beside each other."""
    headings = ("setting", "seed", "mean", "worst kind", "position 1", "tokens", "tokens/s")
    table = shared.make_table(f"τ by greedy replay, K = {K}", headings, ("setting", "worst kind"))
    for run in results["runs"]:
        worst = min(kinds, key=lambda kind: run["tau"][kind])
        read = ("", "", "")
        if run["seed"] is not None:
            read = (str(run["seed"]), f"{run['tokens']:,}", f"{run['tokens_per_second']:.0f}")
        table.add_row(
            *(run["setting"], read[0], f"{run['mean']:.3f}", f"{worst} {run['tau'][worst]:.3f}"),
            *(f"{run['position_1']:.3f}", *read[1:]),
        )
    console.print(table)
    if len(results["runs"]) <= SIDE_BY_SIDE:
        names = [
            run["setting"] if run["seed"] is None else f"{run['setting']}, {run['seed']}" for run in results["runs"]
        ]
        table = shared.make_table("by kind", ("kind", *names), ("kind",))
        for kind in kinds:
            table.add_row(kind, *(f"{run['tau'][kind]:.3f}" for run in results["runs"]))
        console.print(table)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw each run's mean τ."""
    figure, (axis,) = shared.make_figure(1, f"pretraining settings, {results['settings']['tokens']:,} tokens")
    names = list(dict.fromkeys(run["setting"] for run in results["runs"]))
    for run in results["runs"]:
        axis.plot(run["mean"], names.index(run["setting"]), "o", color="tab:blue")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="mean τ of the kinds")
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
