"""Forward passes of the target and of the head over ragged batches, each with its cache of slots."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from draft.errors import UserError
from draft.heads import StepwiseHead
from draft.target import Target
from draft.target.target import attending_by, capture_hidden_states
from serving.engine.compiler import set_compiler_up
from serving.engine.fixed_shapes import FixedShapes
from serving.engine.fused import PROBED, adds_the_same, agree
from serving.engine.kv_cache import NAME, Batch, Kernel, LayerShape, Probe, Segment, SlotCache, SlotLayer, View

if TYPE_CHECKING:
    from serving.engine.fused import FusedDecoder


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
        self.fixed: FixedShapes | None = None  # what narrow passes run by

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """-> last hidden states [N, hidden], after the final norm, and auxiliary states [N, layers * hidden]."""
        outputs = self.fixed.run(batch) if self.fixed else None
        if outputs is None:
            self.view.show(batch)
            fused = self.fused if self.fused is not None and self.fused.takes(batch.ids.shape[1]) else None
            outputs = self._fused(fused, batch) if fused else self.layer_by_layer(batch.ids, batch.positions)
        for segment in batch.segments:
            self.cache.extend(segment.slot, len(segment.ids))
        return outputs[0], outputs[1] if self.layers else None

    def fuse_layers(self) -> bool:
        """Run all layers in one call from now on, if the target is of the family that can; whether it is.

        The linear layers must have been packed.
        """
        from serving.engine.fused import in_one_call, recognise

        fused, norm = recognise(self.target.decoder.layers, self.scoring), in_one_call(self.target.decoder.norm)
        if fused is None or norm is None:
            return False
        self.norm = norm
        ends = (0, 1), (self.cache.capacity - PROBED, 1)
        if agree(self, functools.partial(self._fused, fused), ends, precisely=True) and adds_the_same(self, fused):
            self.fused = fused
        return self.fused is not None

    def fix_shapes(self) -> bool:
        """Run narrow passes in one of a few shapes from now on, if that works with this target; whether it does.

        On CUDA each shape is recorded as a graph when it first comes.
        """
        self.fixed = FixedShapes(self.layer_by_layer, self.view, self.cache)
        if not agree(self, self.fixed.run, ((0, 1), (0, 2)), precisely=False):  # the second replays the first
            self.fixed = None
        return self.fixed is not None

    @property
    def fixes_shapes(self) -> bool:
        return self.fixed is not None and not self.fixed.refused

    @property
    def recordings(self) -> int:
        """How often a shape was recorded."""
        return self.fixed.recordings if self.fixed else 0

    def _fused(self, fused: FusedDecoder, batch: Batch) -> list[Tensor]:
        inside = [layer for layer in self.layers if layer <= self.target.num_layers]
        output, dtype = self.all_layers(fused, batch, inside), self.target.dtype
        hidden = self.norm(output[0]).to(dtype)
        captured = {**dict(zip(inside, output[1:].to(dtype), strict=True)), self.target.output_layer: hidden}
        return self._with_states(hidden, captured)

    def all_layers(self, fused: FusedDecoder, batch: Batch, captured: Sequence[int]) -> Tensor:
        """-> [1 + captured, N, hidden] float32: what leaves the last layer, and what enters the captured ones."""
        decoder = self.target.decoder
        embeds = decoder.embed_tokens(batch.ids)
        masks = [self.view.masks.get(scoring.window, self.view.mask) for scoring in self.scoring]
        return fused.run(
            embeds,
            decoder.rotary_emb(embeds, position_ids=batch.positions),
            self.cache.layers,
            self.view.positions,
            self.view.table,
            masks,
            captured,
        )

    def layer_by_layer(self, ids: Tensor, positions: Tensor, *, precisely: bool = False) -> list[Tensor]:
        """precisely: with a residual stream in float32, or the target's dtype if that is wider."""
        given = self.embedded(ids) if precisely else {"input_ids": ids}
        hidden, captured = self.model_pass(given, positions, self.layers)
        return self._with_states(hidden[0], {layer: states[0] for layer, states in captured.items()})

    def embedded(self, ids: Tensor) -> dict[str, Tensor]:
        embeds = self.target.embedding(ids)
        return {"inputs_embeds": embeds.to(torch.promote_types(embeds.dtype, torch.float32))}

    def model_pass(
        self, given: dict[str, Tensor], positions: Tensor, layers: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The model's own code: last hidden states [1, N, hidden], and what enters each of `layers`."""
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

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab]."""
        return self.target.logits(hidden)


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
        self.run: Any = self._run
        self.fixed: FixedShapes | None = None  # what narrow passes run by

    def fuse_layer(self) -> bool:
        """Run the layer in one call from now on, if it can be; whether it is. Its linear layers are packed."""
        from serving.engine.fused import in_one_call, recognise_head

        fused = recognise_head(self.head, self.head.config.head_dim**-0.5)
        if fused is None:
            return False
        self.head.norm = in_one_call(self.head.get_submodule("norm")) or self.head.norm
        norm: Any = self.head.norm if getattr(self.head.config, "norm_output", False) else None
        # a step has so little arithmetic that computing angles would be a twentieth of it
        everywhere = torch.arange(self.cache.capacity)[None]
        cos, sin = (part[0, 0] for part in self.head.rope(everywhere, torch.float32))  # [capacity, head_dim] each

        def run(embeds: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
            output = fused.run(
                hidden,
                (cos[None, None, positions[0]], sin[None, None, positions[0]]),
                self.cache.layers,
                self.view.positions,
                self.view.table,
                [self.view.mask],
                (),
                embeds,
            ).to(hidden.dtype)  # [1, N, hidden]
            return norm(output) if norm is not None else output

        self.run = run
        return True

    def fuse(self, auxiliary: Tensor) -> Tensor:
        """The target's auxiliary states [n, layers * hidden] -> [n, hidden]."""
        return self.head.fuse(auxiliary.to(self.dtype))

    def forward(self, batch: Batch, hidden: Tensor) -> Tensor:
        """One pass: hidden [N, hidden], `fuse`d states or this method's own output -> [N, hidden]."""
        outputs = self.fixed.run(batch, hidden) if self.fixed else None
        if outputs is not None:
            return outputs[0]
        self.view.show(batch)
        return self._read(batch.ids, batch.positions, hidden)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, draft_vocab]."""
        return self.head.logits(hidden)

    def fix_shapes(self) -> None:
        """As `TargetRunner.fix_shapes`."""
        self.fixed = FixedShapes(self._read, self.view, self.cache)

    @property
    def recordings(self) -> int:
        return self.fixed.recordings if self.fixed else 0

    def compile(self) -> None:
        """Run the layer in one call if it can be, and otherwise fuse what lies between the kernels; on CUDA graphs."""
        if self.head.device.type == "cuda":
            self.fix_shapes()
            return
        if self.fuse_layer():
            return
        set_compiler_up()
        self.view.compiled = True
        self.run = torch.compile(self._run, fullgraph=True)

    @torch.inference_mode()
    def try_out(self, width: int, parents: Sequence[int] | None = None) -> None:
        """A pass over an empty slot."""
        slot = self.cache.acquire()
        batch = Batch.of([Segment(slot, 0, 0, [0] * width, parents)], self.head.device)
        hidden = torch.zeros(width, self.head.config.hidden_size, dtype=self.dtype, device=self.head.device)
        self.logits(self.forward(batch, hidden))
        self.cache.release(slot)

    def _read(self, ids: Tensor, positions: Tensor, hidden: Tensor) -> list[Tensor]:
        """ids, positions [1, N], hidden [N, hidden] -> [[N, hidden]]."""
        return [self.run(self.embedding(ids).to(self.dtype), hidden[None], positions)[0]]

    def _run(self, embeds: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        return self.head(embeds, hidden, positions, self._attend)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.layer.kernel(query, key, value, self.layer, query.shape[-1] ** -0.5, 0, 0.0)


def _find_attention(target: Target) -> Probe:
    """The attention modules, in the order they run in, by one pass over a single token."""
    probe = Probe()
    batch = Batch.of([Segment(0, 0, 0, [0])], target.device)
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
    with attending_by(target, NAME):
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
