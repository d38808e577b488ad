"""Training speed: tokens a second of pretraining and adapting, part by part, against the machine's best matrix product.

All methods train on the same batch of random tokens without padding, in one process, in an order that rotates from
repeat to repeat; the product is measured again in each of them. Figures are medians over repeats, with the least and
the most; ratios are taken within a repeat.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils.logging import disable_progress_bar

from benchmarks import shared
from benchmarks.shared import Bar, at_least, at_most, spread
from draft.afa import set_annealing_step
from draft.data.dataset import Row
from draft.data.examples import Batch, batches, collate, packed_batches
from draft.heads import DraftHead
from draft.heads.base import Features
from draft.target import DTYPES, Target, load_target, wait_for
from draft.training.batches import FeatureSource
from draft.training.config import RunSettings, resolve
from draft.training.loss import HeadLoss
from draft.training.model import autocast, blank_head, make_trainable, master_dtype, settle
from draft.training.optimizer import make_optimizer
from draft.training.run import trained_parameters

MODULE = "benchmarks.training_speed"
EXAMPLES = f"""
examples:
  python -m {MODULE} --target smollm2 --head smollm2-eagle3 --out runs/training_speed
  exit status 1 when a bar is missed:
    python -m {MODULE} --target smollm2 --head smollm2-eagle3 --out runs/training_speed --check
"""
METHODS = {"pretrain": ("pretrain", "full"), "lora": ("adapt", "lora"), "afa-lora": ("adapt", "afa-lora")}
PARTS = ("target forward", "head forward", "backward", "optimiser")
SIZES = (512, 1024, 2048, 4096, 8192)  # of square matrix products
LONG_PRODUCT = 0.7  # seconds, after which no larger product is tried
WEIGHT_PRODUCTS = ("mm", "addmm")  # torch's operators of linear layers; attention's products are others

# bars
SHARE_OF_PRODUCT = 0.45
MOST_OVER_LORA = 1.05

# ---- the program ----


def parse(arguments: Sequence[str]) -> Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    whole = shared.whole(1)
    parser.add_models(default=True)
    parser.add_dtype()
    parser.add("--device", default="auto", help="auto, cpu, cuda")
    parser.add("--threads", whole, help="CPU threads (default: torch's)")
    parser.add("--rows", whole, default=8, help="rows of a batch")
    parser.add("--length", shared.whole(8), default=256, help="tokens of a row")
    parser.add("--draft-steps", whole, default=4, help="draft steps K")
    parser.add("--rank", whole, default=16, help="rank of the adapters")
    parser.add("--repeats", whole, default=7, help="repeats of each method")
    parser.add("--conversations", shared.whole(2), default=64, help="conversations that are packed or padded")
    parser.add("--packing-repeats", shared.whole(0), default=3, help="repeats of packing on and off; 0: none")
    parser.add_output(MODULE)
    return parser.parse_args(arguments)


def benchmark(arguments: Namespace, command: Sequence[str]) -> int:
    disable_progress_bar()
    out = shared.output_folder(arguments.out)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    target = load_target(arguments.target, arguments.dtype, arguments.device)
    results = {**shared.provenance(MODULE, command, target), **measure_all(target, arguments)}
    results["bars"] = judge(results)
    console = shared.make_console()
    show(console, results)
    shared.finish(console, results, out / "training_speed", draw)
    return shared.exit_status(results, arguments.check)


def measure_all(target: Target, arguments: Namespace) -> dict[str, Any]:
    """Return everything but the provenance and the bars."""
    steps = make_steps(target, arguments)
    batch = collate(make_rows([arguments.length] * arguments.rows, target.vocab_size)).to(target.device)
    products = {name: Product(DTYPES[name], target.device) for name in ("bfloat16", "float32")}
    dtype = str(target.dtype).removeprefix("torch.")
    best = products.setdefault(dtype, Product(target.dtype, target.device))
    flops, memory = {}, {}
    for name, step in steps.items():
        step(batch)  # the first one sets things up
        memory[name] = step.memory_peak(batch)
        flops[name] = step.flops(batch)
    samples, system = measure(steps, batch, best, arguments.repeats)
    tokens = arguments.rows * arguments.length
    return {
        "settings": {**vars(arguments), "dtype": dtype},
        "products": {
            name: {"flops_per_second": product.best, "size": product.size} for name, product in products.items()
        },
        "system_time_share": system,
        "methods": [summarise(name, samples[name], tokens, flops[name], best.best, memory[name]) for name in steps],
        "afa_over_lora": ratios(samples["afa-lora"], samples["lora"]),
        "packing": measure_packing(steps["afa-lora"], arguments) if arguments.packing_repeats else None,
    }


def measure(
    steps: dict[str, Step], batch: Batch, product: Product, repeats: int
) -> tuple[dict[str, list[dict[str, float]]], float]:
    """Return seconds by part of each method and repeat, and the share of the time that the kernel took."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    names = list(steps)
    before = os.times()
    with shared.progress_bar() as progress:
        task = progress.add_task("steps", total=repeats * len(names))
        for repeat in range(repeats):
            product.again()
            for place in range(len(names)):
                name = names[(repeat + place) % len(names)]
                samples[name].append(steps[name](batch))
                progress.advance(task)
    after = os.times()
    system, user = after.system - before.system, after.user - before.user
    return samples, system / max(system + user, 1e-9)


