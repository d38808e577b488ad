"""Set the engine's models up: as they are, for any device and dtype, or with compiled kernels on a CPU."""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from cpu_kernels import (
    KernelsUnavailable,
    PackedLinear,
    arithmetic,
    arithmetics,
    load_kernels,
    pack_linears,
    set_arithmetic,
    set_threads,
    slot_attention,
)
from draft.errors import UserError
from draft.files import cache_folder
from draft.heads import DraftHead, MedusaHead, StepwiseHead
from draft.target import Target
from serving.engine.drafting import AtOnceProposer, HeadProposer, Proposer
from serving.engine.fused import fuse_head, fuse_target
from serving.engine.kv_cache import Kernel, RaggedBatch, Segment, SlotCache, SlotLayer, torch_attention
from serving.engine.memory import CacheSize, fit_cache
from serving.engine.model import HeadRunner, TargetRunner, find_attention, head_shape

log = logging.getLogger(__name__)

MODES = ("auto", "compiled", "eager")
ARITHMETICS = ("auto", "float32", "bf16", "amx")
WEIGHTS = ("auto", "float", "int8", "int4")
_BITS = {"int8": 8, "int4": 4}
_LARGEST_ROUNDED = 60_000.0  # scales are float16
WIDTHS = (1, 2, 4, 8, 16, 32)  # tokens of a pass, from plain decoding to a tree
_REPEATS = 3


@dataclass(frozen=True)
class Models:
    """The target that the engine decodes with, and the ways in which it runs heads beside it."""

    runner: TargetRunner
    mode: str  # eager or compiled
    arithmetic: str  # of the compiled kernels with bfloat16 weights; otherwise the dtype's name
    weights: str  # of the target: int8, int4, or the dtype's name
    head_weights: str  # the same of heads
    cache_size: CacheSize  # with the first heads'
    kernel: Kernel

    def packed(self, head: DraftHead, *, in_place: bool = False) -> DraftHead:
        """Return a head as it is to be run; in_place: its owner has no other use for it."""
        if self.mode != "compiled":
            return head
        return _pack_head(head, self.runner.target, _BITS.get(self.head_weights, 0), in_place)

    def proposer(self, head: DraftHead) -> Proposer:
        """Return what drafts with a head that was packed: it has as many slots and blocks as the target."""
        runner, size = self.runner, self.cache_size
        layers, slots = head.auxiliary_layers(runner.target), len(runner.cache.lengths)
        proposer = make_proposer(runner.target, head, layers, slots, size.capacity, self.kernel, size.blocks)
        if self.mode == "compiled" and isinstance(proposer, HeadProposer):
            fuse_head(proposer.runner)
        return proposer


class ModelOptions(TypedDict, total=False):
    """Options of the execution of the models.

    mode: `eager` runs the models as they are; `compiled`, on a CPU in float32 or bfloat16, replaces linear layers by
    packed ones and attention by a kernel of ours, and runs all layers of the Llama family in one call; `auto`, the
    default, is compiled where that is possible.
    arithmetic: of bfloat16 weights in compiled mode, for the whole process: one of `cpu_kernels.arithmetics`, or `auto`
    for the fastest of them.
    weights, head_weights: `int8` and `int4` round the matrices of the target, or of the head, in compiled mode, with
    int4 the LM head to int8: the answers are then exactly those of the rounded target. `float` leaves them in their
    dtype. `auto` is float for the target, and for the head int8 in compiled mode: drafts need not be exact.
    pack_in_place: the compiled mode replaces the linear layers of the target itself, which then serves nothing else; by
    default it packs a copy, and the caller's target keeps its weights, too.
    threads: of the arithmetic on a CPU, of the whole process: of the compiled kernels all cores of this process by
    default, or OMP_NUM_THREADS, and PyTorch is left with one then (`torch.set_num_threads`), because its threads wait
    for each other actively, and stall when another process takes a core.
    """

    mode: str
    arithmetic: str
    weights: str
    head_weights: str
    pack_in_place: bool
    threads: int | None


