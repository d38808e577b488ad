"""The C++ operators with their shapes, and layers that use them in place of a model's own.

`load_kernels` comes first: all others need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from cpu_kernels.build import built_library

BLOCK = 16  # entries of a block of the cache, as in attention.h


@lru_cache
def load_kernels(cache: Path) -> None:
    """Register torch.ops.draftsmith, compiled the first time on a machine into the folder `cache`.

    Raises:
        KernelsUnavailable: when there is no C++ compiler, or it refuses the source.
    """
    torch.ops.load_library(str(built_library(cache)))


def pack(weight: Tensor, bits: int = 0) -> Tensor:
    """Put a linear layer's weight [out, in], float32 or bfloat16, in the order in which `packed_linear` reads it.

    bits: 8 or 4 rounds it to integers in blocks of 32 inputs with a float16 scale, as GGUF's Q8_0, or a scale and a
    minimum, as Q4_1; a float32 weight made of such blocks, or of Q4_0's, that use their largest levels gives the same
    levels. 0: as it is.

    Returns [panels, steps, elements] in the weight's dtype, or bytes: for this machine and process only, never to be
    saved.
    """
    return torch.ops.draftsmith.pack(weight, bits)


def weight_memory(size: int) -> Tensor:
    """Allocate `size` bytes, uint8, in large pages where the system has them: reading weights is what a step costs."""
    return torch.ops.draftsmith.weight_memory(size)


def packed_linear(x: Tensor, packed: Tensor, out_features: int, bias: Tensor | None = None) -> Tensor:
    """Multiply x [..., in] (float32 or bfloat16) by a packed weight: [..., out_features] in x's dtype.

    Products are summed in float32, in one order whatever the number of rows. What is multiplied with a bfloat16 weight
    depends on `arithmetic`: x itself, or x rounded to bfloat16. With integer weights x is rounded to int8, each row and
    block of 32 inputs by its own largest magnitude.
    """
    return torch.ops.draftsmith.packed_linear(x, packed, out_features, bias)


def slot_attention(
    q: Tensor,  # [1, query heads, tokens, width]
    k: Tensor,  # [1, key heads, tokens, width]
    v: Tensor,  # [1, key heads, tokens, value width]
    k_cache: Tensor,  # [key heads, places, width], written
    v_cache: Tensor,  # [key heads, places, value width], written
    blocks: Tensor,  # int64 [slots, blocks of a slot]: those that hold its entries, in order; -1: none
    positions: Tensor,  # int64 [tokens], for the window
    segments: Tensor,  # int64 [segments, 5]: slot, base, past, start, count
    mask: Tensor,  # bool [tokens, keys from base on], or empty: causal
    scale: float,
    window: int = 0,  # keys that a token sees, itself included; 0: all
    softcap: float = 0.0,  # scores become softcap * tanh(scores / softcap); 0: unchanged
) -> Tensor:
    """Write the tokens' keys and values behind their slots' `past` entries, then attend.

    Entry i of a slot is in place blocks[slot, i // BLOCK] * BLOCK + i % BLOCK of the cache.

    Tokens start..start+count of the batch belong to one slot. Token j of a segment sees the keys [0, base) within its
    window, and of the keys from base on those that the mask allows (the window is in the mask then), or without a mask
    those up to its own, past + j, within its window. Tokens of no segment give zeros; a segment may be empty.

    q, k, v and the cache share one dtype, float32 or bfloat16.
    Returns [1, tokens, query heads, value width].
    """
    return torch.ops.draftsmith.slot_attention(
        q, k, v, k_cache, v_cache, blocks, positions, segments, mask, scale, window, softcap
    )


def choices(logits: Tensor, keys: Tensor | None = None, inverse_temperature: float = 1.0) -> Tensor:
    """Return the place of the largest of each row of logits [rows, vocab], float32 or bfloat16 -> ids [rows].

    keys: int64 [rows, 2], of the Gumbel noise (serving/engine/noise.py) that is added to logits * inverse_temperature:
    a draw from their softmax.
    """
    return torch.ops.draftsmith.choices(logits, keys, inverse_temperature)


def set_threads(count: int) -> None:
    """Set the number of threads that the operators share, the caller's included.

    At first all cores of this process, or OMP_NUM_THREADS where that is fewer.
    """
    torch.ops.draftsmith.set_threads(count)


def threads() -> int:
    """Return the number of threads that the operators share."""
    return torch.ops.draftsmith.get_threads()


def arithmetics() -> list[str]:
    """Return the ways in which this machine can multiply bfloat16 weights, the fastest last.

    float32: weights become floats. bf16: x is rounded to bfloat16, for dot products of pairs (AVX512-BF16). amx: the
    same by tiles of matrices. Sums are float32 in all, and a row's result does not depend on the rows beside it.
    """
    return torch.ops.draftsmith.arithmetics()


def set_arithmetic(name: str) -> None:
    """Choose one of `arithmetics` for this process; at first it is the fastest."""
    torch.ops.draftsmith.set_arithmetic(name)


def arithmetic() -> str:
    """Return the one of `arithmetics` in use."""
    return torch.ops.draftsmith.get_arithmetic()


@dataclass(frozen=True)
class FusedDecoder:
    """Decoder layers of the Llama family in one call; activations and the residual stream are float32."""

    weights: list[Tensor]  # 13 a layer, empty where it has none, see kernels.cpp
    windows: list[int]  # one a layer, as in `slot_attention`
    heads: int
    eps: float
    scale: float
    softcap: float

    def run(
        self,
        hidden: Tensor,  # [1, tokens, hidden]
        embeds: Tensor,  # the same, for layers that read cat(norm(embeds), norm(hidden)), or empty
        rotation: tuple[Tensor, Tensor],  # cosines and sines, [..., tokens, rotary] each
        cache: Sequence[tuple[Tensor, Tensor]],  # keys and values of each layer, as in `slot_attention`, written
        blocks: Tensor,
        positions: Tensor,
        segments: Tensor,
        masks: Sequence[Tensor],  # one a layer
        captured: Sequence[int] = (),  # layers whose input is returned, too; their number: the output
    ) -> Tensor:
        """Return [1 + captured, tokens, hidden] float32: the last layer's output, and the captured layers' inputs."""
        keys, values = ([pair[part] for pair in cache] for part in (0, 1))
        return torch.ops.draftsmith.decoder_layers(
            hidden, embeds, *rotation, self.weights, keys, values, blocks, positions, segments, masks, self.windows,
            captured, self.heads, self.eps, self.scale, self.softcap,
        )  # fmt: skip


@dataclass(frozen=True)
class FusedChains:
    """Chains of drafts of an EAGLE-3 head in one call: reading what was accepted, and every step of every chain."""

    weights: list[Tensor]  # 13 of the layer as in FusedDecoder, fc (empty: the states are its output), norm, LM head
    embedding: Tensor  # [ids, hidden], in the cache's dtype
    vocabulary: Tensor  # int64 [draft_vocab] target ids
    heads: int
    eps: float
    scale: float
    norm_output: bool

    def run(
        self,
        states: Tensor,  # [tokens, features of fc], one sequence after the other
        ids: Tensor,  # int64 [tokens]: the token after each of them
        segments: Tensor,  # int64 [sequences, 5] as in `slot_attention`; a count of 0: nothing is read
        hidden: Tensor,  # float32 [sequences, hidden], written: the head's output at the last token read
        rotation: tuple[Tensor, Tensor],  # float32 cosines and sines [positions, rotary]
        cache: tuple[Tensor, Tensor],  # keys and values, written
        blocks: Tensor,
        lengths: Tensor,  # int64 [sequences]: the most drafts of each
        keys: Tensor,  # int64 [sequences, longest, 2]: of the noise, see serving/engine/noise.py
        noise: Tensor,  # int64 [sequences]: 0: none; 1: that of target ids; 2: of places in the draft vocabulary
        inverse_temperatures: Tensor,  # float32 [sequences]
        floors: Tensor,  # float32 [sequences]: a chain ends before its estimated acceptance falls below
        calibration: Tensor,  # float32 [sequences, 16]: acceptance of a token by its step's largest probability
        keep_logits: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens [sequences, longest] (-1 behind a chain's end), each step's largest probability at the
        sequence's temperature, the same shape, and the logits [sequences, longest or 0, draft_vocab]."""
        return torch.ops.draftsmith.draft_chains(
            states, ids, segments, hidden, self.weights, self.embedding, self.vocabulary, *rotation, *cache, blocks,
            lengths, keys, noise, inverse_temperatures, floors, calibration, self.heads, self.eps, self.scale,
            self.norm_output, keep_logits,
        )  # fmt: skip


class OneCallNorm(nn.Module):
    """A root-mean-square norm in one call: PyTorch's small operations, once a pass has emptied the CPU's caches, take
    a percent of a step."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight: Tensor
        self.register_buffer("weight", weight.detach().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.draftsmith.rms_norm(x, self.weight, self.eps)


class PackedLinear(nn.Module):
    """A linear layer for decoding: its weight is stored once, in integers, bfloat16 or float32, in the kernels'
    order.

    A row's result does not depend on the number of rows: no faster product is taken for wide passes, since it would
    round differently, and a request's text would then depend on the requests beside it.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, bits: int = 0) -> None:
        """dtype: of the weight where bits, which are those of `pack`, are 0."""
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach()  # [out, in]
        self.packed: Tensor
        self.bias: Tensor | None
        # buffers that a checkpoint does not have: the order is this machine's
        self.register_buffer("packed", pack(weight.to(torch.float32 if bits else dtype), bits), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return packed_linear(x, self.packed, self.out_features, self.bias)


def pack_linears(module: nn.Module, dtype: torch.dtype, bits: int = 0, lm_head: nn.Module | None = None) -> None:
    """Replace every nn.Linear below `module` by a PackedLinear, in place; arguments as there.

    lm_head: gets 8 bits where the others get 4; it is what rounding harms most.

    Raises:
        ValueError: some have been packed before in another format.

    A weight shared with an embedding stays there for the embedding.
    """
    wanted = torch.uint8 if bits else dtype
    if any(type(each) is PackedLinear and each.packed.dtype != wanted for each in module.modules()):
        raise ValueError(f"its linear layers have been packed before, in a format other than {wanted}")
    replaced: dict[int, PackedLinear] = {}  # by id: a replaced layer is freed at once
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                if id(child) not in replaced:
                    replaced[id(child)] = PackedLinear(child, dtype, 8 if bits and child is lm_head else bits)
                setattr(parent, name, replaced[id(child)])
