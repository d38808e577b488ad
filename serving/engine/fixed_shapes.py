"""Passes of fixed shapes, which on CUDA are recorded once as graphs and then replayed in one launch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from serving.engine.kv_cache import Batch, SlotCache, View
from serving.engine.padding import Padded, Shape

log = logging.getLogger(__name__)

# (ids [1, count], positions [1, count], further inputs [count, ...] each) -> outputs [count, ...] each
Body = Callable[..., Sequence[Tensor]]

_MOST_SHAPES = 256  # each is recorded once, while requests wait
_RECORDING = threading.Lock()  # two recordings of a process at a time would end each other


class FixedShapes:
    """Runs a model's pass padded to one of a few shapes.

    On CUDA the first pass of each shape is recorded, after which the host has nothing to do but to fill in the
    inputs. Elsewhere padded passes run as they are: slower than ragged ones, and the same tokens.
    """

    def __init__(self, body: Body, view: View, cache: SlotCache) -> None:
        """view: through which the body's attention sees what a pass is about; cache: with its slots."""
        self.body, self.view, self.cache = body, view, cache
        self.steps: dict[Shape, _Step] = {}
        self.recorder = _Recorder(cache.device) if cache.device.type == "cuda" else None
        self.recordings = 0  # a step with one of them says nothing about what steps cost
        self.too_large: set[Shape] = set()  # for the device's memory
        self.refused = False  # whether something in the body cannot be recorded
        cache.keep_clean()  # masked entries are multiplied by 0, which NaN would survive

    def run(self, batch: Batch, *inputs: Tensor) -> list[Tensor] | None:
        """inputs: [N, ...] each -> the body's outputs, [N, ...] each; None: this batch needs the ragged pass."""
        shape = Shape.around(batch, self.cache.capacity)
        if shape is None or self.refused or shape in self.too_large:
            return None
        if shape not in self.steps and len(self.steps) == _MOST_SHAPES:
            return None
        if shape not in self.steps:
            self.steps[shape] = _Step(self.body, self.view, Padded(shape, batch.ids.device))
        step = self.steps[shape]
        there = step.padded.fill(batch)
        step.take(inputs)
        if self.recorder is not None and step.graph is None and not self._recorded(step, self.recorder):
            return None
        return [output.index_select(0, there) for output in step.replay()]  # copies: the next pass overwrites it

    def _recorded(self, step: _Step, recorder: _Recorder) -> bool:
        self.recordings += 1
        try:
            step.graph, step.outputs = recorder.record(step.run)
        except torch.OutOfMemoryError as error:
            log.warning("no memory to record passes of %s: %s", step.padded.shape, _first_line(error))
            self.too_large.add(step.padded.shape)
            del self.steps[step.padded.shape]
            return False
        except (RuntimeError, AssertionError) as error:
            log.warning("passes run without CUDA graphs: %s", _first_line(error.__context__ or error))
            self.refused = True
            self.steps.clear()
        return not self.refused


class _Step:
    """The pass of one shape."""

    def __init__(self, body: Body, view: View, padded: Padded) -> None:
        self.body, self.view, self.padded = body, view, padded
        self.inputs: list[Tensor] = []
        self.graph: Any = None
        self.outputs: Sequence[Tensor] = ()  # of the graph

    def take(self, inputs: Sequence[Tensor]) -> None:
        if not self.inputs:
            self.inputs = [given.new_empty(len(self.padded.ids), *given.shape[1:]) for given in inputs]
        for own, given in zip(self.inputs, inputs, strict=True):
            torch.index_select(given, 0, self.padded.source, out=own)

    def run(self) -> Sequence[Tensor]:
        self.padded.begin()
        self.view.padded = self.padded
        try:
            return self.body(self.padded.ids[None], self.padded.positions[None], *self.inputs)
        finally:
            self.view.padded = None

    def replay(self) -> Sequence[Tensor]:
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.outputs


class _Recorder:
    """Makes graphs on a device; they share their memory, since none is needed while another runs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # one: libraries keep a workspace for each stream they meet

    def record(self, run: Callable[[], Sequence[Tensor]]) -> tuple[Any, Sequence[Tensor]]:
        """A graph of `run`, and its outputs, which each replay writes anew.

        Raises:
            RuntimeError: it cannot be recorded.
        """
        caller = torch.cuda.current_stream(self.device)
        with _RECORDING, torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.stream.wait_stream(caller)
            run()  # libraries set themselves up in the first pass, which a recording forbids
            with Recordable():
                run()
            graph = torch.cuda.CUDAGraph()
            # other threads of the server may ask the device for something meanwhile
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                outputs = run()
        caller.wait_stream(self.stream)
        return graph, outputs


class Recordable(TorchDispatchMode):
    """Refuses operations that a recording cannot hold: the host waits in them, or brings numbers to the device.

    A recording that fails on its way leaves the allocator in a state that it is better not to know.
    """

    FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "_unique", "unique_", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        chosen = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name.startswith(self.FORBIDDEN) or _by_mask(chosen) or _from_host(name, args, kwargs):
            raise RuntimeError(f"{name} waits for the host")
        return func(*args, **kwargs)


def _by_mask(indices: Iterable[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _from_host(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if name == "copy_":
        return args[0].is_cuda != args[1].is_cuda
    if name == "_to_copy":
        return kwargs.get("device") is not None and (torch.device(kwargs["device"]).type == "cuda") != args[0].is_cuda
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
