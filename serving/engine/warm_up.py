"""Before requests come: compile what lies between the kernels, and learn what a pass costs."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable

import torch

from draft.bundled import cache_folder
from serving.engine.batch import Batch, Segment
from serving.engine.build import Models
from serving.engine.runner import TargetRunner

log = logging.getLogger(__name__)

WIDTHS = (1, 2, 4, 8, 16, 32)  # tokens of a pass, from plain decoding to a tree
_REPEATS = 3


def warm_up(models: Models) -> dict[int, float]:
    """Run passes of each width; returns seconds of a target pass by its number of tokens.

    In compiled mode a decoder layer, which all layers share, and the head are compiled first: once for one token and
    once for any number. The artefacts stay in the cache folder, so that the next start loads them.
    """
    if models.mode == "compiled":
        _compile(models)
    elif models.proposer is not None:
        models.proposer.warm_up(compiled=False)
    return {width: _seconds(functools.partial(_pass_of_target, models.runner, width)) for width in WIDTHS}


def _compile(models: Models) -> None:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor import config

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    config.cpp.threads = 1  # its parallel loops wait actively for threads that may not be running
    began = time.perf_counter()
    runner = models.runner
    compiled = {
        kind: torch.compile(kind.forward, fullgraph=True)
        for kind in {type(layer) for layer in runner.target.decoder.layers}
    }
    runner.forwards = {layer: functools.partial(compiled[type(layer)], layer) for layer in runner.target.decoder.layers}
    try:
        for width in (1, 2):
            _pass_of_target(runner, width)
    except TorchDynamoException as error:
        log.warning("this target's layers run uncompiled: %s", str(error).strip().splitlines()[0])
        runner.forwards = {}
    if models.proposer is not None:
        models.proposer.warm_up(compiled=True)
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
def _pass_of_target(runner: TargetRunner, width: int) -> None:
    """A pass over an empty slot, with its logits, as a verification would be."""
    slot = runner.cache.acquire()
    hidden, _ = runner.forward(Batch.of([Segment(slot, 0, 0, [0] * width)], runner.target.device))
    runner.logits(hidden).argmax(dim=-1).tolist()
    runner.cache.release(slot)
