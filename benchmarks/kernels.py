"""Time the fused kernels of an annealed LoRA layer against everything that could run instead of them.

For each linear layer of a Llama-3.1-8B EAGLE-3 head, number of tokens and rank: forward, backward and both, of the
kernels (the measured choice, and each of its two variants by itself), of the plain PyTorch layer in eager mode (fp32
adapters under bf16 autocast, as PEFT runs it; bf16 adapters) and compiled, of the frozen linear alone, and the floor
that follows from the device's measured ceilings. Writes kernels-<device>.json and .png.

A run on the CPU (--device cpu with TRITON_INTERPRET=1 and small sizes) checks this program and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from afa_kernels import ACTIVATIONS, afa_lora_linear, reference
from benchmarks import shared
from benchmarks.shared import Bar, at_least, at_most
from draft.errors import UserError

MODULE = "benchmarks.kernels"
EXAMPLES = f"""
examples:
  python -m {MODULE} --out benchmarks/results --check
"""
# The linear layers of an EAGLE-3 head for Llama-3.1-8B: (in, out). k and v are one shape, as are gate and up.
SHAPES = {
    "q": (8192, 4096),
    "kv": (8192, 1024),
    "o": (4096, 4096),
    "gate_up": (4096, 14336),
    "down": (14336, 4096),
    "fc": (12288, 4096),
}
PHASES = ("forward", "backward", "both")
KERNELS, FUSED, UPDATE, LINEAR = "kernels", "fused", "update", "linear"
EAGER_AUTOCAST, EAGER, COMPILED = "eager, fp32 adapters, autocast", "eager, bf16 adapters", "compiled"
CONTENDERS = (KERNELS, FUSED, UPDATE, EAGER_AUTOCAST, EAGER, COMPILED, LINEAR)
WARM_UPS = 5
AHEAD = 2_000_000  # clock cycles, about a millisecond, in which the host enqueues what is then timed
BETA = 0.5

# ---- the program ----


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = shared.Parser(MODULE, __doc__, EXAMPLES)
    parser.add("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add("--shapes", layer_shape, nargs="+", default=list(SHAPES), metavar="NAME|INxOUT")
    parser.add("--tokens", shared.whole(1), nargs="+", default=[2048, 8192, 16384])
    parser.add("--ranks", shared.whole(1), nargs="+", default=[8, 16, 64, 128], help="at most 256")
    parser.add("--activation", default="silu", choices=tuple(ACTIVATIONS))
    parser.add("--repeats", shared.whole(1), default=50, help="timed runs of each; the median counts")
    parser.add_output("benchmarks.kernels-<device>")
    return parser.parse_args(arguments)


def layer_shape(text: str) -> str:
    """Return a layer's name, or INxOUT."""
    if text not in SHAPES and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither one of {', '.join(SHAPES)} nor INxOUT such as 4096x4096")
    return text


def benchmark(options: argparse.Namespace, command: Sequence[str]) -> int:
    import triton

    if max(options.ranks) > 256:
        raise UserError(f"--ranks {max(options.ranks)} is above 256, the kernels' largest; leave it out.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is here: run this on one, or check the program with --device cpu.")
    if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("--device cpu interprets the kernels: set TRITON_INTERPRET=1.")
    device, out = torch.device(options.device), shared.output_folder(options.out)
    os.environ["AFA_KERNELS"] = "triton"  # refuse instead of falling back to the reference
    torch.manual_seed(0)
    limits = ceilings(device)
    console = shared.make_console()
    with shared.progress_bar() as progress:
        cases = list(itertools.product(options.shapes, options.tokens, options.ranks))
        rows = [row for case in progress.track(cases, description="layers") for row in rows_of(*case, options, limits)]
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    results = {
        **shared.run_provenance(MODULE, command),
        "device": chip,
        "machine": {"cpu": shared.cpu_model(), "interpreted": device.type == "cpu"},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "ceilings": limits,
        "repeats": options.repeats,
        "bars": judge(rows),
        "rows": rows,
    }
    console.print(make_table(rows))
    console.print(f"ceilings: {limits['flops'] / 1e12:.1f} TFLOP/s in bf16, {limits['bytes'] / 1e9:.0f} GB/s copied")
    if device.type == "cpu":
        console.print("interpreted on the CPU: these times say nothing about the kernels")
    shared.show_bars(console, results["bars"])
    slug = re.sub(r"[^A-Za-z0-9]+", "-", chip).strip("-").lower()
    shared.finish(console, results, out / f"kernels-{slug}", draw)
    return shared.exit_status(results, options.check)


