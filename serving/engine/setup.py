"""Set the engine's models up: as they are, for any device and dtype, or with compiled kernels on a CPU."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpu_kernels import KernelsUnavailable, load_kernels, pack_linears, set_threads, slot_attention
from draft.errors import UserError
from draft.files import cache_folder
from draft.heads import DraftHead, MedusaHead, StepwiseHead
from draft.target import Target, fastest_cpu_dtype
from serving.engine.drafting import AtOnceProposer, HeadProposer, Proposer
from serving.engine.fused import fuse_head, fuse_target
from serving.engine.kv_cache import Kernel, RaggedBatch, Segment, SlotLayer, torch_attention
from serving.engine.model import HeadRunner, TargetRunner

log = logging.getLogger(__name__)

MODES = ("auto", "compiled", "eager")
WIDTHS = (1, 2, 4, 8, 16, 32)  # tokens of a pass, from plain decoding to a tree
_REPEATS = 3
_FORK = (-1, 0, 0)  # parents of a tree's nodes: torch.compile has to meet a mask before it can do without


@dataclass(frozen=True)
class Models:
    """The models that the engine decodes with."""

    runner: TargetRunner
    proposer: Proposer | None
    mode: str  # eager or compiled


def build_models(
    target: Target,
    head: DraftHead | None,
    *,
    mode: str,
    pack_in_place: bool,
    slots: int,
    capacity: int,
    threads: int | None,
) -> Models:
    """
    mode: `eager` runs the models as they are; `compiled`, on a CPU in float32 or bfloat16, replaces linear layers by
    packed ones and attention by a kernel of ours; `auto` is compiled where that is possible.
    pack_in_place: in compiled mode the linear layers of `target` itself are replaced, instead of a copy's.
    threads: of the compiled kernels, all cores of this process by default; PyTorch itself is left with one then,
    because its threads wait for each other actively, and stall when another process takes a core.

    Raises:
        UserError: for a mode that is impossible here, with the reason.
    """
    mode = _choose_mode(mode, target)
    kernel: Kernel = torch_attention
    if mode == "compiled":
        target, head = _pack(target, head, pack_in_place)
        kernel = packed_attention
        if threads is not None:
            set_threads(threads)
        torch.set_num_threads(1)
    elif threads is not None:
        torch.set_num_threads(threads)
    layers = head.auxiliary_layers(target) if head is not None else ()
    proposer = None
    if head is not None:
        proposer = make_proposer(target, head, layers, slots=slots, capacity=capacity, kernel=kernel)
    return Models(TargetRunner(target, slots=slots, capacity=capacity, kernel=kernel, layers=layers), proposer, mode)


def make_proposer(target: Target, head: DraftHead, layers: tuple[int, ...], **options: Any) -> Proposer:
    """Return the proposer of the head: token by token through a cache, with options of `HeadRunner`, or all at once."""
    if isinstance(head, StepwiseHead):
        return HeadProposer(HeadRunner(target, head, **options), layers)
    assert isinstance(head, MedusaHead)
    return AtOnceProposer(head, layers)


def decoding_dtype(dtype: str, mode: str) -> str:
    """Resolve `auto` for decoding: on a CPU bfloat16, where the compiled kernels are there.

    They read weights in bfloat16 and compute in float32: half the bytes, and no arithmetic that the CPU is slow at.
    """
    if dtype != "auto" or mode == "eager" or torch.cuda.is_available():
        return dtype
    return dtype if _why_no_kernels() else "bfloat16"


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layer: SlotLayer, scale: float, window: int, softcap: float
) -> Tensor:
    """Attend by the C++ kernel; arguments as of `torch_attention`."""
    view, dtype = layer.view, layer.keys.dtype
    mask = view.masks.get(window, view.mask)
    query_, key_, value_ = query.to(dtype), key.to(dtype), value.to(dtype)
    return slot_attention(
        query_, key_, value_, layer.keys, layer.values, view.positions, view.table, mask, scale, window, softcap
    ).to(query.dtype)


def _choose_mode(mode: str, target: Target) -> str:
    if mode not in MODES:
        raise UserError(f"mode = {mode!r}: it must be one of {', '.join(MODES)}.")
    if mode == "eager":
        return mode
    dtype = str(target.dtype).removeprefix("torch.")
    if target.device.type != "cpu":
        reason: str | None = f"it is for CPUs, and the target is on {target.device.type}"
    elif dtype not in ("float32", "bfloat16"):
        reason = f"the kernels take float32 and bfloat16, and the target is in {dtype}"
    else:
        reason = _why_no_kernels()
    if reason and mode == "compiled":
        raise UserError(f"mode = 'compiled' is impossible here: {reason}; use auto or eager.")
    if reason:
        log.info("decoding without compiled kernels: %s", reason)
    return "eager" if reason else "compiled"


def _why_no_kernels() -> str | None:
    try:
        load_kernels(cache_folder())
    except KernelsUnavailable as error:
        return str(error).rstrip(".")
    return None


def _pack(target: Target, head: DraftHead | None, in_place: bool) -> tuple[Target, DraftHead | None]:
    """Return the target and a copy of the head, which its owner may want to save, with packed linear layers."""
    _ = target.fingerprint  # while its weights are there to be hashed
    dtype = target.dtype
    native = dtype == torch.bfloat16 and fastest_cpu_dtype() == torch.bfloat16
    if not in_place:
        target, model = copy.copy(target), target.model
        # all but the linear layers' weights is shared with the original
        tensors = itertools.chain(model.parameters(), model.buffers())
        target.model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        target.decoder = target.model.get_decoder() if hasattr(model, "get_decoder") else target.model.base_model
        target.config = target.model.config.get_text_config()
        target.embedding = target.model.get_input_embeddings()
    pack_linears(target.model, dtype, keep_plain=native)
    target.lm_head = target.model.get_output_embeddings()
    if head is not None:
        head = copy.deepcopy(head).to(dtype)
        pack_linears(head, dtype, keep_plain=native)
        head.use_target_lm_head(target)  # not the plain one's LM head, where it has none
    return target, head


def warm_up(models: Models) -> dict[int, float]:
    """Run passes of each width before requests come; returns seconds of a target pass by its number of tokens.

    In compiled mode, the layers of a target of the Llama family run in one C++ call; any other's are compiled first,
    one for all, for one token and for any number, and the artefacts stay in the cache folder for the next start.
    """
    compiled = models.mode == "compiled"
    if compiled and not fuse_target(models.runner):
        _compile_layers(models.runner)
    if isinstance(models.proposer, HeadProposer):
        runner = models.proposer.runner
        if compiled and not fuse_head(runner):
            _set_compiler_up()
            runner.view.compiled = True
            runner.run = torch.compile(runner.run_head, fullgraph=True)
        _pass_of_head(runner, 1)  # one token has kernels of its own
        _pass_of_head(runner, 3, _FORK)
    return {width: _seconds(models.runner, width) for width in WIDTHS}


def _compile_layers(runner: TargetRunner) -> None:
    """Compile one layer of each kind, which all of its kind share then."""
    from torch._dynamo.exc import TorchDynamoException

    _set_compiler_up()
    began = time.perf_counter()
    layers = runner.target.decoder.layers
    compiled = {kind: torch.compile(kind.forward, fullgraph=True) for kind in {type(layer) for layer in layers}}
    runner.forwards = {layer: functools.partial(compiled[type(layer)], layer) for layer in layers}
    runner.view.compiled = True
    try:
        _pass_of_target(runner, 1)
        _pass_of_target(runner, 3, _FORK)
    except TorchDynamoException as error:
        log.warning("this target's layers run uncompiled: %s", str(error).strip().splitlines()[0])
        runner.forwards = {}
    log.info("compiled in %.0f s", time.perf_counter() - began)


def _set_compiler_up() -> None:
    """Keep torch.compile's artefacts for the next start, and leave the threads to the kernels."""
    from torch._inductor import config

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    config.cpp.threads = 1  # its parallel loops wait actively for threads that may not be running


def _seconds(runner: TargetRunner, width: int) -> float:
    """Time a few passes; returns the least."""
    timings = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        _pass_of_target(runner, width)
        timings.append(time.perf_counter() - began)
    return min(timings)


@torch.inference_mode()
def _pass_of_target(runner: TargetRunner, width: int, parents: Sequence[int] | None = None) -> None:
    """Run a pass over an empty slot, with its logits, as a verification would."""
    slot = runner.cache.acquire()
    hidden, _ = runner.forward(RaggedBatch.of([Segment(slot, 0, 0, [0] * width, parents)], runner.target.device))
    runner.logits(hidden).max(dim=-1).indices.tolist()
    runner.cache.release(slot)


@torch.inference_mode()
def _pass_of_head(runner: HeadRunner, width: int, parents: Sequence[int] | None = None) -> None:
    slot = runner.cache.acquire()
    batch = RaggedBatch.of([Segment(slot, 0, 0, [0] * width, parents)], runner.head.device)
    hidden = torch.zeros(width, runner.head.config.hidden_size, dtype=runner.dtype, device=runner.head.device)
    runner.logits(runner.forward(batch, hidden))
    runner.cache.release(slot)
