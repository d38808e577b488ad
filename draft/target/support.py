"""Checks of a target: its configuration, modules and files before gigabytes of weights are read, and what was read."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draft.errors import UserError
from draft.files import read_json
from draft.memory import free_memory

log = logging.getLogger(__name__)

# dtypes of weights, as safetensors spells them
_PLAIN_DTYPES = {"F64", "F32", "F16", "BF16"}
# integer tables of older checkpoints, which are computed today
_TABLES = re.compile(r"(position_ids|masked_bias|attn\.bias|inv_freq)$")
MOST_LAYERS = 10_000
_FINITE = sys.float_info.max
# number of a configuration -> it is above the first, and at most the second; null stands for what follows from others
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), (0, _FINITE)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), (0, _FINITE)),
    "num_hidden_layers": (0, MOST_LAYERS),  # building too many, without weights even, would take for ever
    "rms_norm_eps": (0, 1),
    "rope_theta": (1, _FINITE),
}
_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.(.+)$")
# rotary embeddings that treat all tokens and layers alike
_HEAD_ROPES = ("default", "linear", "llama3", "yarn")


def check_config(name: str, config: Any) -> None:
    """Refuse what cannot be a target, with the reason.

    config: the model's transformers configuration, with that of the text part inside where there is one.

    Raises:
        UserError: for an encoder-decoder, a model that is no language model, attention to later tokens or chosen by
            the tokens' values, layers of different shapes or with shared keys, kernels from the hub, code in the
            target's folder, and quantised weights.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text, kind, reason = config.get_text_config(), config.model_type, None
    chosen = [str(getattr(config, f"_{key}_implementation", "")) for key in ("attn", "experts")]
    kernels = [each for each in chosen if "/" in each]
    code = str((getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM", "")).rpartition(".")[2]
    if getattr(config, "is_encoder_decoder", False):
        reason = f"{kind} is an encoder-decoder; use a decoder-only model such as Llama, Qwen or Gemma"
    elif quantisation := getattr(config, "quantization_config", None):
        values = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        reason = (
            f"its weights are quantised ({values.get('quant_method') or 'an unknown method'}), and heads are trained "
            "and served beside plain ones; use the checkpoint that it was quantised from (of quantised files only GGUF "
            "is taken, and dequantised while it is read)"
        )
    elif kernels:
        reason = f"its config.json chooses code of the hub ({kernels[0]}), which is never run; take the entry out"
    elif code and code != MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind):
        reason = (
            f"its folder has code of its own for the model ({code}), which is never run; use a model of a kind that "
            "transformers has itself"
        )
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and text is not config:
        reason = (
            f"{kind} is a model of text and other media, which transformers does not load as a language model; "
            f"save its text part ({text.model_type}) as a model of its own, and use that"
        )
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        reason = f"{kind} is no causal language model that transformers knows; use one such as Llama, Qwen or Gemma"
    elif kind == "doge":
        reason = (
            f"{kind} chooses by the values of the tokens which of them a head sees, and its masks don't fit rows of "
            "different lengths in one batch; use a model with plain attention such as Llama, Qwen or Gemma"
        )
    elif shared := getattr(text, "num_kv_shared_layers", None):
        reason = (
            f"{shared} of its layers read the keys and values of other layers (num_kv_shared_layers), for which there "
            "is no cache; use a target whose layers have their own, such as Llama, Qwen or Gemma 3"
        )
    elif getattr(text, "hidden_size_per_layer_input", None):
        reason = (
            f"{kind} gives each layer an embedding of its own (hidden_size_per_layer_input), which heads are not "
            "trained beside; use a target without, such as Llama, Qwen or Gemma 3"
        )
    elif getattr(text, "use_bidirectional_attention", None):
        reason = f"{kind} attends to later tokens too (use_bidirectional_attention), so it cannot write text"
    if reason is not None:
        raise UserError(f"target {name!r}: {reason}.")


def check_numbers(name: str, config: Any) -> None:
    """Raise UserError, naming the value, for a size or a constant of a target that no model has."""
    text = config.get_text_config().to_dict()  # attributes that differ between layers cannot be read
    rope = text.get("rope_parameters") or {}
    values = [(key, text.get(key)) for key in _RANGES]
    values += [("rope_theta", each.get("rope_theta")) for each in (rope, *rope.values()) if isinstance(each, dict)]
    for key, value in values:
        if impossible(key, value):
            raise UserError(f"target {name!r}: {key} = {value}, which no model has; correct its config.json.")


def impossible(key: str, value: Any) -> bool:
    """Test that a number is out of the range that this key of a configuration has in any model."""
    least, most = _RANGES[key]
    return isinstance(value, (int, float)) and not least < value <= most


def check_model(name: str, config: Any, dtype: torch.dtype | str, device: torch.device) -> None:
    """Refuse a target of other modules than heads need, or with weights larger than the device that they are to be on.

    dtype: that of loading, "auto" for the checkpoint's own.

    Raises:
        UserError: naming the architecture, or both sizes.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # loading it will give the reason
        return
    _check_layers(name, decoder_of(name, model))
    if device.type not in ("cpu", "cuda"):
        return
    free = free_memory(device)
    if not isinstance(dtype, torch.dtype):
        dtype = config.dtype or torch.float32
    needed = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    if needed > free:
        raise UserError(
            f"target {name!r} has {needed / 2**30:.1f} GiB of weights in {str(dtype).removeprefix('torch.')} and "
            f"{free / 2**30:.1f} GiB are free on {device}; a target spread over several devices is not supported: "
            "choose a narrower --dtype, a smaller target, or a larger device."
        )


def _check_layers(name: str, decoder: Any) -> None:
    """Refuse attention of another shape in some layers: heads and the cache take one for all."""
    shapes: dict[tuple[int, ...], int] = {}
    for index, layer in enumerate(decoder.layers):
        attention = getattr(layer, "self_attn", None)
        width = getattr(attention, "head_dim", None)
        keys = getattr(getattr(attention, "k_proj", None), "out_features", None)
        if isinstance(width, int) and isinstance(keys, int):
            shapes.setdefault((width, keys // width), index)
    if len(shapes) > 1:
        found = " and ".join(f"{width} x {heads} in layer {index}" for (width, heads), index in shapes.items())
        raise UserError(
            f"target {name!r}: its layers have key heads of different shapes ({found}), and heads and the cache are "
            "made for one; use a target whose layers are alike, such as Llama, Qwen or Gemma 3."
        )


def decoder_of(name: str, model: Any) -> Any:
    """The decoder of a causal language model, with its `layers` and its final `norm`; UserError for other shapes."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    if not (isinstance(getattr(decoder, "layers", None), nn.ModuleList) and hasattr(decoder, "norm")):
        raise UserError(
            f"target {name!r}: architecture {type(model).__name__} has no list of decoder layers with a final "
            "norm; use a decoder-only model such as Llama, Qwen or Mistral."
        )
    if not hasattr(model.config.get_text_config(), "rms_norm_eps"):
        raise UserError(
            f"target {name!r}: {type(model).__name__} has no RMSNorm, which an EAGLE-3 head needs; use another."
        )
    return decoder


def weight_files(name: str, find: Callable[[str], str | None]) -> list[Path]:
    """The safetensors files of a target's weights, each one whole, with all tensors that their index gives them.

    find: (file's name) -> its path, None where the target has no such file.

    Raises:
        UserError: naming a file that is missing or damaged, or a tensor that a file lacks.
    """
    single, listing = (find(f"model.safetensors{end}") for end in ("", ".index.json"))
    if single is None and listing is None:
        pickles = [file for end in ("", ".index.json") if find(file := f"pytorch_model.bin{end}")]
        raise UserError(
            f"target {name!r}: its weights are in {pickles[0]}, a pickle, which may run code when it is loaded; "
            "convert them to safetensors (load the model where you trust it, and save_pretrained)."
            if pickles
            else f"target {name!r}: it has no model.safetensors and no index of several; give a whole model."
        )
    if single is not None:
        open_weights(Path(single))
        return [Path(single)]
    assert listing is not None
    values, paths = read_json(Path(listing)), []
    index = values.get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise UserError(f"{listing!r} has no weight_map of tensors to files; download the model again.")
    if not isinstance(values.get("metadata"), dict):
        raise UserError(f"{listing!r} has no metadata, which transformers reads; download the model again.")
    owners: dict[str, str] = {}
    for file in sorted(set(index.values())):
        path = find(file) if Path(file).name == file else None
        if path is None:
            raise UserError(f"target {name!r}: {file} is missing, which its index names; download the model again.")
        held = open_weights(Path(path))
        lacking = sorted(key for key, place in index.items() if place == file and key not in held)
        if lacking:
            raise UserError(f"{path!r} lacks {lacking[0]}, which its index says it has; download the model again.")
        twice = min(held.keys() & owners.keys(), default=None)
        if twice is not None:  # transformers takes one of them, whatever the index says
            raise UserError(
                f"target {name!r}: tensor {twice} is in two files, {owners[twice]} and {file}; download the model "
                "again."
            )
        owners |= dict.fromkeys(held, file)
        paths.append(Path(path))
    return paths


def open_weights(path: Path) -> dict[str, str]:
    """The tensors of a safetensors file with their dtypes, from its header; UserError for a file that is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as tensors:
            return {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is not a whole safetensors file ({error}); download it again.") from error


def wrong_dtype(dtypes: Mapping[str, str]) -> str | None:
    """The first of the tensors that is no plain floating-point one, in words; dtypes: as `open_weights` gives them."""
    return next((f"{key} is of dtype {dtype}" for key, dtype in dtypes.items() if dtype not in _PLAIN_DTYPES), None)


def check_loaded(name: str, model: Any, report: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Refuse a model that is not what its files say.

    report: transformers' of loading it. Extra tensors are named in the log: a multi-token-prediction layer, or another
    part of a larger model.

    Raises:
        UserError: naming a tensor that is missing, of another shape or dtype, without a place in a model that has such
            parts, or not finite.
    """

    def wrong(tensor: str, reason: str) -> UserError:
        return UserError(f"target {name!r}: tensor {tensor} {reason}.")

    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    many = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    for key in missing:
        other = next((each for each in extra if each.endswith(f".{key}") or key.endswith(f".{each}")), None)
        if other is not None:
            how = "save the model again under the names that transformers gives its tensors"
            raise wrong(key, f"is missing{many}, and its files have {other}; {how}")
    if missing:
        raise wrong(missing[0], f"is missing from its files{many}; get the whole model, or correct its config.json")
    parted = "the two do not belong together"
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise wrong(key, f"is {list(found)} in its file and {list(wanted)} by its config.json; {parted}")
    contradiction = _contradiction(model, extra)
    if contradiction is not None:
        raise wrong(contradiction, f"has no place in the model that its config.json describes; {parted}")
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False) and ends[0] is not ends[1]:
        reason = "differs from the embedding, which it is by its config.json"
        raise wrong("lm_head.weight", f"{reason}; set tie_word_embeddings to false there, or remove the tensor")
    own = model.state_dict()
    exempt = {*extra, *(key for key, value in own.items() if not value.is_floating_point())}
    for path in files:
        dtypes = {key: dtype for key, dtype in open_weights(path).items() if key not in exempt}
        misfit = wrong_dtype({key: dtype for key, dtype in dtypes.items() if not _TABLES.search(key)})
        if misfit is not None:
            raise UserError(
                f"target {name!r}: tensor {misfit}, no plain floating-point one; use the model before it was quantised."
            )
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        log.info("target %r: its files have tensors that it is used without: %s%s", name, ", ".join(extra[:3]), more)
    key = first_not_finite(own)
    if key is not None:
        dtype = str(own[key].dtype).removeprefix("torch.")
        raise wrong(key, f"holds NaN or infinity in {dtype}; get the model again, or choose a wider --dtype")


