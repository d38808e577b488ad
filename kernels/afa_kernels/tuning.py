"""The fastest blocks of each kernel on this device: measured once, then remembered.

A choice is made per kernel, device, dtypes and shape class (see `shape_class`). It is kept in the process and in
a file, under a name that holds the device, the versions of Triton and torch, and a hash of the sources, so that
a choice never outlives what it was measured with.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton

logger = logging.getLogger(__name__)

WARM_UPS, REPEATS = 3, 11
CACHE_VARIABLE = "AFA_KERNELS_CACHE"


class Blocks(NamedTuple):
    """The division of a kernel's work: rows (tokens) and columns of a block, step of the summed axis, warps, stages."""

    tokens: int
    columns: int
    k: int
    warps: int
    stages: int
    arch: int = 80  # the oldest compute capability whose shared memory it fits
    # of the large product: torch (cuBLAS) computes the frozen part, and the kernel adds the rank-r term in place. That
    # reads and writes the result once more, but may win where cuBLAS is far ahead.
    in_place: bool = False


# Thin products (width x rank): `columns` is the whole rank, so the tables leave it 0.
THIN = {
    2: (
        Blocks(32, 0, 128, 4, 3),
        Blocks(16, 0, 128, 4, 4),
        Blocks(64, 0, 64, 4, 4),
        Blocks(128, 0, 64, 8, 3),
        Blocks(32, 0, 64, 8, 3),
        Blocks(16, 0, 64, 8, 3),
        Blocks(64, 0, 64, 8, 3),
    ),
    4: (Blocks(32, 0, 32, 8, 3), Blocks(16, 0, 64, 4, 3), Blocks(64, 0, 32, 8, 2), Blocks(16, 0, 32, 8, 3)),
}
LINEAR = {
    2: (
        Blocks(128, 128, 64, 8, 3),
        Blocks(128, 256, 64, 8, 3),
        Blocks(256, 128, 64, 8, 3),
        Blocks(64, 128, 64, 4, 4),
        Blocks(64, 64, 64, 4, 4),
        Blocks(128, 256, 64, 8, 4, arch=90),
        Blocks(256, 128, 64, 8, 4, arch=90),
    ),
    4: (Blocks(64, 64, 16, 8, 3), Blocks(128, 64, 16, 8, 3), Blocks(32, 64, 32, 4, 3)),
}
UPDATE = {  # the same kernel without its long sum: traffic only
    size: tuple(Blocks(*blocks, in_place=True) for blocks in table)
    for size, table in {
        2: ((64, 128, 64, 4, 1), (128, 128, 64, 8, 1), (32, 256, 64, 8, 1)),
        4: ((32, 64, 16, 4, 1), (64, 64, 16, 8, 1)),
    }.items()
}
PRODUCTS = {"fused": LINEAR, "update": UPDATE}  # the ways to the large product
OUTER = {
    2: (Blocks(64, 64, 0, 4, 3), Blocks(64, 128, 0, 8, 3), Blocks(128, 64, 0, 8, 2), Blocks(32, 128, 0, 8, 4)),
    4: (Blocks(16, 64, 0, 8, 3), Blocks(16, 32, 0, 4, 3)),
}
# An interpreted block costs its Python, not its arithmetic; small ones give small matrices ragged ends.
INTERPRETED = {"thin": Blocks(32, 0, 32, 1, 1), "linear": Blocks(32, 32, 32, 1, 1), "outer": Blocks(32, 32, 0, 1, 1)}
SHARED_MEMORY = 160 * 1024  # bytes of sm_80, less a margin
# Accumulators that a thread of a thin product may have: phi and its derivative are unrolled over them, so more of
# them spill, and take long to compile.
ACCUMULATORS = 32


def rank_block(rank: int, limit: int) -> int:
    """The power of two that covers `rank`: at least 16, which tl.dot needs, and at most `limit`."""
    return min(max(16, triton.next_power_of_2(rank)), limit)


