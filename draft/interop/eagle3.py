"""EAGLE-3 heads of other trainers and for other engines."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draft.errors import UserError
from draft.heads.eagle3 import LAYER_IDS, Eagle3Head, check_layers, read_layer_ids
from draft.interop import formats
from draft.interop.formats import Checkpoint, Command, Format, Rule, Shapes, Source, TargetShape
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
    """translate: a config to the plain format's keys; copies_lm_head: a shared LM head is in the file, as a copy."""

    def bring(found: Checkpoint, target: Target, auxiliary_layers: list[int] | None) -> dict[str, Any]:
        values = translate(found)
        found.tensors = _renamed(found)
        values = _with_layers(values, auxiliary_layers, target, found.notes)
        formats.drop_embedding(found, target)
        lm_head = found.tensors.get("lm_head.weight")
        if copies_lm_head and lm_head is not None and formats.is_the_targets(lm_head, target):
            del found.tensors["lm_head.weight"]
            found.notes.append("left out lm_head.weight: it is the target's.")
        width = values.get("target_hidden_size") or values.get("hidden_size")
        formats.check_sizes(
            found,
            ("hidden size", values.get("hidden_size"), target.hidden_size),
            ("target_hidden_size", width, target.hidden_size),
            ("vocabulary", values.get("vocab_size"), target.vocab_size),
        )
        _complete_lm_head(values, found, target)
        formats.complete_layer(values, found, target)
        formats.complete_token_map(found, values)
        return values

    return Source(name, recognise, bring)


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
    """Settle the auxiliary layers: the user's choice, or the one reading that gives the target's default layers."""
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
    """Settle the LM head: the file's where it has one, else the target's, if over its whole vocabulary."""
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


EAGLE3_SOURCES = (
    _source(
        "speculators eagle3",
        lambda found: "speculators_model_type" in found.config or "speculators_config" in found.config,
        _from_speculators,
        copies_lm_head=True,
    ),
    _source("plain EAGLE-3 of SGLang and vLLM", lambda found: formats.architecture_of(found) in _PLAIN, _from_plain),
    _source("SafeAILab EAGLE-3", lambda found: any("midlayer." in name for name in found.tensors), _from_plain),
)


SPECULATORS_VERSION = "0.9.0"


def _speculators_tensors(head: Eagle3Head, target: TargetShape) -> dict[str, Tensor]:
    """speculators 0.9.0 leaves what a file lacks uninitialised, though it means to take it from the target."""
    tensors = {
        name.replace("midlayer", "layers.0", 1): value for name, value in formats.own_tensors(head, target).items()
    }
    tensors["embed_tokens.weight"] = formats.target_tensor(target.path, "embed_tokens.weight").to(head.dtype)
    if head.lm_head is None:
        lm_head = formats.target_tensor(target.path, "lm_head.weight", "embed_tokens.weight")
        tensors["lm_head.weight"] = lm_head.to(head.dtype)
    return tensors


# keys at the top of a speculators config.json, beside the decoder layer's configuration
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


def _expected_shapes(config: dict[str, Any], layer: str) -> Shapes:
    """The tensors that engines take for a plain config.json; `layer`: name of the decoder layer."""
    size, vocab, draft_vocab = config["hidden_size"], config["vocab_size"], config.get("draft_vocab_size")
    # both engines size fc by these keys: they don't look at the top-level list
    nested = (config.get("eagle_config") or {}).get(LAYER_IDS)
    count = config.get("num_aux_hidden_states") or (len(nested) if nested else 3)
    shapes: Shapes = {
        "fc.weight": (size, count * size),
        f"{layer}.hidden_norm.weight": (size,),
        f"{layer}.input_layernorm.weight": (size,),
        **formats.layer_shapes(config, layer, 2 * size),
        "norm.weight": (size,),
    }
    if draft_vocab is not None:
        shapes["lm_head.weight"] = (draft_vocab, size)
        if draft_vocab != vocab:
            shapes.update(d2t=(draft_vocab,), t2d=(vocab,))
    if config.get("norm_before_fc"):
        shapes["input_norm.weight"] = (count * size,)
    if config.get("fc_norm"):
        shapes.update({f"fc_norm.{index}.weight": (size,) for index in range(count)})
    return shapes


