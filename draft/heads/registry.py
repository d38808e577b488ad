"""The one table of architectures: what the rest of the house does differently for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from draft.heads.eagle import EagleConfig, EagleHead
from draft.heads.eagle3 import Eagle3Head
from draft.heads.eagle3_config import Eagle3Config
from draft.heads.head import DraftHead
from draft.heads.medusa import MedusaConfig, MedusaHead
from draft.target import Target
from draft.training.features import Features
from draft.training.initial import initialise_eagle, initialise_eagle3, initialise_medusa
from draft.training.step import unroll, unroll_at_once

# the decoder layer's matrices: the LM head is most of the weights and has the target's rows already, and fc reads raw
# residual streams, whose outliers make an adapter on it unstable at rates that suit the others
_DECODER_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """How one kind of head is made, trained, judged, drafted with, and exchanged."""

    name: str  # what users call it
    stored_as: str  # `architectures` in the config.json of its folder
    config: Any  # its configuration class, with for_target and from_dict
    head: type[DraftHead]
    options: tuple[str, ...]  # fields of the configuration that a user may choose for a new head
    reduced_vocabulary: bool  # whether a new head has an LM head over fewer tokens than the target, unless told to
    renames: tuple[tuple[str, str], ...]  # (part of a tensor's name in some files, ours)
    # (head, target, (features, attention mask) of some rows, seed): a new head's first weights
    initialise: Callable[[Any, Target, Iterable[tuple[Features, Tensor]], int], None]
    # (head, embeds, auxiliary, steps, *, attention_mask, position_ids): states of each draft step, also in replay
    unroll: Callable[..., Iterator[Tensor]]
    feature_weight: float | None  # of the regression to the target's states in its loss; None: it doesn't guess them
    drafting: Literal["step by step", "at once"]  # the engine's proposer
    adapter_targets: Callable[[Any], tuple[str, ...]]  # layers that an adapter is put on


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture(
            name="eagle3",
            stored_as="LlamaForCausalLMEagle3",
            config=Eagle3Config,
            head=Eagle3Head,
            options=(
                "norm_before_residual",
                "norm_before_fc",
                "fc_norm",
                "norm_output",
                "shared_lm_head",
                "auxiliary_layers",
            ),
            reduced_vocabulary=True,
            renames=(("layers.0.", "midlayer."),),  # some trainers' name for the same layer; engines take both
            initialise=initialise_eagle3,
            unroll=unroll,
            feature_weight=None,
            drafting="step by step",
            adapter_targets=lambda head: _DECODER_LAYER,
        ),
        Architecture(
            name="eagle",
            stored_as="EagleLlamaForCausalLM",
            config=EagleConfig,
            head=EagleHead,
            options=("fc_bias", "qkv_bias"),
            reduced_vocabulary=False,
            renames=(),
            initialise=initialise_eagle,
            unroll=unroll,
            feature_weight=10.0,  # SafeAILab weighs regression 1 and cross-entropy 0.1
            drafting="step by step",
            adapter_targets=lambda head: _DECODER_LAYER,
        ),
        Architecture(
            name="medusa",
            stored_as="MedusaModel",
            config=MedusaConfig,
            head=MedusaHead,
            options=("num_heads", "num_layers", "shared_lm_head"),
            reduced_vocabulary=True,
            renames=(),
            initialise=initialise_medusa,
            unroll=unroll_at_once,
            feature_weight=None,
            drafting="at once",
            adapter_targets=lambda head: tuple(
                f"blocks.{block}.layers.{layer}"
                for block in range(head.config.num_heads)
                for layer in range(head.config.num_layers)
            ),
        ),
    )
}
DEFAULT = "eagle3"


def architecture_of(head: DraftHead) -> Architecture:
    """The entry of a head."""
    return next(each for each in ARCHITECTURES.values() if isinstance(head, each.head))


def stored_as(name: str) -> Architecture | None:
    """The entry whose heads' config.json has this architecture; None: no such one."""
    return next((each for each in ARCHITECTURES.values() if each.stored_as == name), None)
