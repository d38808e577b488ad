"""Forward passes of the target and of the head over ragged batches, each with its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cpu_kernels.ops import FusedChains, FusedDecoder
from draft.errors import UserError
from draft.heads import StepwiseHead
from draft.target import Target
from draft.target.target import attending_by, capture_hidden_states
from serving.engine.kv_cache import (
    ATTENTION,
    Kernel,
    LayerShape,
    Probe,
    RaggedBatch,
    Segment,
    SlotCache,
    SlotLayer,
    View,
)

_NOTHING = torch.empty(0)


class TargetRunner:
    """Any Hugging Face decoder, driven without its own cache and masks: positions are explicit, attention is ours."""

    def __init__(
        self, target: Target, probe: Probe, cache: SlotCache, kernel: Kernel, layers: tuple[int, ...] = ()
    ) -> None:
        """probe: that of `find_attention`. layers: whose auxiliary hidden states `forward` returns; none: it returns no
        states."""
        self.target, self.cache, self.layers = target, cache, layers
        self.scoring = [scoring for _, scoring in probe.found.values()]
        # a part of a prompt, beside a tree, may be longer than any window
        self.view = View.empty(cache, (scoring.window for scoring in self.scoring if scoring.window > 0))
        self.attached = {
            module: SlotLayer(keys, values, self.view, kernel)
            for module, (keys, values) in zip(probe.found, self.cache.layers, strict=True)
        }
        self.compiled = False  # the kernels are loaded, and take its logits
        self.fused: FusedDecoder | None = None  # all layers in one call
        self.norm: Any = None  # after them
        self.angles: Angles | None = None  # for that call, where a position's do not depend on the others

    def forward(self, batch: RaggedBatch) -> tuple[Tensor, Tensor | None]:
        """-> last hidden states [N, hidden], after the final norm, and auxiliary states [N, layers * hidden]."""
        self.view.show(batch)
        if self.fused is not None:
            inside = [layer for layer in self.layers if layer <= self.target.num_layers]
            output, dtype = self.run_fused(self.fused, batch, inside), self.target.dtype
            hidden = self.norm(output[0]).to(dtype)
            captured = {**dict(zip(inside, output[1:].to(dtype), strict=True)), self.target.output_layer: hidden}
        else:
            hidden, captured = self.run_layers({"input_ids": batch.ids}, batch.positions, self.layers)
        for segment in batch.segments:
            self.cache.extend(segment.slot, len(segment.ids))
        return hidden, torch.cat([captured[layer] for layer in self.layers], dim=-1) if self.layers else None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab]."""
        return self.target.logits(hidden)

    def run_fused(self, fused: FusedDecoder, batch: RaggedBatch, captured: Sequence[int]) -> Tensor:
        """Run all layers in one call -> [1 + captured, N, hidden] float32, before the final norm."""
        embeds = self.target.decoder.embed_tokens(batch.ids)
        if self.angles is not None:
            rotation = self.angles.of(batch.positions)
        else:
            rotation = self.target.decoder.rotary_emb(embeds, position_ids=batch.positions)
        shown, masks = self.view.batch, [self.view.mask(window) for window in fused.windows]
        cache = self.cache
        return fused.run(
            embeds, _NOTHING, rotation, cache.layers, cache.table, shown.positions, shown.table, masks, captured
        )

    def run_layers(
        self, given: dict[str, Tensor], positions: Tensor, layers: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the model's own code -> last hidden states [N, hidden], and what enters each of `layers`, the same."""
        captured: dict[int, Tensor] = {}
        with (  # the first of them locks the target: another engine may share it
            _attention_by(self.target, self.attached),
            capture_hidden_states(self.target.decoder, layers, captured),
        ):
            output = self.target.decoder(**given, position_ids=positions, use_cache=False)
        return output.last_hidden_state[0], {layer: states[0] for layer, states in captured.items()}


class Angles:
    """Cosines and sines of positions from a table, of those that were reached so far: a step has so little arithmetic
    that computing them would be some percent of it."""

    def __init__(self, compute: Callable[[Tensor], tuple[Tensor, Tensor]], capacity: int) -> None:
        """compute: positions [1, n] -> cosines and sines, [1, n, rotary] each."""
        self._compute, self._capacity = compute, capacity
        self._cos, self._sin = _NOTHING, _NOTHING

    def table(self, reached: int) -> tuple[Tensor, Tensor]:
        """Return those of at least the first `reached` positions, [positions, rotary] float32 each."""
        if reached > len(self._cos):
            positions = torch.arange(min(max(2 * reached, 256), max(self._capacity, reached)))[None]
            cos, sin = self._compute(positions)
            self._cos, self._sin = cos[0].float().contiguous(), sin[0].float().contiguous()
        return self._cos, self._sin

    def of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of positions [1, n]: [1, n, rotary] float32 each."""
        cos, sin = self.table(int(positions.max()) + 1)
        return cos[positions], sin[positions]


class HeadRunner:
    """A head that drafts step by step, over the embeddings of its target.

    At position i it reads the state of token i and the embedding of token i+1, which is the batch's token there.
    """

    def __init__(self, target: Target, head: StepwiseHead, cache: SlotCache, kernel: Kernel) -> None:
        """cache: of one layer of `head_shape`."""
        self.head, self.embedding, self.cache = head, target.embedding, cache
        self.dtype = head.dtype
        self.view = View.empty(cache)
        self.layer = SlotLayer(*cache.layers[0], self.view, kernel)
        self.fused: FusedDecoder | None = None  # its layer in one call
        self.norm: Any = None  # after it, where the head's output is normed
        self.chains: FusedChains | None = None  # whole chains in one call,
        self.reads_raw = False  # which starts from auxiliary states as they are, or as `combine` makes them
        # for that call; no method of this object, which would keep itself, and with it the cache, once it is unloaded
        self.angles = Angles(partial(_rotation, head), cache.capacity)

    def combine(self, auxiliary: Tensor) -> Tensor:
        """The target's auxiliary states [n, layers * hidden] -> [n, hidden]."""
        return self.head.combine(auxiliary.to(self.dtype))

    def forward(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        """One pass: hidden [N, hidden], `combine`d states or this method's own output -> [N, hidden]."""
        self.view.show(batch)
        embeds = self.embedding(batch.ids).to(self.dtype)  # [1, N, hidden]
        if self.fused is None:
            layer = self.layer

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                return layer.kernel(query, key, value, layer, query.shape[-1] ** -0.5, 0, 0.0)

            return self.head(embeds, hidden[None], batch.positions, attend)[0]
        rotation = self.angles.of(batch.positions)
        cache, masks = self.cache, [batch.mask]
        output = self.fused.run(
            hidden[None], embeds, rotation, cache.layers, cache.table, batch.positions, batch.table, masks
        )[0]
        output = output.to(hidden.dtype)  # [N, hidden]
        return self.norm(output) if self.norm is not None else output

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, draft_vocab]."""
        return self.head.logits(hidden)


def _rotation(head: StepwiseHead, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = head.rope(positions, torch.float32)
    return cos[:, 0], sin[:, 0]


def head_shape(head: StepwiseHead) -> LayerShape:
    """Return the shape of a head's keys and values."""
    config = head.config
    return LayerShape(config.num_key_value_heads, config.head_dim, config.head_dim, head.dtype, head.device)


def find_attention(target: Target) -> Probe:
    """Find the attention modules, in the order they run in, by one pass over a single token.

    Raises:
        UserError: when the architecture does not take our attention in each of its layers.
    """
    probe = Probe()
    batch = RaggedBatch.of([Segment(0, 0, 0, [0])], target.device)
    with torch.inference_mode(), _attention_by(target, dict.fromkeys(target.decoder.modules(), probe)):
        target.decoder(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
    if len(probe.found) != target.num_layers or probe.again:
        raise UserError(
            f"target {target.name!r}: {len(probe.found)} of the {target.num_layers} layers of "
            f"{type(target.model).__name__} attend through transformers' attention interface"
            f"{', some of them more than once' if probe.again else ''}; the engine needs all of them, once each. Use "
            "another target."
        )
    return probe


@contextmanager
def _attention_by(target: Target, attached: dict[nn.Module, Any]) -> Iterator[None]:
    """Let the decoder attend by our function; the target is otherwise as it was, for replay or another engine."""
    with attending_by(target, ATTENTION):
        for module, layer in attached.items():
            module.__dict__["draftsmith"] = layer
        try:
            yield
        finally:  # or the target would keep an engine's slots after it
            for module in attached:
                del module.__dict__["draftsmith"]
