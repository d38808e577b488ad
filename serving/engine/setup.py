"""Puts the engine's models together: eager, for any device and dtype, or compiled: kernels on a CPU, graphs on CUDA."""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draft.errors import UserError
from draft.heads import DraftHead, MedusaHead, StepwiseHead
from draft.target import Target
from serving.engine.compiler import FORK, set_compiler_up
from serving.engine.drafting import AtOnceProposer, HeadProposer, Proposer
from serving.engine.formulas import choose_formula
from serving.engine.kv_cache import Batch, Kernel, Segment, SlotLayer, slot_attention_by
from serving.engine.model import HeadRunner, TargetRunner

log = logging.getLogger(__name__)

MODES = ("auto", "compiled", "eager")
_UNRECORDED = ("flex", "flash_attention_2")  # flash-attn knows no padded rows, and flex compiles for each shape


@dataclass(frozen=True)
class Models:
    """What the engine decodes with."""

    runner: TargetRunner
    proposer: Proposer | None
    mode: str  # eager or compiled


def build_models(
    target: Target,
    head: DraftHead | None,
    *,
    mode: str,
    attention: str,
    slots: int,
    capacity: int,
    threads: int | None,
) -> Models:
    """
    mode: `eager` runs the models as they are; `compiled` on a CPU (float32 or bfloat16) replaces the linear layers of
    the target, in place, by packed ones, and attention by a kernel of ours, and on CUDA lets `warm_up` record passes
    of fixed shapes as graphs; `auto` is compiled where that is possible.
    threads: of the compiled kernels, all cores of this process by default; PyTorch itself is left with one then,
    because its threads wait for each other actively, and stall when another process takes a core.

    Raises:
        UserError: for a mode or an attention that is impossible here, with the reason.
    """
    mode = _choose_mode(mode, attention, target)
    kernel: Kernel
    if mode == "compiled" and target.device.type == "cpu":
        head = _pack(target, head, threads)
        kernel = packed_attention
    else:
        kernel = slot_attention_by(choose_formula(attention, target.device, target.dtype))
        if threads is not None:
            torch.set_num_threads(threads)
    places: dict[str, Any] = {"slots": slots, "capacity": capacity, "kernel": kernel}
    layers = head.auxiliary_layers(target) if head is not None else ()
    proposer = None if head is None else make_proposer(target, head, layers, places)
    return Models(TargetRunner(target, **places, layers=layers), proposer, mode)


def make_proposer(target: Target, head: DraftHead, layers: tuple[int, ...], places: dict[str, Any]) -> Proposer:
    """Return what drafts with the head: token by token through a cache, or all positions at once."""
    if isinstance(head, StepwiseHead):
        return HeadProposer(HeadRunner(target, head, **places), layers)
    assert isinstance(head, MedusaHead)
    return AtOnceProposer(head, layers)


def decoding_dtype(dtype: str, mode: str) -> str:
    """What `auto` means for decoding: on a CPU bfloat16, where the compiled kernels are there.

    They read weights in bfloat16 and compute in float32: half the bytes, and no arithmetic that the CPU is slow at.
    """
    if dtype != "auto" or mode == "eager" or torch.cuda.is_available():
        return dtype
    return dtype if _why_no_kernels() else "bfloat16"


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layer: SlotLayer, scale: float, window: int, softcap: float
) -> Tensor:
    """The C++ kernel in the form of `Kernel`."""
    from cpu_kernels import slot_attention

    view, dtype = layer.view, layer.keys.dtype
    return slot_attention(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        layer.keys,
        layer.values,
        view.positions,
        view.table,
        view.masks.get(window, view.mask),
        scale,
        window,
        softcap,
    ).to(query.dtype)


def _choose_mode(mode: str, attention: str, target: Target) -> str:
    if mode not in MODES:
        raise UserError(f"mode = {mode!r}: it must be one of {', '.join(MODES)}.")
    if mode == "eager":
        return mode
    reason = _why_not_compiled(attention, target)
    if reason and mode == "compiled":
        raise UserError(f"mode = 'compiled' is impossible here: {reason}; use auto or eager.")
    if reason:
        log.info("decoding without compiled kernels: %s", reason)
    return "eager" if reason else "compiled"


def _why_not_compiled(attention: str, target: Target) -> str | None:
    if target.device.type == "cuda":
        return f"CUDA graphs attend by sdpa, and {attention} was asked for" if attention in _UNRECORDED else None
    if target.device.type != "cpu":
        return f"it is for CPUs and CUDA, and the target is on {target.device.type}"
    if target.dtype not in (torch.float32, torch.bfloat16):
        return f"the kernels take float32 and bfloat16, and the target is in {str(target.dtype).removeprefix('torch.')}"
    if attention != "auto":
        return f"attention = {attention!r} was asked for, and the kernels have their own"
    return _why_no_kernels()


def _why_no_kernels() -> str | None:
    from cpu_kernels import load_kernels

    try:
        load_kernels()
    except UserError as error:
        return str(error).rstrip(".")
    return None


def _pack(target: Target, head: DraftHead | None, threads: int | None) -> DraftHead | None:
    """Pack the linear layers of the target, in place, and of a copy of the head, which its owner may want to save."""
    from cpu_kernels import pack_linears, set_threads

    _ = target.fingerprint  # while its weights are there to be hashed
    pack_linears(target.model, target.dtype)
    target.lm_head = target.model.get_output_embeddings()
    if head is not None:
        head = copy.deepcopy(head).to(target.dtype)
        pack_linears(head, target.dtype)
    if threads is not None:
        set_threads(threads)
    torch.set_num_threads(1)
    return head


# Before requests come: compile what lies between the kernels, and learn what a pass costs.


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
