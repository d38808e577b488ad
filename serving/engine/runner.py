"""Forward passes of the target and of the head over ragged batches, each with its cache of slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from draft.errors import UserError
from draft.heads import Eagle3Head
from draft.target import Target
from draft.target_hooks import attending_by, capture_hidden_states
from serving.engine.attention import NAME, Kernel, Probe, SlotLayer, View
from serving.engine.batch import Batch, Segment
from serving.engine.cache import LayerShape, SlotCache

_DEEPEST = 64  # no tree is deeper


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
        # wider ones hold any tree that is ever drafted
        self.view.masks = {window: self.view.mask for window in probe.windows if 0 < window <= _DEEPEST}
        self.cache = SlotCache(list(probe.found.values()), slots, capacity)
        self.attached = {
            module: SlotLayer(keys, values, self.view, kernel)
            for module, (keys, values) in zip(probe.found, self.cache.layers, strict=True)
        }
        self.forwards: dict[nn.Module, Any] = {}  # compiled replacements of layers' forward methods

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """-> last hidden states [N, hidden], after the final norm, and auxiliary states [N, layers * hidden]."""
        self.view.show(batch)
        captured: dict[int, Tensor] = {}
        with (  # the first of them locks the target: another engine may share it
            _attention_by(self.target, self.attached),
            _replaced_forwards(self.forwards),
            capture_hidden_states(self.target.decoder, self.layers, captured),
        ):
            output = self.target.decoder(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
        states = torch.cat([captured[layer][0] for layer in self.layers], dim=-1) if self.layers else None
        for segment in batch.segments:
            self.cache.extend(segment.slot, len(segment.ids))
        return output.last_hidden_state[0], states

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab]."""
        return self.target.logits(hidden)


class HeadRunner:
    """An EAGLE-3 head over the embeddings of its target.

    At position i it reads the state of token i and the embedding of token i+1, which is the batch's token there.
    """

    def __init__(self, target: Target, head: Eagle3Head, *, slots: int, capacity: int, kernel: Kernel) -> None:
        self.head, self.embedding = head, target.embedding
        self.dtype = head.norm.weight.dtype
        config = head.config
        shape = LayerShape(
            config.num_key_value_heads, config.head_dim, config.head_dim, self.dtype, head.norm.weight.device
        )
        self.cache = SlotCache([shape], slots, capacity)
        self.view = View.empty()
        self.layer = SlotLayer(*self.cache.layers[0], self.view, kernel)
        self.run: Any = self._run

    def fuse(self, auxiliary: Tensor) -> Tensor:
        """The target's auxiliary states [n, layers * hidden] -> [n, hidden]."""
        return self.head.fuse(auxiliary.to(self.dtype))

    def forward(self, batch: Batch, hidden: Tensor) -> Tensor:
        """One pass: hidden [N, hidden], `fuse`d states or this method's own output -> [N, hidden]."""
        self.view.show(batch)
        embeds = self.embedding(batch.ids).to(self.dtype)
        return self.run(embeds, hidden[None], batch.positions)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, draft_vocab]."""
        return self.head.logits(hidden)

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
        yield


@contextmanager
def _replaced_forwards(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]
