"""Shapes and options of an EAGLE-3 head, under the keys of the config.json that vLLM and SGLang load."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from draft.errors import UserError
from draft.heads.decoder_config import DecoderConfig, check_fixed, decoder_json, fields_of, read_sizes, sizes_like
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


@dataclass(kw_only=True)
class Eagle3Config(DecoderConfig):
    """See the module; `auxiliary_layers` counts layers that have run, as `Target` does (vLLM's convention)."""

    draft_vocab_size: int
    norm_before_residual: bool = False  # the residual stream starts from the normed hidden state
    norm_before_fc: bool = False  # one norm over all auxiliary states together
    fc_norm: bool = False  # one norm for each auxiliary state
    norm_output: bool = False  # the next draft step reads the state after the final norm
    shared_lm_head: bool = False  # the target's; draft_vocab_size is null in the file
    auxiliary_layers: list[int] | None = None  # None: the target's default layers

    def __post_init__(self) -> None:
        if self.shared_lm_head and self.draft_vocab_size != self.vocab_size:
            raise UserError(
                f"head config: the LM head is the target's, over {self.vocab_size} tokens, and draft_vocab_size is "
                f"{self.draft_vocab_size}; a reduced vocabulary needs an LM head of its own."
            )

    @property
    def full_vocabulary(self) -> bool:
        """The draft vocabulary is the target's: engines then refuse a token map."""
        return self.draft_vocab_size == self.vocab_size

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
        config = cls(**sizes_like(target), draft_vocab_size=draft_vocab_size, **options)
        config.layers(target)  # refuses a target that has too few
        return config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Eagle3Config:
        """Read a config.json; refuses what changes the arithmetic and is not built here."""
        check_fixed(values, _FIXED)
        check_fixed(values.get("eagle_config") or {}, _FIXED_EAGLE, "eagle_config.")
        values = read_sizes(values)
        values["shared_lm_head"] = "draft_vocab_size" in values and values["draft_vocab_size"] is None
        values["draft_vocab_size"] = values.get("draft_vocab_size") or values.get("vocab_size")
        values.update({option: bool(values.get(option)) for option in OPTIONS})
        values["auxiliary_layers"] = read_layer_ids(values)
        return cls(**fields_of(cls, values, "EAGLE-3"))

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
        return {
            **decoder_json("LlamaForCausalLMEagle3", values, dtype),
            "norm_before_residual": self.norm_before_residual,
            **{option: True for option in OPTIONS[1:] if options[option]},
            **({} if layers is None else layer_id_keys(layers)),
        }


def layer_id_keys(layers: list[int]) -> dict[str, Any]:
    """config.json's keys for other auxiliary layers than the default, each reader's in its own convention."""
    return {
        "num_aux_hidden_states": len(layers),
        LAYER_IDS: list(layers),
        "eagle_config": {LAYER_IDS: [layer - 1 for layer in layers], "use_aux_hidden_state": True},
    }


def read_layer_ids(values: dict[str, Any]) -> list[int] | None:
    """The auxiliary layers that a config.json chooses, counted as layers that have run; None: the default ones.

    Raises:
        UserError: when the two spellings contradict each other, or only the one is there that engines read differently.
    """
    top = values.get(LAYER_IDS)
    nested = (values.get("eagle_config") or {}).get(LAYER_IDS)
    if not top:
        if not nested:
            return None
        raise UserError(
            f"head config: eagle_config.{LAYER_IDS} = {nested} is read by vLLM as the states entering these layers, "
            "and by SGLang as those leaving them; use `draft-train import --auxiliary-layers` with the layers that the "
            f"head was trained on: {_listed(nested)} as vLLM reads it, {_listed([i + 1 for i in nested])} as SGLang."
        )
    if nested and nested not in (top, [layer - 1 for layer in top]):
        raise UserError(
            f"head config: {LAYER_IDS} = {top} and eagle_config's = {nested} name different layers in every "
            "convention; correct the one that is wrong."
        )
    return list(top)


def check_layers(layers: list[int], num_layers: int) -> None:
    """Raises UserError unless `layers` rise and lie within 0..num_layers: engines sort them, and drop doubles."""
    rising = all(before < after for before, after in zip(layers, layers[1:], strict=False))
    if not layers or not rising or layers[0] < 0 or layers[-1] > num_layers:
        raise UserError(
            f"the head's auxiliary layers are {list(layers)} and the target has {num_layers} layers; they must rise, "
            f"from 0 at the lowest to {num_layers} at the highest."
        )


def _listed(layers: list[int]) -> str:
    return ",".join(str(layer) for layer in layers)