def _contradiction(model: Any, extra: list[str]) -> str | None:
    """The first of the `extra` tensors that says that the model is another one.

    One inside of a part that the model has would change what the part computes (a bias, a norm, a scale), and a whole
    further layer says that there are more. Parts beside it, such as a layer that predicts several tokens, do not.
    """
    modules = {name for name, _ in model.named_modules() if name}
    count = len(decoder_of("", model).layers)
    inside: dict[tuple[str, int], set[str]] = {}
    for key in model.state_dict():
        if match := _LAYER.match(key):
            inside.setdefault((match[1], int(match[2])), set()).add(match[3])
    further: dict[tuple[str, int], set[str]] = {}
    for key in extra:
        match = _LAYER.match(key)
        if _TABLES.search(key):
            continue
        if key.rpartition(".")[0] in modules or (match and f"{match[1]}.{match[2]}" in modules):
            return key
        if match:
            further.setdefault((match[1], int(match[2])), set()).add(match[3])
    for (layers, index), names in sorted(further.items()):
        if names and names == inside.get((layers, count - 1)):
            return f"{layers}.{index}.{min(names)}"
    return None


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity: one pass over each, without a copy."""
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel():
            least, most = value.detach().aminmax()  # both are NaN where one is
            if not (torch.isfinite(least) and torch.isfinite(most)):
                return name
    return None


class LoadReport(logging.Filter):
    """Keeps transformers' report of a load out of the log: `check_loaded` says the same, and what is to be done."""

    _CONVERSION = re.compile(r"^.*?Error: .*? destined for (\S+?)\.? ", re.MULTILINE)

    def __init__(self) -> None:
        super().__init__()
        self.unmade: str | None = None  # the tensor that could not be made of its parts

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" not in text:
            return "This checkpoint seem corrupted" not in text  # said of weights that are tied and missing
        match = self._CONVERSION.search(text)
        self.unmade = match[1] if match else None
        return False