def build_models(
    target: Target,
    heads: Sequence[DraftHead],
    *,
    slots: int,
    capacity: int,
    least: int = 1,
    memory: int | None = None,
    mode: str = "auto",
    arithmetic: str = "auto",
    weights: str = "auto",
    head_weights: str = "auto",
    pack_in_place: bool = False,
    threads: int | None = None,
) -> tuple[Models, list[Proposer]]:
    """Return the models, and a proposer for each head.

    slots, capacity, least, memory: of the KV cache, see `fit_cache`. The others: see `ModelOptions`.

    Raises:
        UserError: for a mode that is impossible here, with the reason; for a target whose attention is not known; for
            too little memory.
    """
    mode = _choose_mode(mode, target)
    products = _choose_arithmetic(arithmetic, mode, target)
    of_target, of_head = _choose_weights(weights, head_weights, mode, target)
    kernel: Kernel = torch_attention
    if mode == "compiled":
        target = _pack(target, pack_in_place, _BITS.get(of_target, 0))
        heads = [_pack_head(head, target, _BITS.get(of_head, 0)) for head in heads]
        if of_target in _BITS and (share := _share_left(target)) > 0:
            reason = "they are not in linear layers, as those of a mixture of experts"
            dtype = str(target.dtype).removeprefix("torch.")
            log.warning("weights = %r: %.0f %% of the matrices stay in %s; %s", of_target, 100 * share, dtype, reason)
        kernel = packed_attention
        if threads is not None:
            set_threads(threads)
        torch.set_num_threads(1)
    elif threads is not None:
        torch.set_num_threads(threads)
    probe = find_attention(target)
    shapes = [shape for shape, _ in probe.found.values()]
    drafting = [head_shape(head) for head in heads if isinstance(head, StepwiseHead)]
    size = fit_cache([*shapes, *drafting], slots, capacity, least, memory)
    runner = TargetRunner(target, probe, SlotCache(shapes, slots, size.capacity, size.blocks), kernel)
    runner.compiled = mode == "compiled"
    if runner.compiled:
        fuse_target(runner)
    models = Models(runner, mode, products, of_target, of_head, size, kernel)
    return models, [models.proposer(head) for head in heads]


def make_proposer(
    target: Target,
    head: DraftHead,
    layers: tuple[int, ...],
    slots: int,
    capacity: int,
    kernel: Kernel,
    blocks: int | None = None,
) -> Proposer:
    """Return the proposer of the head: token by token through a `SlotCache` of this size, or all at once."""
    if isinstance(head, StepwiseHead):
        cache = SlotCache([head_shape(head)], slots, capacity, blocks)
        return HeadProposer(HeadRunner(target, head, cache, kernel), layers)
    assert isinstance(head, MedusaHead)
    return AtOnceProposer(head, layers)


