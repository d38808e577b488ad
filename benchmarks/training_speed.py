"""Training speed: tokens a second of pretraining and adapting, part by part, against the machine's best matrix product.

All methods train on the same batch of random tokens without padding, in one process, in an order that rotates from
repeat to repeat; the product is measured again in each of them. Figures are medians over repeats, with the least and
the most; ratios are taken within a repeat.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks import cli, output, provenance
from benchmarks import training_report as report
from benchmarks.training_steps import PARTS, Product, Step, make_rows, spread_lengths, timed
from draft.data.examples import Batch, batches, collate, packed_batches
from draft.heads import DraftHead
from draft.heads.checkpoint import attach_head, load_head
from draft.target import DTYPES, Target, load_target
from draft.training.allocator import keep_freed_memory
from draft.training.config import RunSettings, resolve
from draft.training.model import blank_head, master_dtype

MODULE = "benchmarks.training_speed"
EXAMPLES = f"""
examples:
  python -m {MODULE} --target smollm2 --head smollm2-eagle3 --out runs/training_speed
  exit status 1 when a bar is missed:
    python -m {MODULE} --target smollm2 --head smollm2-eagle3 --out runs/training_speed --check
"""
METHODS = {"pretrain": ("pretrain", "full"), "lora": ("adapt", "lora"), "afa-lora": ("adapt", "afa-lora")}


def settings_of(name: str, arguments: Namespace) -> RunSettings:
    mode, method = METHODS[name]
    flags = {"data": ["(random tokens)"], "draft_steps": arguments.draft_steps}
    if mode == "adapt":
        flags |= {"head": arguments.head, "method": method, "rank": arguments.rank, "alpha": 2.0 * arguments.rank}
    return resolve(mode, arguments.out, flags=flags)  # type: ignore[arg-type]


def make_steps(target: Target, arguments: Namespace) -> dict[str, Step]:
    """Each method over weights of its own, as a run has them: full training's are wider where the target's are half."""
    base, about = load_head(arguments.head, device=target.device)
    attach_head(base, about, target)
    steps = {}
    for name in METHODS:
        head: DraftHead = base
        if name == "pretrain":
            head = blank_head(target, base.vocabulary, settings_of(name, arguments).model)
        head = head.to(master_dtype(target) if name == "pretrain" else target.dtype)
        steps[name] = Step(target, head, settings_of(name, arguments))
    return steps


def measure(
    steps: dict[str, Step], batch: Batch, own: Product, repeats: int
) -> tuple[dict[str, list[dict[str, float]]], float]:
    """Seconds by part of each method and repeat, and the share of the time that the kernel took."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    names = list(steps)
    before = os.times()
    with cli.progress_bar() as progress:
        task = progress.add_task("steps", total=repeats * len(names))
        for repeat in range(repeats):
            own.again()
            for place in range(len(names)):
                name = names[(repeat + place) % len(names)]
                samples[name].append(steps[name](batch))
                progress.advance(task)
    after = os.times()
    system, user = after.system - before.system, after.user - before.user
    return samples, system / max(system + user, 1e-9)


