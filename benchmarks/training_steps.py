"""What benchmarks.training_speed times: a training step taken apart, its arithmetic, the machine's best product."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from draft.afa import set_annealing_step
from draft.data.dataset import Row
from draft.data.examples import Batch
from draft.heads import DraftHead
from draft.heads.base import Features
from draft.target import Target
from draft.training.batches import FeatureSource
from draft.training.config import RunSettings
from draft.training.loss import HeadLoss
from draft.training.model import autocast, make_trainable, parameter_groups, settle
from draft.training.run import trained_parameters

PARTS = ("target forward", "head forward", "backward", "optimiser")
SIZES = (512, 1024, 2048, 4096, 8192)
LONG_PRODUCT = 0.7  # seconds, after which no larger product is tried
WEIGHT_PRODUCTS = ("mm", "addmm")  # what a linear layer is to torch; attention's products are others


class Step:
    """A training step as the trainer makes it, of one mode and method, with a clock between its parts."""

    def __init__(self, target: Target, head: DraftHead, settings: RunSettings) -> None:
        self.target, self.settings = target, settings
        head = copy.deepcopy(head)
        objective = settle(settings, head)
        self.head, saver = make_trainable(head.train(), settings)
        if settings.method == "afa-lora":
            set_annealing_step(saver, 1, 10)  # while the activation is there, which costs more than after
        self.module = HeadLoss(self.head, target, objective)
        self.parameters = list(trained_parameters(saver).values())
        groups = parameter_groups(self.parameters, scaled=settings.method == "full")
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
        self.source = FeatureSource(target)
        self.source.layers = head.auxiliary_layers(target)

    def __call__(self, batch: Batch) -> dict[str, float]:
        """Seconds of each part."""
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
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.perf_counter()

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of a step that `batch`, which has no padding, asks for.

        The weights' products are counted as they run. Of attention's only those that the causal mask leaves are: the
        dense scores that a CPU computes above the diagonal are no work that anybody asked for.
        """
        with FlopCounterMode(display=False) as counter:
            self(batch)
        counted = counter.get_flop_counts()["Global"]
        products = sum(count for op, count in counted.items() if str(op).rpartition(".")[2] in WEIGHT_PRODUCTS)
        return products + self._attention_flops(*batch.input_ids.shape)

    def _attention_flops(self, rows: int, tokens: int) -> float:
        pairs = rows * tokens * (tokens + 1) / 2  # of a query and a key that it sees
        config, own = self.target.config, self.head.config
        width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size)
        in_target = 4 * pairs * width * self.target.num_layers  # two products of two operations each
        backward = 2
        in_head = 4 * pairs * own.num_attention_heads * own.head_dim * (self.settings.training.draft_steps or 0)
        return in_target + (1 + backward) * in_head

    def memory_peak(self, batch: Batch) -> int | None:
        """Bytes: what CUDA's allocator held at most in a step, or on Linux the largest the process ever was in it."""
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
    """The best square matrix product of a dtype: what no training step can be faster than."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.best, self.size = 0.0, 0
        for size in SIZES:
            seconds = self._seconds(size)
            self._note(size, seconds)
            if seconds > LONG_PRODUCT or (device.type == "cpu" and size >= 4096):
                break

    def again(self) -> float:
        """Measure the best size once more; returns the best FLOP/s so far."""
        self._note(self.size, self._seconds(self.size))
        return self.best

    def _note(self, size: int, seconds: float) -> None:
        if 2 * size**3 / seconds > self.best:
            self.best, self.size = 2 * size**3 / seconds, size

    def _seconds(self, size: int) -> float:
        a, b = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        out = torch.empty_like(a)
        timings = []
        for _ in range(3):
            _wait(self.device)
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            _wait(self.device)
            timings.append(time.perf_counter() - start)
        return min(timings)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_rows(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[Row]:
    """Conversations of random tokens, of which the second three quarters are trained on."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids: Tensor = torch.randint(0, vocab_size, (length,), generator=generator)
        rows.append(Row(str(number), ids.tolist(), [at >= length // 4 for at in range(length)], 1, 0.0, 1.0, "random"))
    return rows


def spread_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths as conversations have them: many short ones, few long ones; log-uniform from a tenth of the longest."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(count, generator=generator)
    return sorted({0: longest}.get(place, max(4, round(longest * 10 ** (-float(value)))))
                  for place, value in enumerate(drawn))  # fmt: skip


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
