"""EAGLE-3 heads of other trainers and for other engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from draft.errors import UserError
from draft.heads.eagle3 import LAYER_IDS, Eagle3Head, check_layers, read_layer_ids
from draft.interop import formats
from draft.interop.formats import SGLANG, VLLM, Checkpoint, Format, Rule, Source, TargetShape
from draft.target import Target

# (part of a foreign name, ours), in this order
_RENAMES = (
    ("layers.0.", "midlayer."),
    ("aux_norm_low.", "fc_norm.0."),
    ("aux_norm_mid.", "fc_norm.1."),
    ("aux_norm_high.", "fc_norm.2."),
)
# tensors that hold nothing of the head: copies of the target's, and tables that are computed
_LEFT_OUT = ("verifier_lm_head.weight", "verifier_norm.weight", "midlayer.self_attn.rotary_emb.inv_freq")
# keys at the top of a speculators config.json, beside the decoder layer's configuration
_OPTIONS = ("draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def _is_speculators(found: Checkpoint) -> bool:
    return "speculators_model_type" in found.config or "speculators_config" in found.config


def _translate(found: Checkpoint, target: Target) -> dict[str, Any]:
    values = _from_speculators(found) if _is_speculators(found) else dict(found.config)
    nested = values.get("eagle_config") or {}
    if "norm_before_fc" in nested:  # which engines read first
        values["norm_before_fc"] = nested["norm_before_fc"]
    if values.get("use_aux_norm"):  # SGLang's older name
        values["fc_norm"] = True
    given, found.tensors = found.tensors, {}
    for name, value in given.items():
        name = name.removeprefix("model.")
        for theirs, ours in _RENAMES:
            name = name.replace(theirs, ours, 1)
        if name in _LEFT_OUT:
            found.notes.append(f"left out {name}: it is not the head's.")
        else:
            found.tensors[name] = value
    _settle_layers(values, found, target)
    formats.drop_embedding(found, target)
    lm_head = found.tensors.get("lm_head.weight")
    if _is_speculators(found) and lm_head is not None and formats.is_the_targets(lm_head, target):
        del found.tensors["lm_head.weight"]  # a shared LM head is in its files as a copy
        found.notes.append("left out lm_head.weight: it is the target's.")
    width = values.get("target_hidden_size") or values.get("hidden_size")
    formats.check_sizes(
        found,
        ("hidden size", values.get("hidden_size"), target.hidden_size),
        ("target_hidden_size", width, target.hidden_size),
        ("vocabulary", values.get("vocab_size"), target.vocab_size),
    )
    _settle_lm_head(values, found, target)
    formats.complete_layer(values, found, target)
    formats.complete_token_map(found, values)
    return values


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
    kept = {key: config[key] for key in (*_OPTIONS, "target_hidden_size") if config.get(key) is not None}
    layers = {LAYER_IDS: config[LAYER_IDS]} if config.get(LAYER_IDS) else {}
    return {**inner, **kept, **layers}


def _settle_layers(values: dict[str, Any], found: Checkpoint, target: Target) -> None:
    """Settle the auxiliary layers: the user's choice, or the one reading that gives the target's default layers."""
    chosen, default = found.auxiliary_layers, list(target.default_auxiliary_layers)
    nested = values["eagle_config"] = dict(values.get("eagle_config") or {})
    leaving = [layer - 1 for layer in default]
    if chosen is not None:
        check_layers(chosen, target.num_layers)
        values[LAYER_IDS] = chosen
        nested.pop(LAYER_IDS, None)
    elif not values.get(LAYER_IDS) and nested.get(LAYER_IDS) in (default, leaving):
        way = "entering" if nested[LAYER_IDS] == default else "leaving"
        found.notes.append(
            f"took the layers {nested[LAYER_IDS]} of eagle_config for the default ones, as the states {way} them."
        )
        values[LAYER_IDS] = default
        nested.pop(LAYER_IDS)
    elif values.get(LAYER_IDS) == leaving:
        found.notes.append(
            f"{LAYER_IDS} = {leaving} is what vLLM would read, and also how other trainers write the default layers "
            f"{default}; if the head drafts badly, import it with --auxiliary-layers {','.join(map(str, default))}."
        )
    if values.get(LAYER_IDS) and read_layer_ids(values) == default:
        values[LAYER_IDS] = None
        nested.pop(LAYER_IDS, None)


def _settle_lm_head(values: dict[str, Any], found: Checkpoint, target: Target) -> None:
    """Settle the LM head: the file's where it has one, else the target's, if over its whole vocabulary."""
    own, size = found.tensors.get("lm_head.weight"), values.get("draft_vocab_size")
    if values.get("tie_word_embeddings") and (own is not None or not target.config.tie_word_embeddings):
        raise UserError(
            f"{str(found.folder)!r}: tie_word_embeddings = true means the embedding for SGLang and the file's or the "
            "target's LM head for vLLM; set it to false beside an LM head of the head's own."
        )
    if own is None and size not in (None, target.vocab_size):
        raise UserError(
            f"{str(found.folder)!r}: lm_head.weight is missing, and draft_vocab_size is {size} where the target's LM "
            f"head has {target.vocab_size} rows; a reduced vocabulary needs an LM head of its own."
        )
    if own is None:
        values["draft_vocab_size"] = None
        found.notes.append("the file has no LM head: the target's is used.")
    elif size is None:
        values["draft_vocab_size"] = len(own)
        found.notes.append(f"filled in draft_vocab_size = {len(own)}, the rows of lm_head.weight.")


SOURCE = Source(
    {
        "speculators eagle3": _is_speculators,
        "plain EAGLE-3 of SGLang and vLLM": lambda found: (
            found.architecture in ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
        ),
        "SafeAILab EAGLE-3": lambda found: any("midlayer." in name for name in found.tensors),
    },
    _translate,
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


def _speculators_config(config: dict[str, Any], target: TargetShape, length: int) -> dict[str, Any]:
    """No model_type at the top: by that vLLM knows the format. False flags are written too: defaults differ."""
    outside = (*_OPTIONS, LAYER_IDS)
    proposal = {"proposal_type": "greedy", "speculative_tokens": length, "verifier_accept_k": 1}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{**proposal, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": target.path, "architectures": [target.architecture]},
        },
        **{key: config.get(key, False) for key in _OPTIONS},
        "draft_vocab_size": config["draft_vocab_size"] or config["vocab_size"],
        LAYER_IDS: config.get(LAYER_IDS),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "transformer_layer_config": {
            key: value for key, value in config.items() if key not in (*outside, "architectures", "eagle_config")
        },
        "torch_dtype": config["torch_dtype"],
    }


def layers_exist(highest: int) -> Rule:
    """highest: added to the target's number of layers; engines differ in whether they give the state after the last."""

    def rule(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
        layers, last = config.get(LAYER_IDS), target.num_layers + highest
        if layers and (layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] > last):
            yield f"auxiliary layers {layers} must rise, within 0 and {last}"
        if not layers and target.num_layers < 7:
            yield f"the default auxiliary layers coincide in a target of {target.num_layers} layers"

    return rule


