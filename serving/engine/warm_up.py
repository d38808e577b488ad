"""Before requests come: compile what lies between the kernels, and learn what a pass costs."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence

import torch

from draft.bundled import cache_folder
from serving.engine.batch import Batch, Segment
from serving.engine.build import Models
from serving.engine.proposers import HeadProposer
from serving.engine.runner import HeadRunner, TargetRunner

log = logging.getLogger(__name__)

WIDTHS = (1, 2, 4, 8, 16, 32)  # tokens of a pass, from plain decoding to a tree
_REPEATS = 3
_FORK = (-1, 0, 0)  # a tree, whose mask a graph has to expect before it can do without


def warm_up(models: Models) -> dict[int, float]:
    """Run passes of each width; returns seconds of a target pass by its number of tokens.

    In compiled mode, the layers of a target of the Llama family run in one C++ call; any other's are compiled first,
    one for all, for one token and for any number, and the artefacts stay in the cache folder for the next start.
    """
    if models.mode == "compiled":
        _prepare(models)
    if isinstance(models.proposer, HeadProposer):
        _pass_of_head(models.proposer.runner, 1)
        _pass_of_head(models.proposer.runner, 2)
    return {width: _seconds(functools.partial(_pass_of_target, models.runner, width)) for width in WIDTHS}


def _prepare(models: Models) -> None:
    """Let the layers run in one call where they can be, and compile those that can't."""
    runner = models.runner
    head = models.proposer.runner if isinstance(models.proposer, HeadProposer) else None
    layers = not runner.fuse_layers()
    midlayer = head is not None and not head.fuse_layer()
    if not layers and not midlayer:
        return
    _set_compiler_up()
    began = time.perf_counter()
    if layers:
        _compile_layers(runner)
    if head is not None and midlayer:
        head.view.compiled = True
        head.run = torch.compile(head.run, fullgraph=True)
        _pass_of_head(head, 1)
        _pass_of_head(head, 3, _FORK)
    log.info("compiled in %.0f s", time.perf_counter() - began)


def _set_compiler_up() -> None:
    from torch._inductor import config

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    config.cpp.threads = 1  # its parallel loops wait actively for threads that may not be running


def _compile_layers(runner: TargetRunner) -> None:
    """One compiled layer, which all layers share."""
    from torch._dynamo.exc import TorchDynamoException

    compiled = {
        kind: torch.compile(kind.forward, fullgraph=True)
        for kind in {type(layer) for layer in runner.target.decoder.layers}
    }
    runner.forwards = {layer: functools.partial(compiled[type(layer)], layer) for layer in runner.target.decoder.layers}
    runner.view.compiled = True
    try:
        _pass_of_target(runner, 1)
        _pass_of_target(runner, 3, _FORK)
    except TorchDynamoException as error:
        log.warning("this target's layers run uncompiled: %s", str(error).strip().splitlines()[0])
        runner.forwards = {}


def _seconds(run: Callable[[], None]) -> float:
    """The least of a few runs."""
    timings = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        run()
        timings.append(time.perf_counter() - began)
    return min(timings)


@torch.inference_mode()
def _pass_of_target(runner: TargetRunner, width: int, parents: Sequence[int] | None = None) -> None:
    """A pass over an empty slot, with its logits, as a verification would be."""
    slot = runner.cache.acquire()
    hidden, _ = runner.forward(Batch.of([Segment(slot, 0, 0, [0] * width, parents)], runner.target.device))
    runner.logits(hidden).max(dim=-1).indices.tolist()
    runner.cache.release(slot)


@torch.inference_mode()
def _pass_of_head(runner: HeadRunner, width: int, parents: Sequence[int] | None = None) -> None:
    slot = runner.cache.acquire()
    config = runner.head.config
    batch = Batch.of([Segment(slot, 0, 0, [0] * width, parents)], runner.embedding.weight.device)
    hidden = torch.zeros(width, config.hidden_size, dtype=runner.dtype, device=runner.embedding.weight.device)
    runner.logits(runner.forward(batch, hidden))
    runner.cache.release(slot)