def token_map(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    """Offsets that stay inside the target's vocabulary."""
    if "d2t" in tensors:
        problem = formats.token_map_problem(tensors["d2t"], config["draft_vocab_size"], config["vocab_size"])
        if problem:
            yield problem


def layers_in_both_or_none(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    """vLLM reads the top-level list, SGLang eagle_config's only: each in its own convention, or neither there."""
    top, nested = config.get(LAYER_IDS), (config.get("eagle_config") or {}).get(LAYER_IDS)
    if (top or nested) and [layer - 1 for layer in top or ()] != nested:
        yield f"{LAYER_IDS} is {top} and eagle_config's {nested}: not the same layers for vLLM and SGLang"


def layers_exist(highest: int) -> Rule:
    """highest: added to the target's number of layers; engines differ in whether they give the state after the last."""

    def rule(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
        layers, last = config.get(LAYER_IDS), target.num_layers + highest
        if layers and (layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] > last):
            yield f"auxiliary layers {layers} must rise, within 0 and {last}"
        if not layers and target.num_layers < 7:
            yield f"the default auxiliary layers coincide in a target of {target.num_layers} layers"

    return rule


def no_norm_before_residual(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    """SGLang doesn't know the flag, and would serve the head as if it were false."""
    if config.get("norm_before_residual"):
        yield "SGLang has no norm_before_residual and would silently draft badly; use --format vllm or speculators"


def one_norm_before_fc(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    if config.get("norm_before_fc") and config.get("fc_norm"):
        yield "norm_before_fc and fc_norm exclude each other in speculators; use --format vllm"


_COMMON: tuple[Rule, ...] = (formats.sizes, token_map, formats.rope)
_PLAIN_TENSORS = formats.exactly(lambda config: _expected_shapes(config, "midlayer"))
_VLLM_RULES: tuple[Rule, ...] = (*_COMMON, _PLAIN_TENSORS, layers_exist(0))
_SGLANG_RULES: tuple[Rule, ...] = (
    *_COMMON,
    _PLAIN_TENSORS,
    layers_in_both_or_none,
    layers_exist(-1),  # it captures a layer's input only
    no_norm_before_residual,
)


def _speculators_shapes(config: dict[str, Any]) -> Shapes:
    return {
        **_expected_shapes(config, "layers.0"),
        "embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
    }


def _vllm_alone(out: Path, target: TargetShape, length: int) -> str:
    return shlex.join(["vllm", "serve", str(out)])


def _llama_cpp(out: Path, target: TargetShape, length: int) -> str:
    command = ["python", "convert_hf_to_gguf.py", str(out), "--target-model-dir", target.path, "--outtype", "bf16"]
    return shlex.join(command)


def _not_for_llama_cpp(head: Eagle3Head) -> list[str]:
    """Options of a head with which llama.cpp would draft badly: its `eagle3.cpp` has none of them."""
    config = head.config
    lacking = [option for option in ("fc_norm", "norm_output") if getattr(config, option)]
    return lacking + (["auxiliary layers other than three"] if config.num_auxiliary != 3 else [])


def _plain_commands(head: Eagle3Head) -> dict[str, Command]:
    engines = {"vLLM": _VLLM, "SGLang": _SGLANG}
    return engines if _not_for_llama_cpp(head) else {**engines, "llama.cpp (conversion)": _llama_cpp}


def _plain_notes(head: Eagle3Head) -> list[str]:
    lacking = _not_for_llama_cpp(head)
    return [f"llama.cpp has no {' and no '.join(lacking)}, so there is no command for it."] if lacking else []


_VLLM, _SGLANG = formats.vllm("eagle3"), formats.sglang("EAGLE3")

EAGLE3_FORMATS = {
    "plain": Format((*_VLLM_RULES, *_SGLANG_RULES), _plain_commands, notes=_plain_notes),
    "vllm": Format(_VLLM_RULES, lambda head: {"vLLM": _VLLM}),
    "sglang": Format(_SGLANG_RULES, lambda head: {"SGLang": _SGLANG}),
    "speculators": Format(
        (*_COMMON, formats.exactly(_speculators_shapes), layers_exist(0), one_norm_before_fc),
        lambda head: {"vLLM": _vllm_alone},
        tensors=_speculators_tensors,
        config=_speculators_config,
        # as vLLM's SpeculatorsConfig lays it flat
        flat=lambda config: {**config["transformer_layer_config"], **{key: config[key] for key in _OF_THE_HEAD}},
    ),
}
