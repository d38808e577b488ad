"""EAGLE-3 heads of other trainers: how their config.json and tensor names become those of the plain format."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft.errors import UserError
from draft.heads.eagle3 import LAYER_IDS, Eagle3Head, check_layers, read_layer_ids
from draft.interop.checks import SGLANG, SPECULATORS, VLLM, TargetShape, complete_token_map, target_tensor
from draft.interop.formats import Format, Limits, own_config, own_tensors, sglang, vllm
from draft.interop.sources import Checkpoint, Source, check_sizes, complete_layer, drop_embedding, is_the_targets
from draft.target import Target

_PLAIN = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
# (part of a foreign name, ours), in this order
_RENAMES = (
    ("layers.0.", "midlayer."),
    ("aux_norm_low.", "fc_norm.0."),
    ("aux_norm_mid.", "fc_norm.1."),
    ("aux_norm_high.", "fc_norm.2."),
)
# tensors that hold nothing of the head: copies of the target's, and tables that are computed
_LEFT_OUT = ("verifier_lm_head.weight", "verifier_norm.weight", "midlayer.self_attn.rotary_emb.inv_freq")


def _source(
    name: str,
    recognise: Callable[[Checkpoint], bool],
    translate: Callable[[Checkpoint], dict[str, Any]],
    *,
    copies_lm_head: bool = False,
) -> Source:
    """translate: a config to the plain format's keys; copies_lm_head: it has no word for a borrowed one, but a copy."""

    def bring(found: Checkpoint, target: Target, auxiliary_layers: list[int] | None) -> dict[str, Any]:
        values = translate(found)
        found.tensors = _renamed(found)
        values = _with_layers(values, auxiliary_layers, target, found.notes)
        drop_embedding(found, target)
        if copies_lm_head:
            _drop_copied_lm_head(found, target)
        width = values.get("target_hidden_size") or values.get("hidden_size")
        check_sizes(
            found,
            (
                ("hidden size", values.get("hidden_size"), target.hidden_size),
                ("target_hidden_size", width, target.hidden_size),
                ("vocabulary", values.get("vocab_size"), target.vocab_size),
            ),
        )
        _complete_lm_head(values, found, target)
        complete_layer(values, found, target)
        complete_token_map(found, values)
        return values

    return Source(name, recognise, bring)


def _is_speculators(found: Checkpoint) -> bool:
    return "speculators_model_type" in found.config or "speculators_config" in found.config


def _from_speculators(found: Checkpoint) -> dict[str, Any]:
    """The decoder layer's configuration with the head's own keys over it."""
    config = found.config
    kind, inner = config.get("speculators_model_type"), config.get("transformer_layer_config") or {}
    if kind != "eagle3" or inner.get("model_type", "llama") != "llama":
        raise UserError(
            f"{str(found.folder)!r}: speculators_model_type = {kind!r} over a layer of {inner.get('model_type')!r}; "
            "only 'eagle3' over 'llama' is supported."
        )
    if "norm_before_residual" not in config:
        raise UserError(
            f"{str(found.folder)!r}: config.json has no norm_before_residual, which vLLM then takes for true and "
            "speculators for false; add the value that the head was trained with."
        )
    own = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    kept = {key: config[key] for key in own if config.get(key) is not None}
    layers = {LAYER_IDS: config[LAYER_IDS]} if config.get(LAYER_IDS) else {}
    return {**inner, **kept, **layers}


def _is_plain(found: Checkpoint) -> bool:
    return (found.config.get("architectures") or [""])[0] in _PLAIN


def _is_original(found: Checkpoint) -> bool:
    return any("midlayer." in name for name in found.tensors)


def _from_plain(found: Checkpoint) -> dict[str, Any]:
    values = dict(found.config)
    nested = values.get("eagle_config") or {}
    if "norm_before_fc" in nested:  # which engines read first
        values["norm_before_fc"] = nested["norm_before_fc"]
    if values.get("use_aux_norm"):  # SGLang's older name
        values["fc_norm"] = True
    return values


