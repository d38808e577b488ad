"""The EAGLE-1 draft head (arXiv 2401.15077), with the tensor names that vLLM and SGLang load.

    fused      = fc(cat(embedding of token t+1, last hidden state of token t))     after the target's final norm
    hidden     = fused + attention(fused);  hidden = hidden + mlp(post_attention_layernorm(hidden))
    logits     = the target's LM head on hidden, predicting token t+2

`hidden` predicts the target's last hidden state at token t+1, and the next draft step reads it in that place,
with the embedding of the token that was just drafted. The layer has no norm of its input. (SafeAILab's
`eagle/model/cnets1.py`, vLLM's `llama_eagle.py`.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, cast

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from draft.heads.base import Features, StepwiseHead
from draft.heads.config import STRICT, DecoderConfig, decoder_json, read_flag, read_sizes, sizes_like
from draft.heads.initial import SILENT, Ridge, start_mlp
from draft.heads.layers import MLP, Attention, RMSNorm
from draft.target import Target


@dataclass(kw_only=True, config=STRICT)
class EagleConfig(DecoderConfig):
    """Shapes and options, under the keys of vLLM's config.json."""

    fc_bias: bool = False  # SafeAILab's older heads and SGLang have one; vLLM hasn't
    qkv_bias: bool = False  # of queries, keys and values, as in heads for Qwen2

    @property
    def draft_vocab_size(self) -> int:  # type: ignore[override]
        """The LM head is the target's, and so is the vocabulary."""
        return self.vocab_size

    @classmethod
    def for_target(cls, target: Target, draft_vocab_size: int, **options: Any) -> EagleConfig:
        """A head of the target's own width, over its whole vocabulary; options: fields of this class."""
        return cls.checked(**sizes_like(target), **options)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EagleConfig:
        """Read a config.json; refuses what changes the arithmetic and is not built here."""
        values = read_sizes(values)
        values["fc_bias"] = read_flag(values, "eagle_fc_bias")
        values["qkv_bias"] = read_flag(values, "qkv_bias")
        return cls.of_known(values)

    def as_json(self, dtype: torch.dtype) -> dict[str, Any]:
        # not `bias`, SafeAILab's word for fc's: vLLM and SGLang take it for attention's
        values = asdict(self)
        fc_bias = values.pop("fc_bias")
        return {**decoder_json("EagleLlamaForCausalLM", values, dtype), **({"eagle_fc_bias": True} if fc_bias else {})}


class EagleLayer(nn.Module):
    """The decoder layer, Llama's without a norm of its input."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size, bias=config.qkv_bias)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)


class EagleHead(StepwiseHead):
    """An EAGLE-1 head; its state dict has the names that vLLM loads."""

    architecture = "eagle"
    stored_as = "EagleLlamaForCausalLM"
    config_class = EagleConfig
    options = ("fc_bias", "qkv_bias")
    reduced_vocabulary = False
    feature_weight = 10.0  # SafeAILab weighs regression 1 and cross-entropy 0.1

    config: EagleConfig

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.fc_bias)
        self.layers = nn.ModuleList([EagleLayer(config)])

    @property
    def layer(self) -> EagleLayer:
        return cast(EagleLayer, self.layers[0])

    @property
    def attention(self) -> Attention:
        return self.layer.self_attn

    def auxiliary_layers(self, target: Target) -> tuple[int, ...]:
        return (target.output_layer,)

    def combine(self, auxiliary: Tensor) -> Tensor:
        return auxiliary

    def mix(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        fused = self.fc(torch.cat([embeds, hidden], dim=-1))
        return fused, fused

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """[batch, tokens, hidden], as the target's own last hidden states are."""
        hidden = residual + attended
        return hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden))

    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        target = self.shared_target
        return target.logits(hidden.to(target.dtype)).to(hidden.dtype)

    @torch.no_grad()
    def initialise(self, target: Target, batches: Iterable[tuple[Features, Tensor]], seed: int) -> None:
        """Set the weights in place; see `draft.heads.initial`."""
        generator = torch.Generator().manual_seed(seed)
        batches, fc = list(batches), Ridge()
        if not batches:
            return
        for features, mask in batches:
            following = mask[:, 1:]  # token t+1 exists
            embeds, states = features.embeds[:, 1:][following], features.last_hidden[:, :-1][following]
            fc.add(torch.cat([embeds, states], dim=-1).float(), features.last_hidden[:, 1:][following].float())
        self.fc.weight.copy_(fc.solve())
        layer = self.layer
        layer.self_attn.o_proj.weight.normal_(std=SILENT, generator=generator)
        start_mlp(layer.mlp, layer.post_attention_layernorm, target, generator)
        for bias in (self.fc.bias, *(getattr(layer.self_attn, name).bias for name in ("q_proj", "k_proj", "v_proj"))):
            if bias is not None:
                bias.zero_()
