"""Passes of fixed shapes, which on CUDA are recorded once as graphs and then replayed: no Python, one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from serving.engine.attention import View
from serving.engine.batch import Batch
from serving.engine.cache import SlotCache
from serving.engine.padding import Padded, Shape

log = logging.getLogger(__name__)

_REHEARSALS = 2  # passes before a recording: libraries set themselves up in the first, which a recording forbids

# (ids [1, count], positions [1, count], further inputs [count, ...] each) -> outputs [count, ...] each
Body = Callable[..., Sequence[Tensor]]


class FixedShapes:
    """Runs a model's pass padded to one of a few shapes.

    On CUDA the first pass of each shape is recorded, after which the host has nothing to do but to fill in the
    inputs. Elsewhere padded passes run as they are: slower than ragged ones, and the same tokens.
    """

    def __init__(self, body: Body, view: View, cache: SlotCache) -> None:
        """view: through which the body's attention sees what a pass is about; cache: with its slots."""
        self.body, self.view, self.cache = body, view, cache
        self.steps: dict[Shape, _Step] = {}
        self.recording = cache.layers[0][0].is_cuda
        self._pool: Any = None  # memory that all graphs share: a pass needs none of another's
        self._refused = False  # whether something in the body cannot be recorded
        cache.clear()  # masked entries are multiplied by 0, which NaN from unwritten memory would survive

    def run(self, batch: Batch, *inputs: Tensor) -> list[Tensor] | None:
        """inputs: [N, ...] each -> the body's outputs, [N, ...] each; None: this batch needs the ragged pass."""
        shape = Shape.around(batch, self.cache.capacity)
        if shape is None or self._refused:
            return None
        if shape not in self.steps:
            self.steps[shape] = _Step(self.body, self.view, Padded(shape, batch.ids.device))
        step = self.steps[shape]
        there = step.padded.fill(batch)
        step.take(inputs)
        if self.recording and step.outputs is None and not self._recorded(step):
            return None
        return [output.index_select(0, there) for output in step.replay()]  # copies: the next pass overwrites it

    def _recorded(self, step: _Step) -> bool:
        try:
            self._pool = step.record(self._pool)
        except RuntimeError as error:  # the host had to wait for the device, as where experts are chosen
            log.warning("passes run without CUDA graphs: %s", str(error).strip().splitlines()[0])
            self._refused = True
            self.steps.clear()
        return not self._refused


class _Step:
    """The pass of one shape."""

    def __init__(self, body: Body, view: View, padded: Padded) -> None:
        self.body, self.view, self.padded = body, view, padded
        self.inputs: list[Tensor] = []
        self.graph: Any = None
        self.outputs: Sequence[Tensor] | None = None  # of the graph

    def take(self, inputs: Sequence[Tensor]) -> None:
        if not self.inputs:
            self.inputs = [given.new_empty(len(self.padded.ids), *given.shape[1:]) for given in inputs]
        for own, given in zip(self.inputs, inputs, strict=True):
            torch.index_select(given, 0, self.padded.source, out=own)

    def record(self, pool: Any) -> Any:
        """Make a graph of the pass, in the memory of `pool`; returns the pool."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_REHEARSALS):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads of the server may ask the device for something meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = self._run()
        self.graph = graph
        log.debug("recorded a pass of %s", self.padded.shape)
        return graph.pool()

    def replay(self) -> Sequence[Tensor]:
        if self.outputs is None:
            return self._run()
        self.graph.replay()
        return self.outputs

    def _run(self) -> Sequence[Tensor]:
        self.padded.begin()
        self.view.padded = self.padded
        try:
            return self.body(self.padded.ids[None], self.padded.positions[None], *self.inputs)
        finally:
            self.view.padded = None