def measure_packing(step: Step, arguments: Namespace) -> dict[str, Any]:
    """Compare padding and packing of the same conversations of different lengths: real tokens a second, padding."""
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
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for repeat in range(arguments.packing_repeats):
        for name in sorted(ready, reverse=repeat % 2 == 1):
            start = time.perf_counter()
            for batch in ready[name]:
                step(batch)
            seconds[name].append(time.perf_counter() - start)
    tokens = sum(len(row.ids) for row in rows)
    places = {name: sum(batch.input_ids.numel() for batch in parts) for name, parts in ready.items()}
    pairs = zip(seconds["padded"], seconds["packed"], strict=True)
    return {
        "conversations": len(rows),
        "tokens": tokens,
        "tokens_per_second": {name: spread([tokens / each for each in values]) for name, values in seconds.items()},
        "padding": {name: 1 - tokens / count for name, count in places.items()},
        "packed_over_padded": spread([padded / packed for padded, packed in pairs]),
    }


def make_rows(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[Row]:
    """Return conversations of random tokens, of which the last three quarters are trained on."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids: Tensor = torch.randint(0, vocab_size, (length,), generator=generator)
        rows.append(Row(str(number), ids.tolist(), [at >= length // 4 for at in range(length)], 1, 0.0, 1.0, "random"))
    return rows


def spread_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Return lengths like those of conversations: log-uniform from a tenth of the longest, which is among them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, generator=generator)
    return sorted([longest, *(max(4, round(longest * 10**-value)) for value in drawn.tolist()[1:])])


# ---- what is timed ----


def make_steps(target: Target, arguments: Namespace) -> dict[str, Step]:
    """Return each method over separate weights, as in a run: full training's are wider where the target's are half."""
    base = shared.load_fitting_head(arguments.head, target)
    steps = {}
    for name, (mode, method) in METHODS.items():
        flags = {"data": ["(random tokens)"], "draft_steps": arguments.draft_steps}
        if mode == "adapt":
            flags |= {"head": arguments.head, "method": method, "rank": arguments.rank, "alpha": 2.0 * arguments.rank}
        else:
            flags["optimizer"] = "adamw"  # as the others: Muon's products are no part of what is counted
        settings = resolve(mode, arguments.out, flags=flags)  # type: ignore[arg-type]
        if mode == "pretrain":
            head = blank_head(target, base.vocabulary, settings.model).to(master_dtype(target))
        else:
            head = base.to(target.dtype)
        steps[name] = Step(target, head, settings)
    return steps


class Step:
    """Training step of one mode and method, as the trainer makes it, with a clock between its parts."""

    def __init__(self, target: Target, head: DraftHead, settings: RunSettings) -> None:
        self.target, self.settings = target, settings
        head = copy.deepcopy(head)
        objective = settle(settings, head)
        self.head, saver = make_trainable(head.train(), settings)
        if settings.method == "afa-lora":
            set_annealing_step(saver, 1, 10)  # while the activation is there, which costs more than after
        self.module = HeadLoss(self.head, target, objective)
        self.parameters = list(trained_parameters(saver).values())
        self.optimizer = make_optimizer(trained_parameters(saver), self.head, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-6
        self.source = FeatureSource(target)
        self.source.layers = head.auxiliary_layers(target)

    def __call__(self, batch: Batch) -> dict[str, float]:
        """Train on a batch; returns the seconds of each part."""
        clock = [self._now()]
        features: Features = self.source.get(batch, list(range(len(batch.places))))
        clock.append(self._now())
        with autocast(self.target, self.settings):
            loss, _ = self.module(batch, features)
        clock.append(self._now())
        (loss / max(1, int(batch.trained_ahead(2).sum()))).backward()
        clock.append(self._now())
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.append(self._now())
        return {part: after - before for part, before, after in zip(PARTS, clock[:-1], clock[1:], strict=True)}

    def _now(self) -> float:
        wait_for(self.target.device)
        return time.perf_counter()

    def flops(self, batch: Batch) -> float:
        """Count the floating-point operations that a step over `batch`, which has no padding, needs.

        The weights' products are counted as they run. Of attention's products only those are counted that the causal
        mask leaves: the dense scores that a CPU computes above the diagonal are not needed.
        """
        with FlopCounterMode(display=False) as counter:
            self(batch)
        counted = counter.get_flop_counts()["Global"]
        products = sum(count for op, count in counted.items() if str(op).rpartition(".")[2] in WEIGHT_PRODUCTS)
        rows, tokens = batch.input_ids.shape
        steps = self.settings.training.draft_steps or 0
        pairs = rows * tokens * (tokens + 1) / 2  # of a query and a key that it sees
        wanted = torch.stack([batch.trained_ahead(2 + step) for step in range(steps)]).any(0)  # the head's queries
        pairs_of_head = int((wanted * torch.arange(1, tokens + 1)).sum())
        config, head = self.target.config, self.head.config
        width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size)
        in_target = 4 * pairs * width * self.target.num_layers  # two products of two operations each
        in_head = 4 * pairs_of_head * head.num_attention_heads * head.head_dim * steps
        return products + in_target + 3 * in_head  # the backward pass is twice the forward pass

    def memory_peak(self, batch: Batch) -> int | None:
        """Return the most bytes in a step: of CUDA's allocator, or on Linux of the process."""
        if self.target.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.target.device)
            self(batch)
            return torch.cuda.max_memory_allocated(self.target.device)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        self(batch)
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