def measure_packing(step: Step, arguments: Namespace) -> dict[str, Any]:
    """The same conversations of different lengths, padded and packed: real tokens a second, and the padding."""
    rows = make_rows(spread_lengths(arguments.conversations, arguments.length), step.target.vocab_size)
    budget, longest = arguments.rows * arguments.length, max(len(row.ids) for row in rows)
    plans = {"padded": batches(rows, budget, 0, 0), "packed": packed_batches(rows, budget, longest, 0, 0)}
    ready = {
        name: [
            collate([rows[row] for row in part], longest if name == "packed" else None).to(step.target.device)
            for part in plan
        ]
        for name, plan in plans.items()
    }
    tokens = sum(len(row.ids) for row in rows)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for repeat in range(arguments.packing_repeats):
        for name in sorted(ready, reverse=repeat % 2 == 1):
            seconds[name].append(timed(lambda name=name: [step(batch) for batch in ready[name]]))  # type: ignore[misc]
    return {
        "conversations": len(rows),
        "tokens": tokens,
        "tokens_per_second": {
            name: report.spread([tokens / each for each in values]) for name, values in seconds.items()
        },
        "padding": {
            name: 1 - tokens / sum(batch.input_ids.numel() for batch in parts) for name, parts in ready.items()
        },
        "packed_over_padded": report.spread(
            [padded / packed for padded, packed in zip(seconds["padded"], seconds["packed"], strict=True)]
        ),
    }


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    disable_progress_bar()
    out = cli.output_folder(arguments.out)
    if not arguments.default_allocator:
        keep_freed_memory()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    target = load_target(arguments.target, arguments.dtype, arguments.device)
    results = {**provenance.provenance(MODULE, command, target), **measure_all(target, arguments)}
    console = cli.make_console()
    report.show(results, PARTS, console)
    bars = report.bars(results)
    results["bars"] = [report.bar_values(bar) for bar in bars]
    output.write_results(out / "training_speed.json", results)
    report.draw(results, PARTS, out / "training_speed.png")
    for bar in bars:
        console.print(str(bar))
    console.print(f"Wrote {out / 'training_speed.json'} and .png")
    return int(arguments.check and not all(bar.met for bar in bars))


def measure_all(target: Target, arguments: Namespace) -> dict[str, Any]:
    """Everything but what a reader is told about the machine."""
    steps = make_steps(target, arguments)
    batch = collate(make_rows([arguments.length] * arguments.rows, target.vocab_size)).to(target.device)
    products = {name: Product(DTYPES[name], target.device) for name in ("bfloat16", "float32")}
    dtype = str(target.dtype).removeprefix("torch.")
    own = products.setdefault(dtype, Product(target.dtype, target.device))
    flops, memory = {}, {}
    for name, step in steps.items():
        step(batch)  # whatever is made once
        memory[name] = step.memory_peak(batch)
        flops[name] = step.flops(batch)
    samples, system = measure(steps, batch, own, arguments.repeats)
    return {
        "settings": {**vars(arguments), "dtype": dtype},
        "products": {
            name: {"flops_per_second": product.best, "size": product.size} for name, product in products.items()
        },
        "system_time_share": system,
        "methods": [
            report.summarise(
                name, samples[name], arguments.rows * arguments.length, flops[name], own.best, memory[name]
            )
            for name in steps
        ],
        "afa_over_lora": report.ratios(samples["afa-lora"], samples["lora"]),
        "packing": measure_packing(steps["afa-lora"], arguments) if arguments.packing_repeats else None,
    }


def parse(arguments: Sequence[str]) -> Namespace:
    parser = cli.Parser(prog=f"python -m {MODULE}", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--target", default="smollm2", help="target (default: smollm2)")
    parser.add_argument("--head", default="smollm2-eagle3", help="head to adapt (default: smollm2-eagle3)")
    parser.add_argument("--out", required=True, help="folder for training_speed.json and .png")
    parser.add_argument("--dtype", default="auto", help="compute dtype (default: auto)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--threads", type=cli.whole(1), help="CPU threads (default: torch's)")
    parser.add_argument("--rows", type=cli.whole(1), default=8, help="rows of a batch (default: 8)")
    parser.add_argument("--length", type=cli.whole(8), default=256, help="tokens of a row (default: 256)")
    parser.add_argument("--draft-steps", type=cli.whole(1), default=4, help="draft steps K (default: 4)")
    parser.add_argument("--rank", type=cli.whole(1), default=16, help="rank of the adapters (default: 16)")
    parser.add_argument("--repeats", type=cli.whole(1), default=7, help="repeats of each method (default: 7)")
    parser.add_argument("--conversations", type=cli.whole(2), default=64, help="packed or padded (default: 64)")
    parser.add_argument(
        "--packing-repeats", type=cli.whole(0), default=3, help="repeats of packing on and off; 0: none (default: 3)"
    )
    parser.add_argument(
        "--default-allocator", action="store_true", help="let the C library give memory back between steps"
    )
    parser.add_argument("--check", action="store_true", help="exit status 1 when a bar is missed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    command = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parse(command)
    return cli.run_program(lambda: benchmark(parsed, command))


if __name__ == "__main__":
    sys.exit(main())
