"""What benchmarks.kernels compares with: the layer's arithmetic and traffic, the floor, the bars, table and picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.output import make_figure, save_figure

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


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that have to cross the memory bus when each tensor does so once."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, ceilings: dict[str, float]) -> float:
        """Milliseconds at least, on a device of these `flops` and `bytes` a second."""
        return 1e3 * max(self.flops / ceilings["flops"], self.bytes / ceilings["bytes"])


def work(tokens: int, width: int, out: int, rank: int, phase: str) -> Work:
    """The layer x [tokens, width] -> y [tokens, out] in bf16 with fp32 adapters of this rank; z is kept in fp32."""
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


@dataclass(frozen=True)
class Bar:
    """One figure that the kernels have to reach."""

    name: str
    value: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "at most"
        return f"{'met   ' if self.met else 'MISSED'}  {self.name}: {self.value:.3f}, {sign} {self.limit:g}"


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The bars of forward + backward, as far as the rows reach (the last two need rank 16 at 8192 tokens)."""
    both = [row for row in rows if row["phase"] == "both"]
    found = []
    for name, limit in ((EAGER, 1.25), (COMPILED, 1.1)):
        gains = [row["ms"][name] / row["ms"][KERNELS] for row in both]
        if gains:
            found.append(Bar(f"over {name}, geometric mean", geometric_mean(gains), limit, True))
            found.append(Bar(f"over {name}, worst shape", min(gains), 0.95, True))
    for name, limit, fits in (
        ("out at least 4096", 1.15, lambda out: out >= 4096),
        ("out 1024", 1.35, lambda out: out == 1024),
    ):
        chosen = [row for row in both if row["rank"] == 16 and row["tokens"] == 8192 and fits(row["out"])]
        if chosen:
            worst = max(row["ms"][KERNELS] / row["ms"][LINEAR] for row in chosen)
            found.append(Bar(f"of the frozen linear alone, {name}", worst, limit, False))
    errors = [error for row in rows for error in row["errors"].values()]
    if errors:
        found.append(Bar("relative error against float64, worst", max(errors), 1e-2, False))
    return found


def make_table(rows: list[dict[str, Any]]) -> Table:
    """Times of the kernels, what the others take relative to them, and the distance from the floor."""
    table = Table(title="One layer: times in ms, and the others' time over the kernels' (x)")
    columns = ("layer", "in", "out", "tokens", "rank", "phase", "kernels", "fused", "update")
    relative = {"eager autocast": EAGER_AUTOCAST, "eager bf16": EAGER, "compiled": COMPILED}
    for name in (*columns, *relative, "over linear", "floor", "MiB", "MiB eager"):
        table.add_column(name, justify="left" if name in ("layer", "phase") else "right")
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


def draw(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """Forward + backward as bars over the frozen linear, one group a layer, at one number of tokens and one rank."""
    both = [row for row in rows if row["phase"] == "both"]
    tokens = 8192 if any(row["tokens"] == 8192 for row in both) else both[0]["tokens"]
    rank = 16 if any(row["rank"] == 16 for row in both) else both[0]["rank"]
    shown = [row for row in both if (row["tokens"], row["rank"]) == (tokens, rank)]
    names = [name for name in CONTENDERS if name != LINEAR]
    figure, (axis,) = make_figure(1, f"Annealed LoRA layer, forward + backward, {tokens} tokens, rank {rank}: {device}")
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
    save_figure(figure, path)
