"""The EAGLE-3 draft head (arXiv 2503.01840), with the tensor names and config keys that vLLM and SGLang load.

    fused      = fc(cat(low, mid, high auxiliary hidden states of token t))
    layer in   = cat(input_layernorm(embedding of token t+1), hidden_norm(fused))
    hidden     = fused + attention(layer in);  hidden = hidden + mlp(post_attention_layernorm(hidden))
    logits     = lm_head(norm(hidden))         over the draft vocabulary, predicting token t+2

The next draft step reads `hidden` (before the norm) in the place of `fused`, and the embedding of the token that was
just drafted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from draft.errors import UserError
from draft.heads.rotary import Rotary, rotate
from draft.target import Target


class KeyValueCache(Protocol):
    """What attention needs of a cache: store the new keys and values, give back all that may be attended to."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values: [batch, kv_heads, new, head_dim] -> [batch, kv_heads, past + new, head_dim]."""
        ...


@dataclass
class Eagle3Config:
    """Shapes of an EAGLE-3 head, under the keys of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # the target's
    draft_vocab_size: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    max_position_embeddings: int  # the target's
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @classmethod
    def for_target(cls, target: Target, draft_vocab_size: int) -> Eagle3Config:
        """A head of the target's own width.

        It has as many key-value heads as heads: the embedding reaches the residual stream through the values
        only, and a small target's grouped values are too narrow to carry a token's identity.
        """
        config = target.config
        eos = sorted(target.eos_token_ids)
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=dict(config.rope_parameters),
            max_position_embeddings=target.max_length,
            bos_token_id=config.bos_token_id,
            eos_token_id=eos[0] if eos else None,
            pad_token_id=config.pad_token_id,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Eagle3Config:
        """Read a config.json; refuses options that change the arithmetic and are not built here."""
        for flag in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias", "mlp_bias"):
            if values.get(flag):
                raise UserError(
                    f"head config: {flag} = {values[flag]!r} is not supported; use a head trained without it."
                )
        for key in ("eagle_aux_hidden_state_layer_ids", "eagle_config"):
            ids = values.get(key)
            ids = (ids or {}).get("eagle_aux_hidden_state_layer_ids") if key == "eagle_config" else ids
            if ids:
                raise UserError(
                    f"head config: auxiliary layers {ids} are chosen in {key}; only heads of the default layers "
                    "(2, n/2, n-3), which write none, are supported."
                )
        if values.get("num_hidden_layers", 1) != 1:
            raise UserError(f"head config: num_hidden_layers = {values['num_hidden_layers']}; use a head of one layer.")
        values = dict(values)
        heads = values.get("num_attention_heads", 1)
        values.setdefault("num_key_value_heads", heads)
        values["head_dim"] = values.get("head_dim") or values["hidden_size"] // heads
        values["draft_vocab_size"] = values.get("draft_vocab_size") or values.get("vocab_size")
        if not values.get("rope_parameters"):
            rope = values.get("rope_scaling") or {"rope_type": "default"}
            values["rope_parameters"] = {**rope, "rope_theta": values.get("rope_theta", 10000.0)}
        missing = [f.name for f in fields(cls) if f.name not in values and not f.name.endswith("_token_id")]
        if missing:
            raise UserError(
                f"head config: the keys {', '.join(missing)} are missing; this is not a whole EAGLE-3 config."
            )
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def as_json(self, dtype: torch.dtype) -> dict[str, Any]:
        """The whole config.json. No layer ids: the default layers are the one thing that engines agree on."""
        rope = dict(self.rope_parameters)
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            **asdict(self),
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "rope_theta": rope.get("rope_theta", 10000.0),
            "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "norm_before_residual": False,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Attention over cat(embedding, hidden), whose keys and values may come from a cache."""

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

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KeyValueCache | None, mask: Tensor | None
    ) -> Tensor:
        q, k, v = self.project(x, rotation)
        if cache is not None:
            k, v = cache.update(k, v)
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=k.shape[1] != q.shape[1]
        )
        return self.merge(mixed)

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

    def mix(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """embeds, hidden: [batch, tokens, hidden] -> the layer's input [batch, tokens, 2 * hidden]."""
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Both residual additions around attention's output: [batch, tokens, hidden]."""
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Head(nn.Module):
    """An EAGLE-3 head; its state dict has the names of the plain checkpoint format.

    `d2t` holds offsets: draft id i is target id i + d2t[i]. `t2d` marks the target ids that the draft vocabulary has.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = Midlayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.rope = Rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings)

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

    def fuse(self, auxiliary: Tensor) -> Tensor:
        """Auxiliary hidden states [batch, tokens, 3 * hidden] -> [batch, tokens, hidden]."""
        return self.fc(auxiliary)

    def forward(
        self,
        embeds: Tensor,
        hidden: Tensor,
        position_ids: Tensor,
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One pass of the decoder layer.

        embeds, hidden: [batch, tokens, hidden]; hidden is `fuse`d target states, or this method's own output in later
        draft steps. position_ids: [batch, tokens], the position of the token whose state `hidden` is (the
        embedding is of the token after it). mask: boolean, True = attend, [batch, 1, tokens, past + tokens]; None means
        causal, or everything for a single token.

        Returns:
            [batch, tokens, hidden], before the final norm: give it to `logits`, and to the next draft step.
        """
        layer = self.midlayer
        attended = layer.self_attn(layer.mix(embeds, hidden), self.rope(position_ids, hidden.dtype), cache, mask)
        return layer.finish(hidden, attended)

    def logits(self, hidden: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> [batch, tokens, draft_vocab]."""
        return self.lm_head(self.norm(hidden))