def _not_for_llama_cpp(head: Eagle3Head) -> list[str]:
    """Options of a head with which llama.cpp would draft badly: its `eagle3.cpp` has none of them."""
    config = head.config
    lacking = [option for option in ("fc_norm", "norm_output") if getattr(config, option)]
    return lacking + (["auxiliary layers other than three"] if config.num_auxiliary != 3 else [])


def _plain_commands(head: Eagle3Head) -> dict[str, str]:
    engines = {"vLLM": VLLM, "SGLang": SGLANG}
    conversion = "python convert_hf_to_gguf.py {head} --target-model-dir {target} --outtype bf16"
    return engines if _not_for_llama_cpp(head) else {**engines, "llama.cpp (conversion)": conversion}


def _plain_notes(head: Eagle3Head) -> list[str]:
    lacking = _not_for_llama_cpp(head)
    return [f"llama.cpp has no {' and no '.join(lacking)}, so there is no command for it."] if lacking else []


_SGLANG_RULES = (layers_exist(-1),)  # it captures a layer's input only, not the state after the last
_SGLANG_LACKS = {
    "norm_before_residual": "SGLang has no norm_before_residual and would draft badly; use --format vllm or speculators"
}
_SPECULATORS_LACKS = {
    "norm_before_fc fc_norm": "norm_before_fc and fc_norm exclude each other in speculators; use --format vllm"
}

FORMATS = {
    "plain": Format(_plain_commands, _SGLANG_LACKS, _SGLANG_RULES, notes=_plain_notes),
    "vllm": Format(lambda head: {"vLLM": VLLM}, rules=(layers_exist(0),)),
    "sglang": Format(lambda head: {"SGLang": SGLANG}, _SGLANG_LACKS, _SGLANG_RULES),
    "speculators": Format(
        lambda head: {"vLLM": "vllm serve {head}"},
        _SPECULATORS_LACKS,
        (layers_exist(0),),
        tensors=_speculators_tensors,
        config=_speculators_config,
    ),
}
