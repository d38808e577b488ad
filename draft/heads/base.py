"""The interface of a draft head, for trainer, replay and engine, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from draft.errors import UserError
from draft.heads.config import DecoderConfig, HeadConfig
from draft.heads.layers import Attend, Attention, Rotary, attend_causally
from draft.heads.unroll import attend_unrolled, shift_left, take
from draft.target import Target


@dataclass(frozen=True)
class Features:
    """The target's states that training reads, for a right-padded batch."""

    embeds: Tensor  # [batch, tokens, hidden]
    auxiliary: Tensor  # [batch, tokens, layers * hidden]
    last_hidden: Tensor  # [batch, tokens, hidden], after the final norm


@dataclass(frozen=True)
class SharedTarget:
    """A target whose LM head is used; copies of a head, however deep, use the same one."""

    target: Target

    def __deepcopy__(self, memo: object) -> SharedTarget:
        return self


class DraftHead(nn.Module, ABC):
    """A network that predicts tokens from the target's states.

    At position i it has the target's states of token i (those of `auxiliary_layers`), and its draft step k predicts
    token i + 2 + k, over the draft vocabulary: `d2t` holds offsets, so that draft id j is target id j + d2t[j], and
    `t2d` marks the target ids that it has. Neither is saved where that vocabulary is the target's.
    """

    architecture: ClassVar[str]  # the name that users choose it by
    stored_as: ClassVar[str]  # `architectures` in its config.json
    config_class: ClassVar[Any]  # with for_target and from_dict
    options: ClassVar[tuple[str, ...]]  # fields of the configuration that a user may choose for a new head
    reduced_vocabulary: ClassVar[bool]  # a new head has an LM head over fewer tokens than the target by default
    tensor_renames: ClassVar[tuple[tuple[str, str], ...]] = ()  # (part of a tensor's name in some files, ours)
    # weight of the regression to the target's states in its loss; None: it does not predict them
    feature_weight: ClassVar[float | None] = None
    fingerprint: str | None = None  # of the weights file that it was loaded from (`head_sha256`)
    longest: int | None = None  # the most tokens that it can draft in a row; None: any number
    adapter_targets: tuple[str, ...]  # names of the linear layers that an adapter is put on by default

    d2t: Tensor
    t2d: Tensor
    anchor: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config: Any = config
        self._shared: SharedTarget | None = None
        full = config.full_vocabulary
        d2t, t2d = torch.zeros(config.draft_vocab_size, dtype=torch.int64), torch.full((config.vocab_size,), full)
        self.register_buffer("d2t", d2t, persistent=not full)
        self.register_buffer("t2d", t2d, persistent=not full)
        # goes where the weights go: linear layers may have been replaced by packed ones
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def beyond(self, steps: int) -> Sequence[nn.Module]:
        """The modules that no draft step before `steps` computes with: so many steps don't train them."""
        return ()

    @abstractmethod
    def auxiliary_layers(self, target: Target) -> tuple[int, ...]:
        """The layers of `target` whose states it reads, in its order.

        Raises:
            UserError: when the target has no such layers.
        """

    @abstractmethod
    def combine(self, auxiliary: Tensor) -> Tensor:
        """The target's states [..., layers * hidden] -> the input of the first draft step, [..., hidden]."""

    @abstractmethod
    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """States of draft step `step` [..., hidden] -> [..., draft_vocab]."""

    @abstractmethod
    def unroll(
        self,
        embeds: Tensor,
        auxiliary: Tensor,
        steps: int,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield the hidden states of draft steps 0..steps-1, each [batch, tokens, hidden] (see `draft.heads.unroll`).

        embeds: [batch, tokens, hidden], the target's embeddings of x; auxiliary: [batch, tokens, layers * hidden], its
        states of the same x at `auxiliary_layers`.
        attention_mask, position_ids: [batch, tokens], see `Batch`; rows are padded on the right. Entry i of step k is
        meaningful where x[i+1+k] exists in the same conversation; beyond a row's end the embeddings are zeros.
        places: [batch, wanted], the entries whose states are wanted, each [batch, wanted, hidden] then; None: all.
        """

    @abstractmethod
    def initialise(self, target: Target, batches: Iterable[tuple[Features, Tensor]], seed: int) -> None:
        """Set a new head's weights in closed form, in place (see `draft.heads.initial`).

        batches: (features, attention mask [batch, tokens]) of some training rows; none leave the head as it is.
        """

    @property
    def lm_head_modules(self) -> dict[str, nn.Linear]:
        """Its LM heads by the names of their modules, each over the draft vocabulary; none: the target's."""
        return {}

    def use_target_lm_head(self, target: Target) -> None:
        """Compute logits with the target's LM head, where the head has none."""
        if not self.lm_head_modules:
            self._shared = SharedTarget(target)

    @property
    def shared_target(self) -> Target:
        """The target whose LM head it uses."""
        if self._shared is None:
            raise UserError("the head has no LM head; give it the target's with `head.use_target_lm_head(target)`.")
        return self._shared.target

    def set_vocabulary(self, target_ids: Tensor) -> None:
        """Choose the draft vocabulary: sorted target ids [draft_vocab]."""
        target_ids = target_ids.to(self.d2t.device)
        self.d2t.copy_(target_ids - torch.arange(len(target_ids), device=self.d2t.device))
        self.t2d.zero_()
        self.t2d[target_ids] = True

    @property
    def vocabulary(self) -> Tensor:
        """Target ids of the draft vocabulary, [draft_vocab] int64."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)


class StepwiseHead(DraftHead):
    """A head of one decoder layer that drafts token by token, each step reading the one before: EAGLE and its kin.

    Step k at position i reads a state (`combine`d target states, then its own output) and the embedding of token i+1+k.
    """

    # the decoder layer's matrices: the LM head is most of the weights and has the target's rows already, and fc reads
    # raw residual streams, whose outliers make an adapter on it unstable at rates that suit the others
    adapter_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    config: DecoderConfig

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.rope = Rotary(self.config.rope_parameters, self.config.head_dim, self.config.max_position_embeddings)

    @property
    @abstractmethod
    def attention(self) -> Attention:
        """The attention of its decoder layer."""

    @abstractmethod
    def mix(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """embeds, hidden: [batch, tokens, hidden] -> attention's input [batch, tokens, ...], and the residual."""

    @abstractmethod
    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer after attention: [batch, tokens, hidden], as `forward` returns it."""

    def forward(self, embeds: Tensor, hidden: Tensor, position_ids: Tensor, attend: Attend = attend_causally) -> Tensor:
        """One pass of the decoder layer.

        embeds, hidden: [batch, tokens, hidden]; hidden is `combine`d target states, or this method's own output in
        later draft steps. position_ids: [batch, tokens], the position of the token whose state `hidden` is (the
        embedding is of the token after it).

        Returns:
            [batch, tokens, hidden]: give it to `logits`, and to the next draft step.
        """
        x, residual = self.mix(embeds, hidden)
        return self.finish(residual, self.attention(x, self.rope(position_ids, hidden.dtype), attend))

    def unroll(
        self,
        embeds: Tensor,
        auxiliary: Tensor,
        steps: int,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Iterator[Tensor]:
        batch, tokens, _ = embeds.shape
        attention, groups = self.attention, self.config.num_attention_heads // self.config.num_key_value_heads
        if position_ids is None:
            position_ids = torch.arange(tokens, device=embeds.device).expand(batch, -1)
        positions = take(position_ids[..., None], places)[..., 0]

        hidden = self.combine(auxiliary)
        cache: list[tuple[Tensor, Tensor]] = []  # keys and values of steps 0.., each [batch, heads, tokens, head_dim]
        for step in range(steps):
            embeds = shift_left(embeds)
            if step == 0:  # the keys of all positions are attended to, from those that are wanted
                x, residual = self.mix(embeds, hidden)
                k, v = attention.keys_values(x, self.rope(position_ids, hidden.dtype))
                x, residual = take(x, places), take(residual, places)
            else:
                x, residual = self.mix(take(embeds, places), hidden)
                k, v = attention.keys_values(x, self.rope(positions + step, hidden.dtype))
            q = attention.queries(x, self.rope(positions + step, hidden.dtype))
            cache.append((k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)))
            mixed = attend_unrolled(q, cache[0], cache[1:], attention_mask, places)
            hidden = self.finish(residual, attention.merge(mixed))
            yield hidden
