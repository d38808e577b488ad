"""What one step costs, part by part, and the least that it could cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from serving.engine import Engine
from serving.engine.drafting import HeadProposer
from serving.engine.kv_cache import RaggedBatch, Segment
from serving.engine.model import HeadRunner, TargetRunner

WIDTHS = (1, 2, 4, 8, 16, 32)
PAST = 128  # tokens in the cache
ROUNDS_A_REPEAT = 4  # they are short: more of them tell more


def median_seconds(runs: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Medians over rounds in which every one runs once, so that a slow moment of the machine hits all alike."""
    timings: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(1 + rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            timings[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in timings.items()}


def step_costs(plain: Engine, drafting: Engine | None, repeats: int) -> dict[str, Any]:
    """Seconds of passes of the target over 1, 2, ... tokens, of a draft step and of a re-read, each with its logits."""
    runs: dict[Any, Callable[[], object]] = {width: _target_pass(plain.models.runner, width) for width in WIDTHS}
    proposer = drafting.models.proposer if drafting else None
    if isinstance(proposer, HeadProposer):
        runner = proposer.runner
        auxiliary = torch.zeros(2, len(proposer.layers) * runner.head.config.hidden_size, dtype=runner.dtype)
        runs["draft"] = _head_pass(runner, 1)
        runs["re-read"] = _head_pass(runner, 2, auxiliary.to(runner.head.device))
    seconds = median_seconds(runs, ROUNDS_A_REPEAT * repeats)
    return {"target": {width: seconds.pop(width) for width in WIDTHS}, **seconds}


def _target_pass(runner: TargetRunner, width: int) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> object:
        slot = runner.cache.acquire()
        runner.cache.lengths[slot] = PAST
        hidden, _ = runner.forward(RaggedBatch.of([Segment(slot, PAST, PAST, [1] * width)], runner.target.device))
        choices = runner.logits(hidden).max(dim=-1).indices.tolist()
        runner.cache.release(slot)
        return choices

    return run


def _head_pass(runner: HeadRunner, width: int, auxiliary: torch.Tensor | None = None) -> Callable[[], object]:
    """A draft step with its logits, or the reading of the target's states [width, layers * hidden]."""
    device = runner.embedding.weight.device
    hidden = torch.zeros(width, runner.head.config.hidden_size, dtype=runner.dtype, device=device)

    @torch.inference_mode()
    def run() -> object:
        slot = runner.cache.acquire()
        batch = RaggedBatch.of([Segment(slot, PAST, PAST, [1] * width)], device)
        output = runner.forward(batch, hidden if auxiliary is None else runner.combine(auxiliary))
        runner.cache.release(slot)
        return runner.logits(output).max(dim=-1).indices.tolist() if auxiliary is None else output

    return run


def read_bandwidth(threads: int, device: torch.device) -> float:
    """Bytes per second at which these threads read memory: the best of some sums over far more than the caches hold."""
    before = torch.get_num_threads()
    data = torch.ones(2**28, dtype=torch.float32, device=device)  # 1 GiB
    torch.set_num_threads(threads)
    try:
        timings = []
        for _ in range(5):
            began = time.perf_counter()
            data.sum().item()
            timings.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return data.numel() * data.itemsize / min(timings)


def weight_bytes(engine: Engine) -> int:
    """What a plain step reads of the target: all weights; of an embedding that the LM head does not share, one row."""
    target = engine.target
    tensors = {
        id(x): x for module in (target.decoder, target.lm_head) for x in [*module.parameters(), *module.buffers()]
    }
    shared = target.embedding.weight is getattr(target.lm_head, "weight", None)
    total = sum(x.numel() * x.itemsize for x in tensors.values())
    return total - (0 if shared else target.embedding.weight.numel() * target.embedding.weight.itemsize)
