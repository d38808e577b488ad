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

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from draft.errors import UserError
from draft.heads.base import Features, StepwiseHead
from draft.heads.config import STRICT, DecoderConfig, check_fixed, decoder_json, read_flag, read_sizes, sizes_like
from draft.heads.initial import (
    SCALES,
    SELF_ATTENTION_STD,
    Ridge,
    norm_weight,
    normed_states,
    split_product,
    start_mlp,
    widened,
)
from draft.heads.layers import MLP, Attention, RMSNorm
from draft.target import Target

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
# options that change the arithmetic, and are built here
OPTIONS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
# keys that change the arithmetic and are not: the only values that mean what is built here, absent ones aside
_FIXED: dict[str, tuple[Any, ...]] = {"bias": (False, None)}
# the same in eagle_config, where ModelOpt writes them
_FIXED_EAGLE: dict[str, tuple[Any, ...]] = {
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
}


@dataclass(kw_only=True, config=STRICT)
class Eagle3Config(DecoderConfig):
    """Shapes and options (see the module), under the keys of the config.json that vLLM and SGLang load.

    `auxiliary_layers` counts layers that have run, as `Target` does (vLLM's convention).
    """

    draft_vocab_size: PositiveInt
    norm_before_residual: bool = False  # the residual stream starts from the normed hidden state
    norm_before_fc: bool = False  # one norm over all auxiliary states together
    fc_norm: bool = False  # one norm for each auxiliary state
    norm_output: bool = False  # the next draft step reads the state after the final norm
    shared_lm_head: bool = False  # the target's; draft_vocab_size is null in the file
    auxiliary_layers: list[int] | None = None  # None: the target's default layers

    @property
    def num_auxiliary(self) -> int:
        return 3 if self.auxiliary_layers is None else len(self.auxiliary_layers)

    def layers(self, target: Target) -> tuple[int, ...]:
        """The layers of `target` whose auxiliary states the head reads.

        Raises:
            UserError: when the target has no such layers.
        """
        if self.auxiliary_layers is None:
            layers = target.default_auxiliary_layers
            if min(layers) < 0 or max(layers) > target.num_layers:
                raise UserError(
                    f"target {target.name!r} has {target.num_layers} layers, too few for the auxiliary layers 2, n/2 "
                    "and n-3 that an EAGLE-3 head reads by default; use a target of 3 layers or more."
                )
            return layers
        check_layers(self.auxiliary_layers, target.num_layers)
        return tuple(self.auxiliary_layers)

    @classmethod
    def for_target(cls, target: Target, draft_vocab_size: int, **options: Any) -> Eagle3Config:
        """A head of the target's own width; options: fields of this class."""
        config = cls.checked(**sizes_like(target), draft_vocab_size=draft_vocab_size, **options)
        config.layers(target)  # refuses a target that has too few
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Eagle3Config:
        """Read a config.json; refuses what changes the arithmetic and is not built here."""
        check_fixed(values, _FIXED)
        nested = values.get("eagle_config") or {}
        if not isinstance(nested, dict):
            raise UserError(f"head config: eagle_config is {nested!r}; it must be an object.")
        check_fixed(nested, _FIXED_EAGLE, "eagle_config.")
        values = read_sizes(values)
        values["shared_lm_head"] = "draft_vocab_size" in values and values["draft_vocab_size"] is None
        if values.get("draft_vocab_size") is None:
            values["draft_vocab_size"] = values.get("vocab_size")
        values.update({option: read_flag(values, option) for option in OPTIONS})
        values["auxiliary_layers"] = read_layer_ids(values)
        return cls.of_known(values)

    def as_json(self, dtype: torch.dtype) -> dict[str, Any]:
        """The whole config.json.

        Default layers are not written: they are the one thing that engines agree on. Others are written twice, since
        vLLM counts the layers that have run, and SGLang wants the id of the last one that has.
        """
        values = asdict(self)
        layers, shared = values.pop("auxiliary_layers"), values.pop("shared_lm_head")
        options = {option: values.pop(option) for option in OPTIONS}
        if shared:
            values["draft_vocab_size"] = None
        written = {
            **decoder_json("LlamaForCausalLMEagle3", values, dtype),
            "norm_before_residual": self.norm_before_residual,
            **{option: True for option in OPTIONS[1:] if options[option]},
        }
        if layers is not None:
            nested = {LAYER_IDS: [layer - 1 for layer in layers], "use_aux_hidden_state": True}
            written |= {"num_aux_hidden_states": len(layers), LAYER_IDS: list(layers), "eagle_config": nested}
        return written


