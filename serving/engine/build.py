"""Puts the engine's models together: eager, for any device and dtype, or compiled: kernels on a CPU, graphs on CUDA."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draft.errors import UserError
from draft.heads import DraftHead
from draft.heads.registry import architecture_of
from draft.target import Target
from serving.engine.at_once import AtOnceProposer
from serving.engine.attention import Kernel, SlotLayer, slot_attention_by
from serving.engine.formulas import choose_formula
from serving.engine.proposers import HeadProposer, Proposer
from serving.engine.runner import HeadRunner, TargetRunner

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
    proposer = None if head is None else PROPOSERS[architecture_of(head).drafting](target, head, layers, places)
    return Models(TargetRunner(target, **places, layers=layers), proposer, mode)


def _step_by_step(target: Target, head: Any, layers: tuple[int, ...], places: dict[str, Any]) -> Proposer:
    return HeadProposer(HeadRunner(target, head, **places), layers)


def _at_once(target: Target, head: Any, layers: tuple[int, ...], places: dict[str, Any]) -> Proposer:
    return AtOnceProposer(head, layers)


# by `Architecture.drafting`
PROPOSERS: dict[str, Callable[[Target, Any, tuple[int, ...], dict[str, Any]], Proposer]] = {
    "step by step": _step_by_step,
    "at once": _at_once,
}


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
    from serving.engine.cpu import slot_attention

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
    from serving.engine.cpu import load_kernels

    try:
        load_kernels()
    except UserError as error:
        return str(error).rstrip(".")
    return None


def _pack(target: Target, head: DraftHead | None, threads: int | None) -> DraftHead | None:
    """Pack the linear layers of the target, in place, and of a copy of the head, which its owner may want to save."""
    from serving.engine.cpu import pack_linears, set_threads

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
