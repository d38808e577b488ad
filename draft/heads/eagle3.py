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

import torch
from torch import Tensor, nn

from draft.heads.eagle3_config import Eagle3Config
from draft.heads.head import StepwiseHead
from draft.heads.layers import MLP, Attention, RMSNorm
from draft.target import Target


class Midlayer(nn.Module):
    """The head's one decoder layer."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, 2 * config.hidden_size)
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


class Eagle3Head(StepwiseHead):
    """An EAGLE-3 head; its state dict has the names of the plain checkpoint format."""

    config: Eagle3Config

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        size, count, eps = config.hidden_size, config.num_auxiliary, config.rms_norm_eps
        self.input_norm = RMSNorm(count * size, eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList([RMSNorm(size, eps) for _ in range(count)]) if config.fc_norm else None
        self.fc = nn.Linear(count * size, size, bias=False)
        self.midlayer = Midlayer(config)
        self.norm = RMSNorm(size, eps)
        self.lm_head = None if config.shared_lm_head else nn.Linear(size, config.draft_vocab_size, bias=False)

    @property
    def own_lm_heads(self) -> dict[str, nn.Linear]:
        return {} if self.lm_head is None else {"lm_head": self.lm_head}

    @property
    def attention(self) -> Attention:
        return self.midlayer.self_attn

    def auxiliary_layers(self, target: Target) -> tuple[int, ...]:
        return self.config.layers(target)

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

    def mix(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.midlayer.mix(embeds, hidden)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """[batch, tokens, hidden], before the final norm but for norm_output."""
        hidden = self.midlayer.finish(residual, attended)
        return self.norm(hidden) if self.config.norm_output else hidden

    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        if not self.config.norm_output:
            hidden = self.norm(hidden)
        if self.lm_head is not None:
            return self.lm_head(hidden)
        target = self.lending
        return target.lm_head(hidden.to(target.dtype)).to(hidden.dtype)
