"""The formats that EAGLE-3 heads are written in."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft.heads.eagle3 import Eagle3Head
from draft.heads.eagle3_config import LAYER_IDS
from draft.interop.formats import Format, Limits, own_config, own_tensors, sglang, vllm
from draft.interop.rules import SGLANG, SPECULATORS, VLLM, TargetShape
from draft.interop.target_shape import target_tensor

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
