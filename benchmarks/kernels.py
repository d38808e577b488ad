"""Times the fused kernels of an annealed LoRA layer against everything that could run instead of them.

    python -m benchmarks.kernels --out benchmarks/results

For each linear layer of a Llama-3.1-8B EAGLE-3 head, number of tokens and rank: forward, backward and both, of
the kernels (the measured choice, and each of its two variants by itself), of the plain PyTorch layer in eager mode
(fp32 adapters under bf16 autocast, as PEFT runs it; bf16 adapters) and compiled, of the frozen linear alone, and
the floor that the device's own measured ceilings leave. Writes kernels-<device>.json and .png.

A run on the CPU (--device cpu with TRITON_INTERPRET=1 and small sizes) checks this program and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afa_kernels import ACTIVATIONS, afa_lora_linear, reference
from benchmarks import cli, output, provenance
from benchmarks.kernel_costs import (
    COMPILED,
    EAGER,
    EAGER_AUTOCAST,
    FUSED,
    KERNELS,
    LINEAR,
    PHASES,
    SHAPES,
    UPDATE,
    bars,
    draw,
    make_table,
    work,
)
from draft.errors import UserError

WARM_UPS = 5
AHEAD = 2_000_000  # clock cycles, about a millisecond, in which the host enqueues what is then timed
BETA = 0.5


class Layer:
    """One layer's tensors. x and dy rotate through more memory than the L2 cache holds."""

    def __init__(self, tokens: int, width: int, out: int, rank: int, device: torch.device, activation: str) -> None:
        def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        copies = 1 + -(-2 * _l2_bytes(device) // (2 * tokens * min(width, out)))
        self.x = [randn(tokens, width).requires_grad_() for _ in range(copies)]
        self.dy = [randn(tokens, out) for _ in range(copies)]
        self.weight = randn(out, width, scale=width**-0.5)
        a = randn(rank, width, dtype=torch.float32, scale=width**-0.5)
        b = randn(out, rank, dtype=torch.float32, scale=rank**-0.5)
        self.fp32 = (a.requires_grad_(), b.requires_grad_())
        self.bf16 = tuple(t.detach().bfloat16().requires_grad_() for t in self.fp32)
        self.options: dict[str, Any] = {
            "beta": torch.tensor(BETA, device=device),
            "scaling": 2.0,
            "activation": activation,
        }
        self.turn = 0

    def next(self) -> tuple[Tensor, Tensor]:
        self.turn = (self.turn + 1) % len(self.x)
        return self.x[self.turn], self.dy[self.turn]


@dataclass(frozen=True)
class Contender:
    """A way to compute the layer, the parameters that want gradients, and what a forward and a step stand in."""

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
    """Everything that is timed, by name. torch.compile starts afresh for this layer."""
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
    """Times on the device: CUDA events around work that was enqueued while the device was kept busy."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def ahead(self) -> None:
        """Gives the host time to enqueue what is timed, so that launching it is not what is measured."""
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
    """One forward and backward, timed apart and together."""
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
    """{phase: {contender: ms}}, medians over `repeats`; the contenders take turns."""
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
    """MiB that one forward and backward need beside the layer's own tensors."""
    found: dict[str, float | None] = {}
    for name, way in contenders(layer, device).items():
        for _ in range(2):  # the first one may compile or measure
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            time_step(way, layer, Clock(device))
        peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
        found[name] = None if peak is None else peak / 2**20
    return found


def errors(layer: Layer) -> dict[str, float]:
    """Relative errors |got - exact| / |exact| of y, dx, dA and dB against the reference in float64."""
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
    """FLOP/s of the largest bf16 product, and bytes/s of a copy (read and written), measured here and now."""
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


def _l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


# ---- the program ----


def _shape(text: str) -> tuple[str, tuple[int, int]]:
    """An argparse type: a layer's name, or INxOUT."""
    if text in SHAPES:
        return text, SHAPES[text]
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither one of {', '.join(SHAPES)} nor INxOUT such as 4096x4096")
    return text, (int(match[1]), int(match[2]))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shapes", nargs="+", type=_shape, default=list(SHAPES.items()), metavar="NAME|INxOUT")
    parser.add_argument("--tokens", nargs="+", type=cli.whole(1), default=[2048, 8192, 16384])
    parser.add_argument("--ranks", nargs="+", type=cli.whole(1), default=[8, 16, 64, 128], help="at most 256")
    parser.add_argument("--activation", default="silu", choices=tuple(ACTIVATIONS))
    parser.add_argument("--repeats", type=cli.whole(1), default=50, help="timed runs of each; the median counts")
    parser.add_argument("--out", required=True, metavar="DIR", help="where kernels-<device>.json and .png go")
    parser.add_argument("--check", action="store_true", help="print the bars, and exit with 1 where one is missed")
    return parser.parse_args(arguments)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is here: run this on one, or check the program with --device cpu.")
    if name == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("--device cpu interprets the kernels: set TRITON_INTERPRET=1.")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _rows(options: argparse.Namespace, device: torch.device, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    for name, (width, out) in options.shapes:
        for tokens, rank in itertools.product(options.tokens, options.ranks):
            layer = Layer(tokens, width, out, rank, device, options.activation)
            found = measure(layer, device, options.repeats)
            shared = {"layer": name, "in": width, "out": out, "tokens": tokens, "rank": rank}
            shared |= {"peak_mib": peak_memory(layer, device), "errors": errors(layer)}
            for phase, times in found.items():
                floor = work(tokens, width, out, rank, phase).floor(limits)
                yield shared | {"phase": phase, "floor_ms": floor, "ms": times}


def _run(options: argparse.Namespace, given: Sequence[str]) -> int:
    if max(options.ranks) > 256:
        raise UserError(f"--ranks {max(options.ranks)} is above 256, the kernels' largest; leave it out.")
    device, folder = _device(options.device), cli.output_folder(options.out)
    os.environ["AFA_KERNELS"] = "triton"  # no silent way round what is to be timed
    torch.manual_seed(0)
    limits = ceilings(device)
    console = cli.make_console()
    total = len(options.shapes) * len(options.tokens) * len(options.ranks) * len(PHASES)
    rows = []
    with cli.progress_bar() as bar:
        task = bar.add_task("layers", total=total)
        for row in _rows(options, device, limits):
            rows.append(row)
            bar.advance(task)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = re.sub(r"[^A-Za-z0-9]+", "-", chip).strip("-").lower()
    found = bars(rows)
    results = _provenance(device, chip, given) | {"ceilings": limits, "repeats": options.repeats}
    results |= {"bars": [vars(one) | {"met": one.met} for one in found], "rows": rows}
    output.write_results(folder / f"kernels-{slug}.json", results)
    draw(rows, chip, folder / f"kernels-{slug}.png")
    console.print(make_table(rows))
    console.print(f"ceilings: {limits['flops'] / 1e12:.1f} TFLOP/s in bf16, {limits['bytes'] / 1e9:.0f} GB/s copied")
    if device.type == "cpu":
        console.print("interpreted on the CPU: these times say nothing about the kernels")
    if options.check:
        console.print("\n".join(map(str, found)))
    return int(options.check and not all(one.met for one in found))


def _provenance(device: torch.device, chip: str, given: Sequence[str]) -> dict[str, Any]:
    import triton

    return {
        "commit": provenance.commit(),
        "command": shlex.join(["python", "-m", "benchmarks.kernels", *given]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": chip,
        "machine": {"cpu": provenance.cpu_model(), "interpreted": device.type == "cpu"},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return cli.run_program(lambda: _run(_parse(given), given))


if __name__ == "__main__":
    sys.exit(main())