def rows_of(
    shape: str, tokens: int, rank: int, options: argparse.Namespace, limits: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Measure one layer; yields a row for each phase."""
    width, out = SHAPES.get(shape) or map(int, shape.split("x"))
    device = torch.device(options.device)
    layer = Layer(tokens, width, out, rank, device, options.activation)
    found = measure(layer, device, options.repeats)
    common = {"layer": shape, "in": width, "out": out, "tokens": tokens, "rank": rank}
    common |= {"peak_mib": peak_memory(layer, device), "errors": errors(layer)}
    for phase, times in found.items():
        floor = work(tokens, width, out, rank, phase).floor(limits)
        yield common | {"phase": phase, "floor_ms": floor, "ms": times}


# ---- what is timed ----


class Layer:
    """One layer's tensors. x and dy rotate through more memory than the L2 cache holds."""

    def __init__(self, tokens: int, width: int, out: int, rank: int, device: torch.device, activation: str) -> None:
        def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        copies = 1 + -(-2 * cache // (2 * tokens * min(width, out)))
        self.x = [randn(tokens, width).requires_grad_() for _ in range(copies)]
        self.dy = [randn(tokens, out) for _ in range(copies)]
        self.weight = randn(out, width, scale=width**-0.5)
        a = randn(rank, width, dtype=torch.float32, scale=width**-0.5)
        b = randn(out, rank, dtype=torch.float32, scale=rank**-0.5)
        self.fp32 = (a.requires_grad_(), b.requires_grad_())
        self.bf16 = tuple(t.detach().bfloat16().requires_grad_() for t in self.fp32)
        beta = torch.tensor(BETA, device=device)
        self.options: dict[str, Any] = {"beta": beta, "scaling": 2.0, "activation": activation}
        self.turn = 0

    def next(self) -> tuple[Tensor, Tensor]:
        self.turn = (self.turn + 1) % len(self.x)
        return self.x[self.turn], self.dy[self.turn]


@dataclass(frozen=True)
class Contender:
    """A way to compute the layer, the parameters that need gradients, and the contexts of a forward pass and a step."""

    function: Callable[..., Tensor]
    adapters: Sequence[Tensor]
    around_forward: Callable[[], Any] = contextlib.nullcontext
    around_step: Callable[[], Any] = contextlib.nullcontext

    def forward(self, layer: Layer, x: Tensor) -> Tensor:
        with self.around_forward():
            return self.function(x, layer.weight, None, *self.adapters, **layer.options)

    def backward(self, y: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, *self.adapters), dy)


def contenders(layer: Layer, device: torch.device) -> dict[str, Contender]:
    """Return everything that is timed, by name. torch.compile starts afresh for this layer."""
    from afa_kernels import tuning  # needs Triton

    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # the latter needs no C++ compiler
    compiled = torch.compile(reference.afa_lora_linear, dynamic=False, backend=backend)

    def autocast() -> Any:
        return torch.autocast(device.type, dtype=torch.bfloat16)

    return {
        KERNELS: Contender(afa_lora_linear, layer.fp32),
        FUSED: Contender(afa_lora_linear, layer.fp32, around_step=lambda: tuning.only("fused")),
        UPDATE: Contender(afa_lora_linear, layer.fp32, around_step=lambda: tuning.only("update")),
        EAGER_AUTOCAST: Contender(reference.afa_lora_linear, layer.fp32, around_forward=autocast),
        EAGER: Contender(reference.afa_lora_linear, layer.bf16),
        COMPILED: Contender(compiled, layer.bf16),
        LINEAR: Contender(lambda x, weight, *_, **__: F.linear(x, weight), ()),
    }


class Clock:
    """Clock of the device: CUDA events around work that was enqueued while the device was kept busy."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def ahead(self) -> None:
        """Give the host time to enqueue what is timed, so that launching it is not what is measured."""
        if self.on_gpu:
            torch.cuda._sleep(AHEAD)

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        if not self.on_gpu:
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


def time_step(contender: Contender, layer: Layer, clock: Clock) -> dict[str, float]:
    """Time one forward and backward, apart and together."""
    x, dy = layer.next()
    with contender.around_step():
        clock.ahead()
        start = clock.mark()
        y = contender.forward(layer, x)
        middle = clock.mark()
        contender.backward(y, x, dy)
        end = clock.mark()
    spans = {"forward": (start, middle), "backward": (middle, end), "both": (start, end)}
    return {phase: clock.milliseconds(*span) for phase, span in spans.items()}


def measure(layer: Layer, device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Return {phase: {contender: ms}}, medians over `repeats`; the contenders take turns."""
    clock, ways = Clock(device), contenders(layer, device)
    warm_ups = WARM_UPS if clock.on_gpu else 1
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(warm_ups + repeats):
        for name, way in ways.items():
            sample = time_step(way, layer, clock)
            if turn >= warm_ups:
                samples[name].append(sample)
    return {p: {name: statistics.median(s[p] for s in samples[name]) for name in ways} for p in PHASES}


def peak_memory(layer: Layer, device: torch.device) -> dict[str, float | None]:
    """Return the MiB that one forward and backward need beside the layer's own tensors."""
    ways = contenders(layer, device)
    if device.type == "cpu":
        return dict.fromkeys(ways)
    found: dict[str, float | None] = {}
    for name, way in ways.items():
        for _ in range(2):  # the first one may compile or measure
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            time_step(way, layer, Clock(device))
        found[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def errors(layer: Layer) -> dict[str, float]:
    """Return relative errors |got - exact| / |exact| of y, dx, dA and dB against the reference in float64."""
    x, dy = layer.next()
    way = Contender(afa_lora_linear, layer.fp32)
    y = way.forward(layer, x)
    got = (y.detach(), *way.backward(y, x, dy))
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, *layer.fp32))
    y64 = reference.afa_lora_linear(x64, layer.weight.double(), None, a64, b64, **layer.options)
    exact = (y64.detach(), *torch.autograd.grad(y64, (x64, a64, b64), dy.double()))
    pairs = zip(("y", "dx", "dA", "dB"), got, exact, strict=True)
    return {name: float((one.double() - other).norm() / other.norm()) for name, one, other in pairs}