def read_layer_ids(values: dict[str, Any]) -> list[int] | None:
    """The auxiliary layers that a config.json chooses, counted as layers that have run; None: the default ones.

    Raises:
        UserError: when the two spellings contradict each other, or only the one is there that engines read differently.
    """
    top = values.get(LAYER_IDS)
    nested = (values.get("eagle_config") or {}).get(LAYER_IDS)
    for ids in (top, nested):
        if ids and not (isinstance(ids, list) and all(type(layer) is int for layer in ids)):
            raise UserError(f"head config: {LAYER_IDS} = {ids!r}; it must be a list of layers' numbers.")
    if not top and nested:
        as_vllm, as_sglang = (",".join(str(layer + shift) for layer in nested) for shift in (0, 1))
        raise UserError(
            f"head config: eagle_config.{LAYER_IDS} = {nested} is read by vLLM as the states entering these layers, "
            "and by SGLang as those leaving them; use `draft-train import --auxiliary-layers` with the layers that the "
            f"head was trained on: {as_vllm} as vLLM reads it, {as_sglang} as SGLang."
        )
    if top and nested and nested not in (top, [layer - 1 for layer in top]):
        raise UserError(
            f"head config: {LAYER_IDS} = {top} and eagle_config's = {nested} name different layers in every "
            "convention; correct the one that is wrong."
        )
    return list(top) if top else None


def check_layers(layers: list[int], num_layers: int) -> None:
    """Refuse `layers` that don't rise or lie outside of 0..num_layers: engines sort them, and drop doubles."""
    rising = all(before < after for before, after in zip(layers, layers[1:], strict=False))
    if not layers or not rising or layers[0] < 0 or layers[-1] > num_layers:
        raise UserError(
            f"the head's auxiliary layers are {list(layers)} and the target has {num_layers} layers; they must rise, "
            f"from 0 at the lowest to {num_layers} at the highest."
        )


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


