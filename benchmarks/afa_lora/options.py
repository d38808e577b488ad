"""Options that the programs share, and the quick mode's values."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import shared
from benchmarks.afa_lora.experiment import AGAIN, ARMS, MOST_RATES, Experiment, Perform
from draft.errors import UserError


class Parser(shared.Parser):
    """Parser with --arms, --seeds, --rates, --quick and --out."""

    def add_experiment(self, module: str, rates: Mapping[str, Sequence[float]]) -> None:
        self.add("--arms", choices=(*ARMS, AGAIN), nargs="+", default=[*ARMS, AGAIN], help="arms, LoRA among them")
        self.add("--seeds", shared.whole(1), default=5, metavar="N", help="fresh seeds of each arm")
        grids = "; ".join(f"{arm}={','.join(f'{rate:g}' for rate in grid)}" for arm, grid in rates.items())
        self.add(
            "--rates",
            rate_grid,
            action="append",
            default=[],
            metavar="ARM=R,R,R",
            help=f"first grid of learning rates, which grows while the best is on its edge; repeatable ({grids})",
        )
        self.add("--quick", action="store_true", help="a smoke test in two minutes, which shows nothing")
        out = f"runs/afa-{module.rpartition('.')[2].replace('_', '-')}"
        self.add("--out", metavar="DIR", default=out, help="folder of runs, .json, .md and .png")
        self.set_defaults(first_rates={arm: list(grid) for arm, grid in rates.items()})


def rate_grid(text: str) -> tuple[str, list[float]]:
    """Return an arm and its rates: `lora=1e-4,2e-4,4e-4`."""
    arm, _, numbers = text.partition("=")
    if arm not in ARMS or not numbers:
        raise argparse.ArgumentTypeError(f"{text!r} is not ARM=R,R,R with an arm of {', '.join(ARMS)}")
    return arm, [shared.real(1e-12, 1e38)(number) for number in numbers.split(",")]


def grids(arguments: Namespace) -> dict[str, list[float]]:
    """Return the first grid of each arm."""
    return {**arguments.first_rates, **dict(arguments.rates)}


def apply_quick(arguments: Namespace, values: Mapping[str, Any], given: Sequence[str]) -> None:
    """Set --quick's values, except for options that the command line names."""
    for name, value in values.items() if arguments.quick else ():
        flag = f"--{name.replace('_', '-')}"
        if not any(word == flag or word.startswith(f"{flag}=") for word in given):
            setattr(arguments, name, value)


# options that choose runs, or where they are; all others change what a run is
_CHOICE = {"arms", "seeds", "full_seeds", "rates", "first_rates", "ranks", "domains", "ablations", "out", "quick"}
_FILES = {"train", "test", "problems", "data", "head"}  # known by what is in them


def make_experiment(
    arguments: Namespace, perform: Perform, measure: str, out: Path, keep: Sequence[str], data: Mapping[str, Any]
) -> Experiment:
    """Return the experiment that the options describe.

    data: what identifies the target and the data beside the options.

    Raises:
        UserError: when LoRA, with which everything is compared, is not among the arms; when `out` holds runs that were
            made with other options.
    """
    if "lora" not in arguments.arms:
        raise UserError(f"--arms {' '.join(arguments.arms)}: the others are compared with lora; add it.")
    say = shared.make_console().print
    most = 0 if arguments.quick else MOST_RATES
    experiment = Experiment(out, perform, measure, arguments.seeds, keep=keep, say=say, most_rates=most)
    shared_by_runs = {name: value for name, value in vars(arguments).items() if name not in _CHOICE | _FILES}
    experiment.settle(json.loads(json.dumps({**shared_by_runs, **data})))  # as it is read back
    return experiment


QUICK_NOTE = "**Smoke test (--quick): these numbers show nothing.** "


def about(arguments: Namespace, text: str) -> str:
    return (QUICK_NOTE if arguments.quick else "") + text
