"""Before requests come: compile what lies between the kernels, and learn what a pass costs."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence

import torch

from serving.engine.batch import Batch, Segment
from serving.engine.build import Models
from serving.engine.compiler import FORK, set_compiler_up
from serving.engine.runner import TargetRunner

log = logging.getLogger(__name__)

WIDTHS = (1, 2, 4, 8, 16, 32)  # tokens of a pass, from plain decoding to a tree
_REPEATS = 3


def warm_up(models: Models) -> dict[int, float]:
    """Run passes of each width; returns seconds of a target pass by its number of tokens.

    In compiled mode, the layers of a target of the Llama family run in one C++ call; any other's are compiled first,
    one for all, for one token and for any number, and the artefacts stay in the cache folder for the next start. On
    CUDA passes are recorded as graphs, those of shapes that are not met here when they first come.
    """
    if models.mode == "compiled":
        _prepare(models.runner)
    if models.proposer is not None:
        models.proposer.warm_up(compiled=models.mode == "compiled")
    return {width: _seconds(functools.partial(_pass_of_target, models.runner, width)) for width in WIDTHS}


def _prepare(runner: TargetRunner) -> None:
    """Let the layers run in one call if they can; otherwise compile one of them, which all layers share then."""
    if runner.target.device.type == "cuda":
        if not runner.fix_shapes():
            log.warning("this target's passes run without CUDA graphs")
        return
    if runner.fuse_layers():
        return
    set_compiler_up()
    from torch._dynamo.exc import TorchDynamoException

    began = time.perf_counter()
    layers = runner.target.decoder.layers
    compiled = {kind: torch.compile(kind.forward, fullgraph=True) for kind in {type(layer) for layer in layers}}
    runner.forwards = {layer: functools.partial(compiled[type(layer)], layer) for layer in layers}
    runner.view.compiled = True
    try:
        _pass_of_target(runner, 1)
        _pass_of_target(runner, 3, FORK)
    except TorchDynamoException as error:
        log.warning("this target's layers run uncompiled: %s", str(error).strip().splitlines()[0])
        runner.forwards = {}
    log.info("compiled in %.0f s", time.perf_counter() - began)


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