class Product:
    """Best square matrix product of a dtype, which no training step can exceed."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.best, self.size = 0.0, 0
        for size in SIZES:
            if self._measure(size) > LONG_PRODUCT or (device.type == "cpu" and size >= 4096):
                break

    def again(self) -> None:
        """Measure the best size once more."""
        self._measure(self.size)

    def _measure(self, size: int) -> float:
        a, b = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        out = torch.empty_like(a)
        timings = []
        for _ in range(3):
            wait_for(self.device)
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            wait_for(self.device)
            timings.append(time.perf_counter() - start)
        if 2 * size**3 / min(timings) > self.best:
            self.best, self.size = 2 * size**3 / min(timings), size
        return min(timings)


# ---- figures ----

Samples = list[dict[str, float]]  # seconds by part, one a repeat


def summarise(
    name: str, samples: Samples, tokens: int, flops: float, product: float, memory: int | None
) -> dict[str, Any]:
    """Return a row of the table: tokens a second, parts, and the share of the best product that the step reaches."""
    seconds = [sum(sample.values()) for sample in samples]
    return {
        "method": name,
        "tokens_per_second": spread([tokens / each for each in seconds]),
        "seconds": spread(seconds),
        "parts": {part: median(sample[part] for sample in samples) for part in samples[0]},
        "flops": flops,
        "flops_per_second": flops / median(seconds),
        "share_of_product": flops / median(seconds) / product,
        "memory_peak_bytes": memory,
    }


def ratios(samples: Samples, others: Samples) -> dict[str, float]:
    """Return step time over step time of the same repeat."""
    pairs = zip(samples, others, strict=True)
    return spread([sum(ours.values()) / sum(theirs.values()) for ours, theirs in pairs])


def judge(results: dict[str, Any]) -> list[Bar]:
    adapted = next(row for row in results["methods"] if row["method"] == "afa-lora")
    dtype = results["settings"]["dtype"]
    note = "" if dtype == "bfloat16" else "; --dtype bfloat16 judges the bar as it was set"
    name = f"adapting / best {dtype} product, FLOP/s of unpadded tokens (trained in {dtype}{note})"
    return [
        at_least(name, adapted["share_of_product"], SHARE_OF_PRODUCT),
        at_most("AFA-LoRA step / LoRA step", results["afa_over_lora"]["median"], MOST_OVER_LORA),
    ]


# ---- table and picture ----


def show(console: Console, results: dict[str, Any]) -> None:
    settings = results["settings"]
    title = (
        f"{settings['rows']} rows of {settings['length']} tokens, K = {settings['draft_steps']}, "
        f"{settings['dtype']}, {results['machine']['threads']} threads; medians of {settings['repeats']}"
    )
    headings = ("method", "tokens/s", "least–most", "ms/step", *PARTS, "GFLOP/s", "of product", "memory peak")
    table = shared.make_table(title, headings, ("method",))
    for row in results["methods"]:
        rate, seconds, memory = row["tokens_per_second"], row["seconds"]["median"], row["memory_peak_bytes"]
        table.add_row(
            row["method"],
            f"{rate['median']:.0f}",
            f"{rate['least']:.0f}–{rate['most']:.0f}",
            f"{1e3 * seconds:.1f}",
            *[f"{row['parts'][part] / seconds:.0%}" for part in PARTS],
            f"{row['flops_per_second'] / 1e9:.1f}",
            f"{row['share_of_product']:.1%}",
            "–" if memory is None else f"{memory / 2**20:.0f} MiB",
        )
    console.print(table)
    for name, product in results["products"].items():
        console.print(f"best {name} product: {product['flops_per_second'] / 1e9:.1f} GFLOP/s at {product['size']}³")
    ratio, system = _spread_text(results["afa_over_lora"]), results["system_time_share"]
    console.print(f"AFA-LoRA / LoRA step time: {ratio}; system time {system:.1%}")
    if packing := results["packing"]:
        for name, rate in packing["tokens_per_second"].items():
            console.print(f"{name}: {rate['median']:.0f} real tokens/s, {packing['padding'][name]:.1%} padding")
        console.print(f"packed / padded speed: {_spread_text(packing['packed_over_padded'])}")
    shared.show_bars(console, results["bars"])


def _spread_text(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['least']:.3f}–{values['most']:.3f})"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the step time by part, and the share of the best product."""
    rows = results["methods"]
    names = [row["method"] for row in rows]
    title = f"training steps, {results['settings']['dtype']}, {results['machine']['cpu']}"
    figure, (left, right) = shared.make_figure(2, title)
    bottom = [0.0] * len(rows)
    for part in PARTS:
        heights = [1e3 * row["parts"][part] for row in rows]
        left.bar(names, heights, bottom=bottom, label=part)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    left.set(ylabel="milliseconds a step")
    left.legend()
    right.bar(names, [row["share_of_product"] for row in rows])
    right.axhline(SHARE_OF_PRODUCT, linestyle="--", color="grey")
    right.set(ylabel="FLOP/s over the best matrix product's")
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
