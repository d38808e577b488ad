"""What trainer, replay and engine know of a draft head, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from draft.errors import UserError
from draft.heads.decoder_config import DecoderConfig
from draft.heads.layers import Attend, Attention, attend_causally
from draft.heads.rotary import Rotary
from draft.target import Target


class HeadConfig(Protocol):
    """What every architecture's configuration has."""

    hidden_size: int
    vocab_size: int  # the target's
    draft_vocab_size: int

    @property
    def full_vocabulary(self) -> bool:
        """The draft vocabulary is the target's: engines then refuse a token map."""
        ...

    def as_json(self, dtype: torch.dtype) -> dict[str, Any]:
        """The whole config.json of a head whose tensors are in `dtype`."""
        ...


class Lender:
    """A target that lends its LM head; copies of a head, however deep, borrow from the same one."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __deepcopy__(self, memo: object) -> Lender:
        return self


class DraftHead(nn.Module, ABC):
    """A network that guesses tokens from the target's states.

    At position i it has the target's states of token i (those of `auxiliary_layers`), and its draft step k guesses
    token i + 2 + k, over a vocabulary of its own: `d2t` holds offsets, so that draft id j is target id j + d2t[j], and
    `t2d` marks the target ids that it has. Neither is saved where that vocabulary is the target's.
    """

    d2t: Tensor
    t2d: Tensor
    anchor: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config: Any = config
        self.lender: Lender | None = None
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

    @property
    def longest(self) -> int | None:
        """The most tokens that it can draft in a row; None: any number."""
        return None

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
    def fuse(self, auxiliary: Tensor) -> Tensor:
        """The target's states [..., layers * hidden] -> what the first draft step reads, [..., hidden]."""

    @abstractmethod
    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        """States of draft step `step` [..., hidden] -> [..., draft_vocab]."""

    @property
    def own_lm_heads(self) -> dict[str, nn.Linear]:
        """Its LM heads by the names of their modules, each over the draft vocabulary; none where it borrows."""
        return {}

    def borrow(self, target: Target) -> None:
        """Use the target's LM head, where the head has none of its own."""
        if not self.own_lm_heads:
            self.lender = Lender(target)

    @property
    def lending(self) -> Target:
        """The target whose LM head it uses."""
        if self.lender is None:
            raise UserError("the head has no LM head of its own; give it the target's with `head.borrow(target)`.")
        return self.lender.target

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

    Step k at position i reads a state (`fuse`d target states, then its own output) and the embedding of token i+1+k.
    """

    config: DecoderConfig

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.rope = Rotary(self.config.rope_parameters, self.config.head_dim, self.config.max_position_embeddings)

    @property
    @abstractmethod
    def attention(self) -> Attention:
        """Of its decoder layer."""

    @abstractmethod
    def mix(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """embeds, hidden: [batch, tokens, hidden] -> attention's input [batch, tokens, ...], and the residual."""

    @abstractmethod
    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: [batch, tokens, hidden], as `forward` returns it."""

    def forward(
        self,
        embeds: Tensor,
        hidden: Tensor,
        position_ids: Tensor,
        attend: Attend = attend_causally,
    ) -> Tensor:
        """One pass of the decoder layer.

        embeds, hidden: [batch, tokens, hidden]; hidden is `fuse`d target states, or this method's own output in later
        draft steps. position_ids: [batch, tokens], the position of the token whose state `hidden` is (the
        embedding is of the token after it).

        Returns:
            [batch, tokens, hidden]: give it to `logits`, and to the next draft step.
        """
        x, residual = self.mix(embeds, hidden)
        return self.finish(residual, self.attention(x, self.rope(position_ids, hidden.dtype), attend))
