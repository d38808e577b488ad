"""The EAGLE-3 draft head (arXiv 2503.01840), with the tensor names and config keys that vLLM and SGLang load.

    fused      = fc(cat(low, mid, high auxiliary hidden states of token t))
    layer in   = cat(input_layernorm(embedding of token t+1), hidden_norm(fused))
    hidden     = fused + attention(layer in);  hidden = hidden + mlp(post_attention_layernorm(hidden))
    logits     = lm_head(norm(hidden))         over the draft vocabulary, predicting token t+2

The next draft step reads `hidden` (before the norm) in the place of `fused`, and the embedding of the token that was
just drafted. Options of the configuration change that:

    norm_before_fc         fc(input_norm(cat(...)))
    fc_norm                fc(cat(fc_norm[0](low), fc_norm[1](mid), ...)); with norm_output this is EAGLE-3.1
    norm_before_residual   hidden = hidden_norm(fused) + attention(layer in)
    norm_output            the next draft step reads norm(hidden)
    shared_lm_head         lm_head is the target's
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from draft.errors import UserError
from draft.heads.eagle3_config import Eagle3Config
from draft.heads.rotary import Rotary, rotate
from draft.target import Target


class Attend(Protocol):
    """How queries find their keys and values: where a head decodes, an engine's cache keeps those of the past."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [batch, heads, new, d], key, value [batch, kv_heads, new, d] -> [batch, new, heads, d]."""
        ...


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Within a text that is read in one piece; shapes as in `Attend`."""
    mixed = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
    )
    return mixed.transpose(1, 2)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Attention over cat(embedding, hidden)."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [batch, tokens, 2 * hidden] -> rotated queries, rotated keys, values: [batch, heads, tokens, head_dim]."""
        q, k, v = (self._split(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, rotation), rotate(k, rotation), v

    def merge(self, mixed: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim] -> [batch, tokens, hidden]."""
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        return self.o_proj(attend(*self.project(x, rotation)).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Midlayer(nn.Module):
    """The head's one decoder layer."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.norm_before_residual = config.norm_before_residual

    def mix(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """embeds, hidden: [batch, tokens, hidden] -> attention's input [batch, tokens, 2 * hidden], the residual."""
        normed = self.hidden_norm(hidden)
        x = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        return x, normed if self.norm_before_residual else hidden

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Both residual additions around attention's output: [batch, tokens, hidden]."""
        hidden = residual + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Lender:
    """A target that lends its LM head; copies of a head, however deep, borrow from the same one."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __deepcopy__(self, memo: object) -> Lender:
        return self


class Eagle3Head(nn.Module):
    """An EAGLE-3 head; its state dict has the names of the plain checkpoint format.

    `d2t` holds offsets: draft id i is target id i + d2t[i]. `t2d` marks the target ids that the draft vocabulary has.
    Neither is saved where the draft vocabulary is the whole one.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        size, count, eps = config.hidden_size, config.num_auxiliary, config.rms_norm_eps
        self.input_norm = RMSNorm(count * size, eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList([RMSNorm(size, eps) for _ in range(count)]) if config.fc_norm else None
        self.fc = nn.Linear(count * size, size, bias=False)
        self.midlayer = Midlayer(config)
        self.norm = RMSNorm(size, eps)
        self.lm_head = None if config.shared_lm_head else nn.Linear(size, config.draft_vocab_size, bias=False)
        self.lender: Lender | None = None
        full = config.full_vocabulary
        d2t, t2d = torch.zeros(config.draft_vocab_size, dtype=torch.int64), torch.full((config.vocab_size,), full)
        self.register_buffer("d2t", d2t, persistent=not full)
        self.register_buffer("t2d", t2d, persistent=not full)
        self.rope = Rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings)

    def auxiliary_layers(self, target: Target) -> tuple[int, ...]:
        """The layers of `target` whose states `fuse` takes, in its order."""
        return self.config.layers(target)

    def borrow(self, target: Target) -> None:
        """Use the target's LM head, where the head has none of its own."""
        if self.lm_head is None:
            self.lender = Lender(target)

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

    def normed(self, auxiliary: Tensor) -> Tensor:
        """What `fc` reads of auxiliary hidden states: [batch, tokens, layers * hidden], same shape."""
        if self.input_norm is not None:
            auxiliary = self.input_norm(auxiliary)
        if self.fc_norm is not None:
            states = auxiliary.chunk(len(self.fc_norm), dim=-1)
            auxiliary = torch.cat([norm(state) for norm, state in zip(self.fc_norm, states, strict=True)], dim=-1)
        return auxiliary

    def fuse(self, auxiliary: Tensor) -> Tensor:
        """Auxiliary hidden states [batch, tokens, layers * hidden] -> [batch, tokens, hidden]."""
        return self.fc(self.normed(auxiliary))

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
            [batch, tokens, hidden], before the final norm but for norm_output: give it to `logits`, and to the next
            draft step.
        """
        layer = self.midlayer
        x, residual = layer.mix(embeds, hidden)
        return self.finish(residual, layer.self_attn(x, self.rope(position_ids, hidden.dtype), attend))

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: [batch, tokens, hidden], as `forward` returns it."""
        hidden = self.midlayer.finish(residual, attended)
        return self.norm(hidden) if self.config.norm_output else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> [batch, tokens, draft_vocab]."""
        if not self.config.norm_output:
            hidden = self.norm(hidden)
        if self.lm_head is not None:
            return self.lm_head(hidden)
        if self.lender is None:
            raise UserError("the head has no LM head of its own; give it the target's with `head.borrow(target)`.")
        target = self.lender.target
        return target.lm_head(hidden.to(target.dtype)).to(hidden.dtype)
