"""One step of decoding, part by part, and the least that it can cost: the time to read its weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from draft.target import wait_for
from serving.engine import Engine, SamplingParams
from serving.engine.drafting import HeadProposer, HeadState, Job
from serving.engine.kv_cache import RaggedBatch, Segment
from serving.engine.model import TargetRunner
from serving.engine.verification import greedy_choices, make_rule

WIDTHS = (1, 2, 4, 8, 16, 32)  # tokens of the passes that are timed
PAST = 128  # tokens in the cache of these passes
LONG_CHAIN = 5  # drafts
STEP_ROUNDS = 60


def step_costs(plain: Engine, drafting: Engine) -> dict[str, Any]:
    """Return seconds of passes of the target over 1, 2, ... tokens, of a draft step and of a re-read, with logits.

    Medians over rounds in which every pass runs once, so that a slow moment of the machine affects all alike.
    """
    runs: dict[Any, Callable[[], object]] = {width: _target_pass(plain.models.runner, width) for width in WIDTHS}
    proposer = drafting.proposer
    if isinstance(proposer, HeadProposer):
        state = proposer.join()
        for name, length, read in (("one", 1, 0), ("long", LONG_CHAIN, 0), ("read", 1, 2)):
            runs[name] = _chain(proposer, state, length, read)
    timings: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(1 + STEP_ROUNDS):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            wait_for(plain.target.device)
            timings[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(times[1:]) for name, times in timings.items()}
    costs: dict[str, Any] = {"target": {width: seconds[width] for width in WIDTHS}}
    if isinstance(proposer, HeadProposer):  # what a longer chain, and two tokens to read, take in addition
        proposer.leave(state)
        costs["draft"] = (seconds["long"] - seconds["one"]) / (LONG_CHAIN - 1)
        costs["re-read"] = seconds["read"] - costs["draft"]
    return costs


def _target_pass(runner: TargetRunner, width: int) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> object:
        slot = runner.cache.acquire()
        runner.cache.lengths[slot] = PAST
        hidden, _ = runner.forward(RaggedBatch.of([Segment(slot, PAST, PAST, [1] * width)], runner.target.device))
        choices = greedy_choices(runner.logits(hidden), runner.compiled)
        runner.cache.release(slot)
        return choices

    return run


def _chain(proposer: HeadProposer, state: HeadState, length: int, read: int) -> Callable[[], object]:
    """Return a greedy chain after `read` tokens that the target has just accepted."""
    runner = proposer.runner
    features = len(proposer.layers) * runner.head.config.hidden_size
    auxiliary = torch.zeros(PAST, features, dtype=runner.dtype, device=runner.embedding.weight.device)

    @torch.inference_mode()
    def run() -> object:
        proposer.observe(state, [1] * read, auxiliary[:read])
        chain = proposer.propose([Job(state, length, 0, rule)])
        runner.cache.lengths[state.slot] = PAST
        return chain

    rule = make_rule("shared-noise", SamplingParams(), 0, runner.chains is not None)
    proposer.observe(state, [1] * PAST, auxiliary)
    run()
    return run


def read_bandwidth(threads: int, device: torch.device) -> float:
    """Return bytes per second at which these threads read memory: the best of some sums over 1 GiB."""
    before = torch.get_num_threads()
    data = torch.ones(2**28, dtype=torch.float32, device=device)
    torch.set_num_threads(threads)
    try:
        timings = []
        for _ in range(5):
            began = time.perf_counter()
            data.sum().item()
            timings.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return data.nbytes / min(timings)


def weight_bytes(engine: Engine) -> int:
    """Return the bytes of the target's weights that a plain step reads, each counted once.

    Counted are all parameters and buffers of the decoder and of the LM head, with these rules:
      - an LM head that is tied to the embedding once;
      - an embedding that is not the LM head not at all: a step reads one row of it.
    """
    target = engine.models.runner.target
    read: dict[int, Tensor] = {}
    for module in (*target.decoder.modules(), *target.lm_head.modules()):
        if module is target.embedding:
            continue
        tensors = dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
        read |= {tensor.data_ptr(): tensor for tensor in tensors.values()}
    return sum(tensor.nbytes for tensor in read.values())


def floor(size: int, bandwidth: float) -> dict[str, float]:
    """Return the least that a plain step can take: its weights are read once."""
    return {"weight_bytes": size, "read_bytes_per_second": bandwidth, "seconds": size / bandwidth}
