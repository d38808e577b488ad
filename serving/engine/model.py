"""Forward passes of the target and of the head over ragged batches, each with its cache of slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cpu_kernels.ops import FusedDecoder
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
        self, target: Target, *, slots: int, capacity: int, kernel: Kernel, layers: tuple[int, ...] = ()
    ) -> None:
        """layers: whose auxiliary hidden states `forward` returns; none: it returns no states.

        Raises:
            UserError: when the architecture does not take our attention in each of its layers.
        """
        self.target, self.layers = target, layers
        self.view = View.empty()
        probe = _find_attention(target)
        # a part of a prompt, beside a tree, may be longer than any window
        self.view.masks = {scoring.window: self.view.mask for scoring in probe.scoring if scoring.window > 0}
        self.scoring = probe.scoring
        self.cache = SlotCache(list(probe.found.values()), slots, capacity)
        self.attached = {
            module: SlotLayer(keys, values, self.view, kernel)
            for module, (keys, values) in zip(probe.found, self.cache.layers, strict=True)
        }
        self.forwards: dict[nn.Module, Any] = {}  # compiled replacements of layers' forward methods
        self.fused: FusedDecoder | None = None  # all layers in one call
        self.norm: Any = None  # after them

    def forward(self, batch: RaggedBatch) -> tuple[Tensor, Tensor | None]:
        """-> last hidden states [N, hidden], after the final norm, and auxiliary states [N, layers * hidden]."""
        self.view.show(batch)
        if self.fused is not None and self.fused.takes(batch.ids.shape[1]):
            outputs = self.fused_pass(self.fused, batch)
        else:
            outputs = self.layer_by_layer(batch.ids, batch.positions)
        for segment in batch.segments:
            self.cache.extend(segment.slot, len(segment.ids))
        return outputs[0], outputs[1] if self.layers else None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab]."""
        return self.target.logits(hidden)

    def fused_pass(self, fused: FusedDecoder, batch: RaggedBatch) -> list[Tensor]:
        """Run all layers in one call: [hidden states [N, hidden], auxiliary states where there are any]."""
        inside = [layer for layer in self.layers if layer <= self.target.num_layers]
        output, dtype = self.fused_layers(fused, batch, inside), self.target.dtype
        hidden = self.norm(output[0]).to(dtype)
        captured = {**dict(zip(inside, output[1:].to(dtype), strict=True)), self.target.output_layer: hidden}
        return self._with_states(hidden, captured)

    def fused_layers(self, fused: FusedDecoder, batch: RaggedBatch, captured: Sequence[int]) -> Tensor:
        """-> [1 + captured, N, hidden] float32, see `FusedDecoder.run`."""
        decoder, view = self.target.decoder, self.view
        embeds = decoder.embed_tokens(batch.ids)
        rotation = decoder.rotary_emb(embeds, position_ids=batch.positions)
        masks = [view.masks.get(window, view.mask) for window in fused.windows]
        return fused.run(embeds, _NOTHING, rotation, self.cache.layers, view.positions, view.table, masks, captured)

    def layer_by_layer(self, ids: Tensor, positions: Tensor, *, precisely: bool = False) -> list[Tensor]:
        """precisely: with a residual stream in float32, or the target's dtype if that is wider."""
        given = {"input_ids": ids}
        if precisely:
            embeds = self.target.embedding(ids)
            given = {"inputs_embeds": embeds.to(torch.promote_types(embeds.dtype, torch.float32))}
        hidden, captured = self.model_pass(given, positions, self.layers)
        return self._with_states(hidden[0], {layer: states[0] for layer, states in captured.items()})

    def model_pass(
        self, given: dict[str, Tensor], positions: Tensor, layers: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the model's own code: last hidden states [1, N, hidden], and what enters each of `layers`."""
        captured: dict[int, Tensor] = {}
        with (  # the first of them locks the target: another engine may share it
            _attention_by(self.target, self.attached),
            _replaced_forwards(self.forwards),
            capture_hidden_states(self.target.decoder, layers, captured),
        ):
            output = self.target.decoder(**given, position_ids=positions, use_cache=False)
        return output.last_hidden_state, captured

    def _with_states(self, hidden: Tensor, captured: dict[int, Tensor]) -> list[Tensor]:
        return [hidden, torch.cat([captured[layer] for layer in self.layers], dim=-1)] if self.layers else [hidden]


class HeadRunner:
    """A head that drafts step by step, over the embeddings of its target.

    At position i it reads the state of token i and the embedding of token i+1, which is the batch's token there.
    """

    def __init__(self, target: Target, head: StepwiseHead, *, slots: int, capacity: int, kernel: Kernel) -> None:
        self.head, self.embedding = head, target.embedding
        self.dtype = head.dtype
        config = head.config
        shape = LayerShape(config.num_key_value_heads, config.head_dim, config.head_dim, self.dtype, head.device)
        self.cache = SlotCache([shape], slots, capacity)
        self.view = View.empty()
        self.layer = SlotLayer(*self.cache.layers[0], self.view, kernel)
        # (embeds [1, N, hidden], hidden [1, N, hidden], positions [1, N]) -> [1, N, hidden]; faster ones may replace it
        self.run: Callable[[Tensor, Tensor, Tensor], Tensor] = self.run_head
        self.fused: FusedDecoder | None = None  # its layer in one call
        self.norm: Any = None  # after it, where the head's output is normed
        self.angles: tuple[Tensor, ...] = ()  # cosines and sines of all positions, for that call

    def fuse(self, auxiliary: Tensor) -> Tensor:
        """The target's auxiliary states [n, layers * hidden] -> [n, hidden]."""
        return self.head.fuse(auxiliary.to(self.dtype))

    def forward(self, batch: RaggedBatch, hidden: Tensor) -> Tensor:
        """One pass: hidden [N, hidden], `fuse`d states or this method's own output -> [N, hidden]."""
        self.view.show(batch)
        return self.run(self.embedding(batch.ids).to(self.dtype), hidden[None], batch.positions)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, draft_vocab]."""
        return self.head.logits(hidden)

    def run_head(self, embeds: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """Run the head's own code."""
        return self.head(embeds, hidden, positions, self._attend)

    def run_fused(self, embeds: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """Run the head's layer in one call."""
        assert self.fused is not None
        view, (cos, sin) = self.view, self.angles
        rotation = cos[None, None, positions[0]], sin[None, None, positions[0]]
        masks = [view.mask]
        output = self.fused.run(hidden, embeds, rotation, self.cache.layers, view.positions, view.table, masks)
        output = output.to(hidden.dtype)  # [1, N, hidden]
        return self.norm(output) if self.norm is not None else output

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.layer.kernel(query, key, value, self.layer, query.shape[-1] ** -0.5, 0, 0.0)


def _find_attention(target: Target) -> Probe:
    """Find the attention modules, in the order they run in, by one pass over a single token."""
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


@contextmanager
def _replaced_forwards(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]