def _renamed(found: Checkpoint) -> dict[str, Tensor]:
    tensors = {}
    for name, value in found.tensors.items():
        name = name.removeprefix("model.")
        for theirs, ours in _RENAMES:
            name = name.replace(theirs, ours, 1)
        if name in _LEFT_OUT:
            found.notes.append(f"left out {name}: it is not the head's.")
        else:
            tensors[name] = value
    return tensors


def _with_layers(values: dict[str, Any], chosen: list[int] | None, target: Target, notes: list[str]) -> dict[str, Any]:
    """Settle the auxiliary layers: the user's word, or the one reading that gives the target's default layers."""
    values = dict(values)
    default = list(target.default_auxiliary_layers)
    nested = dict(values.get("eagle_config") or {})
    leaving = [layer - 1 for layer in default]
    if chosen is not None:
        check_layers(chosen, target.num_layers)
        values[LAYER_IDS] = chosen
        nested.pop(LAYER_IDS, None)
    elif not values.get(LAYER_IDS) and nested.get(LAYER_IDS) in (default, leaving):
        way = "entering" if nested[LAYER_IDS] == default else "leaving"
        notes.append(
            f"took the layers {nested[LAYER_IDS]} of eagle_config for the default ones, as the states {way} them."
        )
        values[LAYER_IDS] = default
        nested.pop(LAYER_IDS)
    elif values.get(LAYER_IDS) == leaving:
        notes.append(
            f"{LAYER_IDS} = {leaving} is what vLLM would read, and also how other trainers write the default layers "
            f"{default}; if the head drafts badly, import it with --auxiliary-layers {','.join(map(str, default))}."
        )
    values["eagle_config"] = nested
    if values.get(LAYER_IDS) and read_layer_ids(values) == default:
        values[LAYER_IDS] = None
        nested.pop(LAYER_IDS, None)
    return values


def _complete_lm_head(values: dict[str, Any], found: Checkpoint, target: Target) -> None:
    """Whose LM head it is: its own where the file has one, else the target's, if over its whole vocabulary."""
    own, size = found.tensors.get("lm_head.weight"), values.get("draft_vocab_size")
    tied = bool(target.config.tie_word_embeddings)
    if values.get("tie_word_embeddings") and (own is not None or not tied):
        raise UserError(
            f"{str(found.folder)!r}: tie_word_embeddings = true means the embedding for SGLang and the file's or the "
            "target's LM head for vLLM; set it to false beside an LM head of the head's own."
        )
    if own is not None:
        if size is None:
            values["draft_vocab_size"] = len(own)
            found.notes.append(f"filled in draft_vocab_size = {len(own)}, the rows of lm_head.weight.")
        return
    if size not in (None, target.vocab_size):
        raise UserError(
            f"{str(found.folder)!r}: lm_head.weight is missing, and draft_vocab_size is {size} where the target's LM "
            f"head has {target.vocab_size} rows; a reduced vocabulary needs an LM head of its own."
        )
    values["draft_vocab_size"] = None
    found.notes.append("the file has no LM head: the target's is used.")


def _drop_copied_lm_head(found: Checkpoint, target: Target) -> None:
    own = found.tensors.get("lm_head.weight")
    if own is not None and is_the_targets(own, target):
        del found.tensors["lm_head.weight"]
        found.notes.append("left out lm_head.weight: it is the target's.")


EAGLE3_SOURCES = (
    _source("speculators eagle3", _is_speculators, _from_speculators, copies_lm_head=True),
    _source("plain EAGLE-3 of SGLang and vLLM", _is_plain, _from_plain),
    _source("SafeAILab EAGLE-3", _is_original, _from_plain),
)


# The formats that EAGLE-3 heads are written in.


SPECULATORS_VERSION = "0.9.0"


