"""Export: a head as the folder that another engine loads, checked against that engine's rules before it is written."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from draft.checkpoint import HEAD_FILES, atomic_folder, load_head, write_json
from draft.errors import UserError
from draft.heads import Eagle3Head
from draft.heads.eagle3_config import LAYER_IDS
from draft.interop.rules import (
    SGLANG,
    SPECULATORS,
    VLLM,
    Rule,
    TargetShape,
    default_layers_elsewhere,
    problems,
)
from draft.interop.served_targets import accepted_by
from draft.interop.target_shape import target_shape, target_tensor

SPECULATORS_VERSION = "0.9.0"


@dataclass(frozen=True)
class Exported:
    """What an export did."""

    folder: Path
    commands: dict[str, str]  # engine -> how to serve the target with the head
    notes: list[str]  # which engines accept such a target


Build = Callable[[Eagle3Head, torch.dtype, TargetShape, int], dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """How a format names the decoder layer, builds its config.json and is judged, and who serves it."""

    layer: str
    copies: bool  # whether the target's tensors that the head shares are written too
    config: Build
    flat: Callable[[dict[str, Any]], dict[str, Any]]  # config.json -> the plain keys that the rules speak of
    rules: tuple[Rule, ...]
    commands: dict[str, Callable[[Path, TargetShape, int], str]]


def export_head(
    head: str | Path, format: str, out: str | Path, *, target: str | None = None, speculation_length: int = 3
) -> Exported:
    """Write the head in folder `head` to the folder `out` for other engines, bit for bit in its own dtype.

    target: its name, by default the one that the head was made for; only its config.json is read.
    speculation_length: drafted tokens in the commands, and in the speculators format's config.json.

    Raises:
        UserError: naming everything that an engine of this format would stumble over; nothing is written then.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format!r} is unknown; choose one of {', '.join(FORMATS)}.")
    loaded, about = load_head(head)
    name = target or about.get("target")
    if not name:
        raise UserError(f"head {str(head)!r} does not say which target it was made for; pass --target.")
    shape, how, out = target_shape(name), FORMATS[format], Path(out)
    dtype = loaded.fc.weight.dtype
    config = how.config(loaded, dtype, shape, speculation_length)
    tensors = _tensors(loaded, how.layer)
    if how.copies:
        tensors |= _copies(loaded, shape)
    found = problems(how.rules, how.flat(config), tensors, shape)
    if found:
        raise UserError(f"head {str(head)!r} can't be exported as {format}: {'; '.join(found)}.")
    with atomic_folder(out, HEAD_FILES) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o644)
        write_json(temporary / "config.json", config)
        write_json(temporary / "draftsmith.json", about)  # other engines don't read it; an import keeps it
    commands = {engine: command(out, shape, speculation_length) for engine, command in how.commands.items()}
    return Exported(out, *accepted_by(commands, shape.architecture, about))


def _tensors(head: Eagle3Head, layer: str) -> dict[str, Tensor]:
    return {
        name.replace("midlayer", layer, 1): value.detach().cpu().contiguous()
        for name, value in head.state_dict().items()
    }


def _copies(head: Eagle3Head, target: TargetShape) -> dict[str, Tensor]:
    """speculators 0.9.0 leaves what a file lacks uninitialised, though it means to take it from the target."""
    dtype = head.fc.weight.dtype
    copies = {"embed_tokens.weight": target_tensor(target.path, ("embed_tokens.weight",)).to(dtype)}
    if head.lm_head is None:
        copies["lm_head.weight"] = target_tensor(target.path, ("lm_head.weight", "embed_tokens.weight")).to(dtype)
    return copies


def _plain_config(head: Eagle3Head, dtype: torch.dtype, target: TargetShape, length: int) -> dict[str, Any]:
    return head.config.as_json(dtype)


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


def _vllm(out: Path, target: TargetShape, length: int) -> str:
    speculative = {"method": "eagle3", "model": str(out), "num_speculative_tokens": length}
    return shlex.join(["vllm", "serve", target.path, "--speculative-config", json.dumps(speculative)])


def _vllm_alone(out: Path, target: TargetShape, length: int) -> str:
    return shlex.join(["vllm", "serve", str(out)])


def _sglang(out: Path, target: TargetShape, length: int) -> str:
    command = ["python", "-m", "sglang.launch_server", "--model-path", target.path]
    command += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(out)]
    command += ["--speculative-num-steps", str(length), "--speculative-eagle-topk", "1"]
    return shlex.join([*command, "--speculative-num-draft-tokens", str(length + 1)])


def _llama_cpp(out: Path, target: TargetShape, length: int) -> str:
    command = ["python", "convert_hf_to_gguf.py", str(out), "--target-model-dir", target.path, "--outtype", "bf16"]
    return shlex.join(command)


def _as_it_is(config: dict[str, Any]) -> dict[str, Any]:
    return config


FORMATS = {
    "plain": Format(
        "midlayer",
        False,
        _plain_config,
        _as_it_is,
        (*VLLM, *SGLANG, default_layers_elsewhere),
        {"vLLM": _vllm, "SGLang": _sglang, "llama.cpp (conversion)": _llama_cpp},
    ),
    "vllm": Format("midlayer", False, _plain_config, _as_it_is, VLLM, {"vLLM": _vllm}),
    "sglang": Format("midlayer", False, _plain_config, _as_it_is, SGLANG, {"SGLang": _sglang}),
    "speculators": Format("layers.0", True, _speculators_config, _flat_speculators, SPECULATORS, {"vLLM": _vllm_alone}),
}