def ceilings(device: torch.device) -> dict[str, float]:
    """Return FLOP/s of the largest bf16 product, and bytes/s of a copy (read and written), measured here and now."""
    side, size = (8192, 2**30) if device.type == "cuda" else (128, 2**20)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)

    def median(run: Callable[[], object]) -> float:
        times = []
        for turn in range(25):
            clock.ahead()
            start = clock.mark()
            run()
            end = clock.mark()
            if turn >= 5:
                times.append(clock.milliseconds(start, end))
        return statistics.median(times) / 1e3

    return {
        "flops": 2 * side**3 / median(lambda: left @ right),
        "bytes": 2 * size / median(lambda: target.copy_(source)),
    }


# ---- arithmetic, traffic and bars ----


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that cross the memory bus when each tensor does so once."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, ceilings: dict[str, float]) -> float:
        """Return the least milliseconds on a device of these `flops` and `bytes` a second."""
        return 1e3 * max(self.flops / ceilings["flops"], self.bytes / ceilings["bytes"])


def work(tokens: int, width: int, out: int, rank: int, phase: str) -> Work:
    """Return the work of x [tokens, width] -> y [tokens, out] in bf16 with fp32 adapters; z is kept in fp32."""
    if phase == "both":
        return work(tokens, width, out, rank, "forward") + work(tokens, width, out, rank, "backward")
    adapters, z, weight = 4 * rank * (width + out), 4 * tokens * rank, 2 * width * out
    if phase == "forward":  # x, W, A and B in; y and z out
        flops = 2 * tokens * (width * out + rank * (width + out))
        return Work(flops, 2 * tokens * (width + out) + weight + adapters + z)
    # dz = dy B, dx = dy W + dz A, dA = dz^T x, dB = dy^T h; dy, x, W, A, B and z in, dx, dA and dB out
    flops = 2 * tokens * (width * out + 2 * rank * (width + out))
    return Work(flops, 2 * tokens * (out + 2 * width) + weight + 2 * adapters + z)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def judge(rows: list[dict[str, Any]]) -> list[Bar]:
    """Return the bars of forward + backward, as far as the rows reach (two need rank 16 at 8192 tokens)."""
    both = [row for row in rows if row["phase"] == "both"]
    found = []
    for name, limit in ((EAGER, 1.25), (COMPILED, 1.1)):
        gains = [row["ms"][name] / row["ms"][KERNELS] for row in both]
        if gains:
            found.append(at_least(f"over {name}, geometric mean", geometric_mean(gains), limit))
            found.append(at_least(f"over {name}, worst shape", min(gains), 0.95))
    deciding = [row for row in both if row["rank"] == 16 and row["tokens"] == 8192]
    wide, narrow = [row for row in deciding if row["out"] >= 4096], [row for row in deciding if row["out"] == 1024]
    for name, limit, chosen in (("out at least 4096", 1.15, wide), ("out 1024", 1.35, narrow)):
        if chosen:
            worst = max(row["ms"][KERNELS] / row["ms"][LINEAR] for row in chosen)
            found.append(at_most(f"of the frozen linear alone, {name}", worst, limit))
    relative = [error for row in rows for error in row["errors"].values()]
    if relative:
        found.append(at_most("relative error against float64, worst", max(relative), 1e-2))
    return found