def thin_blocks(itemsize: int, rank: int) -> list[Blocks]:
    """The blocks for down_kernel and dz_kernel whose stages and accumulators fit at this rank (at most 256)."""
    width = rank_block(rank, 256)

    def fits(b: Blocks) -> bool:
        accumulators = b.tokens * width // (32 * b.warps)
        shared = b.stages * (b.tokens + width) * b.k * itemsize
        return shared <= SHARED_MEMORY and accumulators <= ACCUMULATORS

    return [b for b in THIN[itemsize] if fits(b)]


def shape_class(tokens: int, columns: int, width: int, rank: int) -> tuple[int, int, int, int]:
    """Shapes that share one choice: tokens and rank up to the next power of two, the layer's own sizes exactly."""
    return triton.next_power_of_2(tokens), columns, width, rank_block(rank, 256)


_only: list[str] = []  # the last one counts: see `only`


@contextlib.contextmanager
def only(variant: str) -> Iterator[None]:
    """Within it, large products take this variant ("fused" or "update"), with the blocks that suit it best.

    For benchmarks and tests. Raises ValueError for another name.
    """
    if variant not in PRODUCTS:
        raise ValueError(f"unknown variant {variant!r}: choose {' or '.join(PRODUCTS)}")
    _only.append(variant)
    try:
        yield
    finally:
        _only.pop()


def product_variants() -> tuple[str, ...]:
    """The variants that the measurement may choose from at present: see `only`."""
    return (_only[-1],) if _only else tuple(PRODUCTS)


def choose(name: str, key: Sequence[object], candidates: Sequence[Blocks], run: Callable[[Blocks], object]) -> Blocks:
    """The fastest of `candidates` on the current CUDA device, by timing `run(candidate)` the first time.

    The first candidate is taken unmeasured on the CPU (interpreted), and while a CUDA graph is captured, where
    nothing can be timed; candidates that need more shared memory or registers than the device has are left out.
    Raises RuntimeError when none of them runs.
    """
    if len(candidates) == 1 or not _can_measure():
        return candidates[0]
    device = torch.cuda.current_device()
    label = f"{name} {' '.join(map(str, key))}"
    known = _remembered(device).get(label)
    if known is not None and known in map(list, candidates):
        return Blocks(*known)
    best = _measure(label, candidates, run)
    _remember(device, label, best)
    return best


def _can_measure() -> bool:
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def _measure(label: str, candidates: Sequence[Blocks], run: Callable[[Blocks], object]) -> Blocks:
    times: dict[Blocks, float] = {}
    for candidate in candidates:
        try:
            times[candidate] = _milliseconds(functools.partial(run, candidate))
        except triton.OutOfResources as error:
            logger.debug("afa_kernels: %s: %s is left out (%s)", label, candidate, error)
    if not times:
        raise RuntimeError(f"afa_kernels: no configuration of {label} runs on this device; set AFA_KERNELS=reference")
    best = min(times, key=times.__getitem__)
    logger.debug("afa_kernels: %s: %s takes %.4f ms of %s", label, best, times[best], times)
    return best


def _milliseconds(run: Callable[[], object]) -> float:
    """Median time on the device, by events."""
    for _ in range(WARM_UPS):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


# ---- the file ----


@functools.cache
def _cache_file(device: int) -> Path:
    folder = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "afa_kernels"
    sources = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(source.read_bytes())
    chip = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device))
    versions = f"triton{triton.__version__}-torch{torch.__version__}".replace("+", "-")
    return Path(folder) / f"{chip}-{versions}-{sources.hexdigest()[:12]}.json"


@functools.cache
def _remembered(device: int) -> dict[str, list]:
    try:
        values = json.loads(_cache_file(device).read_text())
        return values if isinstance(values, dict) else {}
    except (OSError, ValueError):  # none yet, or damaged: measure again
        return {}


def _remember(device: int, label: str, best: Blocks) -> None:
    """Add one choice to the file, atomically. A folder that can't be written costs the next process its time."""
    path = _cache_file(device)
    _remembered(device)[label] = list(best)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(_remembered(device), indent=1, sort_keys=True))
        os.replace(temporary, path)
    except OSError as error:
        logger.debug("afa_kernels: %s can't be written (%s)", path, error)