def decoding_dtype(dtype: str, mode: str, target: str = "", weights: str = "auto") -> str:
    """Resolve `auto` for decoding: on a CPU bfloat16, where the compiled kernels are there.

    They read weights in bfloat16 and compute in float32: half the bytes, and no arithmetic that the CPU is slow at.
    With integer weights a GGUF file is read in float32: nothing narrower gives the integers of its blocks back.
    """
    if dtype == "auto" and weights in _BITS and target.endswith(".gguf"):
        return "float32"
    if dtype != "auto" or mode == "eager" or torch.cuda.is_available():
        return dtype
    return dtype if _why_no_kernels() else "bfloat16"


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layer: SlotLayer, scale: float, window: int, softcap: float
) -> Tensor:
    """Attend by the C++ kernel; arguments as of `torch_attention`."""
    batch, mask = layer.view.batch, layer.view.mask(window)
    query_, key_, value_ = (tensor.to(layer.keys.dtype) for tensor in (query, key, value))
    return slot_attention(
        query_,
        key_,
        value_,
        layer.keys,
        layer.values,
        layer.view.cache.table,
        batch.positions[0],
        batch.table,
        mask,
        scale,
        window,
        softcap,
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


def _choose_arithmetic(name: str, mode: str, target: Target) -> str:
    """Set how the process multiplies bfloat16 weights, and return its name."""
    if name not in ARITHMETICS:
        raise UserError(f"arithmetic = {name!r}: it must be one of {', '.join(ARITHMETICS)}.")
    dtype = str(target.dtype).removeprefix("torch.")
    if mode == "eager" or dtype != "bfloat16":
        if name not in ("auto", dtype):
            raise UserError(
                f"arithmetic = {name!r} is of bfloat16 weights in compiled mode, and this is {dtype} in {mode} mode; "
                "leave it at auto."
            )
        return dtype
    if name != "auto" and name not in arithmetics():
        raise UserError(
            f"arithmetic = {name!r} is not there on this CPU; use auto or one of {', '.join(arithmetics())}."
        )
    set_arithmetic(arithmetics()[-1] if name == "auto" else name)
    return arithmetic()


def _choose_weights(weights: str, head_weights: str, mode: str, target: Target) -> tuple[str, str]:
    """Return the formats of the matrices of target and head."""
    for option, value in (("weights", weights), ("head_weights", head_weights)):
        if value not in WEIGHTS:
            raise UserError(f"{option} = {value!r}: it must be one of {', '.join(WEIGHTS)}.")
        if value in _BITS and mode != "compiled":
            raise UserError(
                f"{option} = {value!r} needs the compiled kernels of a CPU, and this is {mode} mode; leave it at auto."
            )
    dtype = str(target.dtype).removeprefix("torch.")
    of_head = {"auto": "int8" if mode == "compiled" else dtype, "float": dtype}.get(head_weights, head_weights)
    return weights if weights in _BITS else dtype, of_head


def _why_no_kernels() -> str | None:
    try:
        load_kernels(cache_folder())
    except KernelsUnavailable as error:
        return str(error).rstrip(".")
    return None


def _pack(target: Target, in_place: bool, bits: int) -> Target:
    """Return the target with packed linear layers."""
    _ = target.fingerprint  # while its weights are there to be hashed
    check_range(target.model, bits, f"target {target.name!r}", "weights")
    dtype = target.dtype
    if not in_place:
        target, model = copy.copy(target), target.model
        # all but the linear layers' weights is shared with the original
        tensors = itertools.chain(model.parameters(), model.buffers())
        target.model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        target.decoder = target.model.get_decoder() if hasattr(model, "get_decoder") else target.model.base_model
        target.config = target.model.config.get_text_config()
        target.embedding = target.model.get_input_embeddings()
    try:
        pack_linears(target.model, dtype, bits, target.lm_head)
    except ValueError as error:
        raise UserError(f"target {target.name!r}: {error}; load it again for another engine.") from error
    target.lm_head = target.model.get_output_embeddings()
    return target


def _pack_head(head: DraftHead, target: Target, bits: int, in_place: bool = False) -> DraftHead:
    """Return a copy of a head, which its owner may want to save, with packed linear layers, beside a packed target."""
    check_range(head, bits, "the head", "head_weights")
    head = (head if in_place else copy.deepcopy(head)).to(target.dtype)
    pack_linears(head, target.dtype, bits, getattr(head, "lm_head", None))
    head.use_target_lm_head(target)  # not the plain one's LM head, where it has none
    return head


def check_range(model: nn.Module, bits: int, name: str, option: str) -> None:
    """Refuse matrices that integers with float16 scales do not reach."""
    for part in model.modules() if bits else ():
        largest = float(part.weight.detach().abs().max()) if type(part) is nn.Linear else 0.0
        if not largest <= _LARGEST_ROUNDED:
            raise UserError(
                f"{name} has a matrix with an entry of magnitude {largest:.3g}, and integers with float16 scales reach "
                f"{_LARGEST_ROUNDED:.0f}; use {option} = 'float'."
            )


def _share_left(target: Target) -> float:
    """Return the share of the weights in matrices that were not packed; the embedding, a table, does not count."""
    packed = sum(part.in_features * part.out_features for part in target.model.modules() if type(part) is PackedLinear)
    table = target.embedding.weight
    left = sum(each.numel() for each in target.model.parameters() if each.dim() > 1 and each is not table)
    return left / (left + packed)


@torch.inference_mode()
def pass_seconds(runner: TargetRunner) -> dict[int, float]:
    """Time passes over an empty slot, with their logits, as a verification would run them: tokens -> least seconds."""
    timings: dict[int, list[float]] = {width: [] for width in WIDTHS}
    for width in WIDTHS * _REPEATS:
        slot, began = runner.cache.acquire(width), time.perf_counter()
        hidden, _ = runner.forward(RaggedBatch.of([Segment(slot, 0, 0, [0] * width)], runner.target.device))
        runner.logits(hidden).max(dim=-1).indices.tolist()
        timings[width].append(time.perf_counter() - began)
        runner.cache.release(slot)
    return {width: min(seconds) for width, seconds in timings.items()}