# ---- table and picture ----


def make_table(rows: list[dict[str, Any]]) -> Table:
    """Return a table of the kernels' times, the others' relative to them, and the floor."""
    columns = ("layer", "in", "out", "tokens", "rank", "phase", "kernels", "fused", "update")
    relative = {"eager autocast": EAGER_AUTOCAST, "eager bf16": EAGER, "compiled": COMPILED}
    title = "One layer: times in ms, and the others' time over the kernels' (x)"
    headings = (*columns, *relative, "over linear", "floor", "MiB", "MiB eager")
    table = shared.make_table(title, headings, ("layer", "phase"))
    for row in rows:
        ms, peak = row["ms"], row["peak_mib"]
        table.add_row(
            row["layer"],
            *(str(row[key]) for key in ("in", "out", "tokens", "rank")),
            row["phase"],
            *(f"{ms[name]:.3f}" for name in (KERNELS, FUSED, UPDATE)),
            *(f"{ms[name] / ms[KERNELS]:.2f}x" for name in relative.values()),
            f"{ms[KERNELS] / ms[LINEAR]:.2f}x",
            f"{row['floor_ms']:.3f}",
            *("–" if peak[name] is None else f"{peak[name]:.0f}" for name in (KERNELS, EAGER)),
        )
    return table


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw forward + backward over the frozen linear, one group a layer, at one number of tokens and one rank."""
    both = [row for row in results["rows"] if row["phase"] == "both"]
    tokens = 8192 if any(row["tokens"] == 8192 for row in both) else both[0]["tokens"]
    rank = 16 if any(row["rank"] == 16 for row in both) else both[0]["rank"]
    shown = [row for row in both if (row["tokens"], row["rank"]) == (tokens, rank)]
    names = [name for name in CONTENDERS if name != LINEAR]
    title = f"Annealed LoRA layer, forward + backward, {tokens} tokens, rank {rank}: {results['device']}"
    figure, (axis,) = shared.make_figure(1, title)
    figure.set_size_inches(11, 4.8)
    for index, name in enumerate(names):
        places = [group + (index - len(names) / 2 + 0.5) * 0.13 for group in range(len(shown))]
        axis.bar(places, [row["ms"][name] / row["ms"][LINEAR] for row in shown], width=0.12, label=name)
    floors = [row["floor_ms"] / row["ms"][LINEAR] for row in shown]
    axis.plot(range(len(shown)), floors, "k_", markersize=40, label="roofline")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(shown)), [f"{row['layer']}\n{row['in']} to {row['out']}" for row in shown])
    axis.set_ylabel("time / frozen linear alone")
    axis.legend(fontsize=8, ncols=2)
    shared.save_figure(figure, path)


main = partial(shared.run_program, parse, benchmark)

if __name__ == "__main__":
    sys.exit(main())