def check_code(name: str, find: Callable[[str], str | None]) -> None:
    """Refuse a folder that needs code of its own, or that is an adapter's, before anything is loaded from it.

    find: as of `weight_files`. Code beside a kind of model or tokenizer that transformers has itself is never run.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if find("adapter_config.json"):
        raise UserError(
            f"target {name!r}: it holds an adapter (adapter_config.json); give the model that it was trained on as "
            "--target, and this as --target-adapter."
        )
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):  # transformers ignores the last
        path = find(file)
        values = read_json(Path(path)) if path else {}
        mapped = values.get("auto_map")
        if file == "config.json" and mapped and not isinstance(mapped, dict):
            raise UserError(f"{path!r}: auto_map is {mapped!r}; it must be an object, or left out.")
        if not mapped:
            continue
        if file == "config.json":
            own, known = values.get("model_type"), values.get("model_type") in CONFIG_MAPPING
        else:
            own = str(values.get("tokenizer_class"))
            known = tokenizer_class_from_name(own) is not None
        if not known:
            raise UserError(
                f"target {name!r}: its {file} asks for code of its own for the kind {own}, and code from a model's "
                "folder is never run; use a model and a tokenizer of kinds that transformers has."
            )
        log.info("target %r: code that its %s names is not run: transformers has the kind %s itself", name, file, own)


def check_architecture(config: Any, name: str) -> None:
    """Raise UserError for a target whose layers are of a kind that there is no cache for."""
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UserError(
            f"target {name!r} has layers of kind {min(unknown)}, for which there is no cache; use a target "
            "whose layers are all full_attention or sliding_attention."
        )


def rope_limit(config: Any) -> tuple[str, int] | None:
    """The kind of rotary embedding, and its limit in tokens, where its frequencies change for all tokens beyond it.

    transformers looks at the longest position of a batch, so there one row would change what another one gives, and
    entries of the cache made before would be wrong.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    limits = [
        (kind, int(each.get("original_max_position_embeddings") or config.max_position_embeddings))
        if kind == "longrope"
        else (kind, int(config.max_position_embeddings))
        for each in nested or [parameters]
        if (kind := str(each.get("rope_type", "default"))) == "longrope" or "dynamic" in kind
    ]
    return min(limits, key=lambda limit: limit[1], default=None)


def head_rope(config: Any) -> dict[str, Any]:
    """The rotary embedding of a new head for a target: its target's, where that is one for all tokens and layers.

    A head attends to everything before, as a target's full-attention layers do, and turns all of a head's width.
    """
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    kinds = [value for value in parameters.values() if isinstance(value, dict)]
    if kinds:  # a kind of layer each, of which one may have none
        parameters = dict(parameters.get("full_attention") or kinds[0])
    parameters.pop("partial_rotary_factor", None)
    if parameters.get("rope_type", "default") in _HEAD_ROPES:
        return {"rope_theta": 10000.0, "rope_type": "default", **parameters}
    return {"rope_theta": parameters.get("rope_theta", 10000.0), "rope_type": "default"}