class Eagle3Head(StepwiseHead):
    """An EAGLE-3 head; its state dict has the names of the plain checkpoint format."""

    architecture = "eagle3"
    stored_as = "LlamaForCausalLMEagle3"
    config_class = Eagle3Config
    reduced_vocabulary = True
    options = (*OPTIONS, "shared_lm_head", "auxiliary_layers")
    tensor_renames = (("layers.0.", "midlayer."),)  # some trainers' name for the same layer; engines take both

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
    def lm_head_modules(self) -> dict[str, nn.Linear]:
        return {} if self.lm_head is None else {"lm_head": self.lm_head}

    def get_lm_head(self) -> nn.Module:
        """The LM head, its own or the target's."""
        return self.lm_head if self.lm_head is not None else self.shared_target.lm_head

    @property
    def attention(self) -> Attention:
        return self.midlayer.self_attn

    def auxiliary_layers(self, target: Target) -> tuple[int, ...]:
        return self.config.layers(target)

    def normed(self, auxiliary: Tensor) -> Tensor:
        """The auxiliary hidden states as `fc` reads them: [batch, tokens, layers * hidden], same shape."""
        if self.input_norm is not None:
            auxiliary = self.input_norm(auxiliary)
        if self.fc_norm is not None:
            states = auxiliary.chunk(len(self.fc_norm), dim=-1)
            auxiliary = torch.cat([norm(state) for norm, state in zip(self.fc_norm, states, strict=True)], dim=-1)
        return auxiliary

    def combine(self, auxiliary: Tensor) -> Tensor:
        """Auxiliary hidden states [batch, tokens, layers * hidden] -> [batch, tokens, hidden]."""
        return self.fc(self.normed(auxiliary))

    def mix(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.midlayer.hidden_norm(hidden)
        x = torch.cat([self.midlayer.input_layernorm(embeds), normed], dim=-1)  # [batch, tokens, 2 * hidden]
        return x, normed if self.midlayer.norm_before_residual else hidden

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """[batch, tokens, hidden], before the final norm but for norm_output."""
        hidden = residual + attended
        hidden = hidden + self.midlayer.mlp(self.midlayer.post_attention_layernorm(hidden))
        return self.norm(hidden) if self.config.norm_output else hidden

    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        if not self.config.norm_output:
            hidden = self.norm(hidden)
        if self.lm_head is not None:
            return self.lm_head(hidden)
        target = self.shared_target
        return target.lm_head(hidden.to(target.dtype)).to(hidden.dtype)

    @torch.no_grad()
    def initialise(self, target: Target, batches: Iterable[tuple[Features, Tensor]], seed: int) -> None:
        """Set the weights in place; see `draft.heads.initial`."""
        generator = torch.Generator().manual_seed(seed)
        batches = list(batches)
        if not batches:
            return
        layer, attention = self.midlayer, self.midlayer.self_attn
        for norm in (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm):
            norm.weight.fill_(1.0)

        fuse, dtype = Ridge(), self.fc.weight.dtype
        for features, mask in batches:
            auxiliary = self.normed(features.auxiliary[mask].to(dtype))
            fuse.add(widened(auxiliary), normed_states(target, features.last_hidden[mask]))
        self.fc.weight.copy_(fuse.solve())

        mix = Ridge()
        for features, mask in batches:
            following = mask[:, 1:]  # token t+1 exists
            hidden = self.combine(features.auxiliary[:, :-1][following].to(dtype))
            x, residual = self.mix(features.embeds[:, 1:][following].to(dtype), hidden)
            mix.add(x, normed_states(target, features.last_hidden[:, 1:][following]) - widened(residual))
        split_product(mix.solve(), attention.v_proj, attention.o_proj, attention.head_dim)

        size = self.config.hidden_size
        width = attention.k_proj.out_features
        both = torch.zeros(width, 2 * size)
        both[:, :size].normal_(std=SELF_ATTENTION_STD * (576 / size) ** 0.5, generator=generator)
        attention.k_proj.weight.copy_(both)
        groups = attention.q_proj.out_features // width
        heads = both.view(-1, attention.head_dim, 2 * size).repeat_interleave(groups, dim=0)
        attention.q_proj.weight.copy_(heads.reshape(-1, 2 * size))

        start_mlp(layer.mlp, layer.post_attention_layernorm, target, generator)
        if self.lm_head is not None:
            self.lm_head.weight.copy_(target.lm_head.weight[self.vocabulary.to(target.device)])
        self.norm.weight.copy_(norm_weight(target.decoder.norm, size))
        self.norm.weight.mul_(self._best_scale(target, *batches[0]))

    def _best_scale(self, target: Target, features: Features, mask: Tensor) -> float:
        """The factor on the head's logits that gives the least KL to the target."""
        dtype = self.fc.weight.dtype
        hidden = next(self.unroll(features.embeds.to(dtype), features.auxiliary.to(dtype), 1, attention_mask=mask))
        following = mask[:, 1:]  # token t+1 exists
        student = widened(self.logits(hidden[:, :-1][following]))
        teacher = widened(target.logits(features.last_hidden[:, 1:][following], self.vocabulary.to(target.device)))
        log_p = teacher.log_softmax(-1)

        def divergence(scale: float) -> float:
            log_q = (scale * student).log_softmax(-1)
            return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

        return min(SCALES, key=divergence)