def _speculators_tensors(head: Eagle3Head, target: TargetShape) -> dict[str, Tensor]:
    """speculators 0.9.0 leaves what a file lacks uninitialised, though it means to take it from the target."""
    tensors = {name.replace("midlayer", "layers.0", 1): value for name, value in own_tensors(head, target).items()}
    tensors["embed_tokens.weight"] = target_tensor(target.path, ("embed_tokens.weight",)).to(head.dtype)
    if head.lm_head is None:
        lm_head = target_tensor(target.path, ("lm_head.weight", "embed_tokens.weight"))
        tensors["lm_head.weight"] = lm_head.to(head.dtype)
    return tensors


# what a speculators config.json says at its top, beside the decoder layer's configuration
_OF_THE_HEAD = ("draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", LAYER_IDS)


def _speculators_config(head: Eagle3Head, dtype: torch.dtype, target: TargetShape, length: int) -> dict[str, Any]:
    """No model_type at the top: by that vLLM knows the format. False flags are written too: defaults differ."""
    plain = head.config.as_json(dtype)
    inside = {key: value for key, value in plain.items() if key not in (*_OF_THE_HEAD, "architectures", "eagle_config")}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": length,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": target.path, "architectures": [target.architecture]},
        },
        "draft_vocab_size": head.config.draft_vocab_size,
        "norm_before_residual": head.config.norm_before_residual,
        "norm_before_fc": head.config.norm_before_fc,
        "fc_norm": head.config.fc_norm,
        "norm_output": head.config.norm_output,
        LAYER_IDS: head.config.auxiliary_layers,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": inside,
        "torch_dtype": plain["torch_dtype"],
    }


def _flat_speculators(config: dict[str, Any]) -> dict[str, Any]:
    """As vLLM's SpeculatorsConfig lays it flat."""
    return {**config["transformer_layer_config"], **{key: config[key] for key in _OF_THE_HEAD}}


def _vllm_alone(out: Path, target: TargetShape, length: int) -> str:
    return shlex.join(["vllm", "serve", str(out)])


def _llama_cpp(out: Path, target: TargetShape, length: int) -> str:
    command = ["python", "convert_hf_to_gguf.py", str(out), "--target-model-dir", target.path, "--outtype", "bf16"]
    return shlex.join(command)


_LLAMA_CPP = "llama.cpp (conversion)"
# option of a head (in its config.json) -> what llama.cpp b11434 does with it, by its converter and its `eagle3.cpp`
_LACKING: dict[Callable[[dict[str, Any]], Any], str] = {
    lambda config: config.get("fc_norm"): "its converter knows no fc_norm",
    lambda config: config.get("norm_output"): "it drafts on from the state before the final norm, and this head from "
    "the one after it (norm_output)",
    lambda config: config.get(LAYER_IDS) and len(config[LAYER_IDS]) != 3: "it reads three auxiliary layers",
}
# with a random head of each other option b11434 drafted our tokens, every one; that was compared by hand
_UNTRIED: dict[Callable[[dict[str, Any]], Any], str] = {
    lambda config: config.get("rope_scaling"): "a scaled rotary embedding",
}


def _llama_cpp_limits(config: dict[str, Any]) -> Limits:
    lacking = [reason for has, reason in _LACKING.items() if has(config)]
    untried = [option for has, option in _UNTRIED.items() if has(config)]
    return lacking, [f"{option}: not verified with it, only read in its source" for option in untried]


_VLLM, _SGLANG = vllm("eagle3"), sglang("EAGLE3")

EAGLE3_FORMATS = {
    "plain": Format(
        own_tensors,
        own_config,
        (*VLLM, *SGLANG),
        lambda head: {"vLLM": _VLLM, "SGLang": _SGLANG, _LLAMA_CPP: _llama_cpp},
        limits={_LLAMA_CPP: _llama_cpp_limits},
    ),
    "vllm": Format(own_tensors, own_config, VLLM, lambda head: {"vLLM": _VLLM}),
    "sglang": Format(own_tensors, own_config, SGLANG, lambda head: {"SGLang": _SGLANG}),
    "speculators": Format(
        _speculators_tensors,
        _speculators_config,
        SPECULATORS,
        lambda head: {"vLLM": _vllm_alone},
        flat=_flat_speculators,
    ),
}
