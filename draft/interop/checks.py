"""What engines do with a head's folder when they load it, as rules that are asked before the folder is written.

Read from the sources of vLLM 0.32.0 (`llama_eagle3.py`, `gpu_model_runner.py`, `configs/speculators/`), SGLang 0.5.23
(`llama_eagle3.py`, `spec_aux_hidden_state.py`, `eagle_worker_v2.py`) and speculators 0.9.0 (`models/eagle3/`). An
engine that finds a tensor that it doesn't know fails (vLLM) or goes on without it (SGLang); one that misses a tensor
goes on with random weights or zeros. So names and shapes must be exactly what the config.json makes an engine expect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from draft.errors import UserError
from draft.heads.eagle3 import LAYER_IDS
from draft.interop.sources import Checkpoint
from draft.target.bundled import BUNDLED_TARGET, bundled_target_folder


@dataclass(frozen=True)
class TargetShape:
    """What engines compare a head with, out of the target's config.json."""

    path: str  # what engines are given: hub id or folder
    architecture: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    max_length: int


def expected_shapes(config: dict[str, Any], layer: str) -> dict[str, tuple[int, ...]]:
    """The tensors that engines take for a plain config.json; `layer`: how the decoder layer is called."""
    size, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    values = config["num_key_value_heads"] * config["head_dim"]
    vocab, draft_vocab = config["vocab_size"], config.get("draft_vocab_size")
    count = _num_auxiliary(config)
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (size, count * size),
        f"{layer}.hidden_norm.weight": (size,),
        f"{layer}.input_layernorm.weight": (size,),
        f"{layer}.post_attention_layernorm.weight": (size,),
        f"{layer}.self_attn.q_proj.weight": (queries, 2 * size),
        f"{layer}.self_attn.k_proj.weight": (values, 2 * size),
        f"{layer}.self_attn.v_proj.weight": (values, 2 * size),
        f"{layer}.self_attn.o_proj.weight": (size, queries),
        f"{layer}.mlp.gate_proj.weight": (inner, size),
        f"{layer}.mlp.up_proj.weight": (inner, size),
        f"{layer}.mlp.down_proj.weight": (size, inner),
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


def _num_auxiliary(config: dict[str, Any]) -> int:
    """How both engines size fc: they don't look at the top-level list."""
    nested = (config.get("eagle_config") or {}).get(LAYER_IDS)
    return config.get("num_aux_hidden_states") or (len(nested) if nested else 3)


Rule = Callable[[dict[str, Any], dict[str, Tensor], TargetShape], Iterator[str]]


def sizes(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    """A head of its target's sizes; a Medusa head has no positions."""
    for key, theirs in (
        ("hidden_size", target.hidden_size),
        ("vocab_size", target.vocab_size),
        ("max_position_embeddings", target.max_length),
    ):
        if config.get(key, theirs) != theirs:
            yield f"{key} is {config[key]} and the target's is {theirs}"


Shapes = dict[str, tuple[int, ...]]


def names_and_shapes(layer: str, *more: str) -> Rule:
    """Those of an EAGLE-3 head; more: tensors of the embedding's shape."""

    def expected(config: dict[str, Any]) -> Shapes:
        copies = {name: (config["vocab_size"], config["hidden_size"]) for name in more}
        return {**expected_shapes(config, layer), **copies}

    return exactly(expected)


def exactly(shapes: Callable[[dict[str, Any]], Shapes], *, besides: tuple[str, ...] = ()) -> Rule:
    """Exactly the tensors that the config.json makes an engine expect; besides: what it is known to pass over."""

    def rule(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
        expected = shapes(config)
        found = {name: tuple(value.shape) for name, value in tensors.items() if name not in besides}
        for name in sorted(set(expected) | set(found)):
            if expected.get(name) != found.get(name):
                yield f"tensor {name} is {found.get(name, 'missing')} and must be {expected.get(name, 'left out')}"

    return rule


def token_map(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    """Offsets that stay inside the target's vocabulary."""
    if "d2t" in tensors:
        problem = token_map_problem(tensors["d2t"], config["draft_vocab_size"], config["vocab_size"])
        if problem:
            yield problem


def rope(config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape) -> Iterator[str]:
    """Today's spelling, with the base, and the older one that says the same."""
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling")
    if parameters.get("rope_theta") != config.get("rope_theta"):
        yield f"rope_theta is {config.get('rope_theta')} and rope_parameters has {parameters.get('rope_theta')}"
    kinds = parameters.get("rope_type", "default"), (scaling or {}).get("rope_type", "default")
    if kinds[0] != kinds[1]:
        yield f"rope_parameters is of type {kinds[0]} and rope_scaling of type {kinds[1]}"


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


_COMMON: tuple[Rule, ...] = (sizes, token_map, rope)
VLLM: tuple[Rule, ...] = (*_COMMON, names_and_shapes("midlayer"), layers_exist(0))
SGLANG: tuple[Rule, ...] = (
    *_COMMON,
    names_and_shapes("midlayer"),
    layers_in_both_or_none,
    layers_exist(-1),  # it captures a layer's input only
    no_norm_before_residual,
)
SPECULATORS: tuple[Rule, ...] = (
    *_COMMON,
    names_and_shapes("layers.0", "embed_tokens.weight"),
    layers_exist(0),
    one_norm_before_fc,
)


def problems(
    rules: tuple[Rule, ...], config: dict[str, Any], tensors: dict[str, Tensor], target: TargetShape
) -> list[str]:
    """What an engine with these rules would stumble over, each once."""
    found = [problem for rule in rules for problem in rule(config, tensors, target)]
    return list(dict.fromkeys(found))


# A target's sizes, and single tensors of it, without loading it: it may be larger than this machine.


def target_shape(name: str) -> TargetShape:
    """Read the config.json of a target: hub id, folder, or the bundled one.

    Raises:
        UserError: when there is none, or it is a GGUF file, which the other engines' EAGLE-3 does not take.
    """
    from transformers import AutoConfig

    if name.endswith(".gguf"):
        raise UserError(f"target {name!r}: vLLM and SGLang serve EAGLE-3 beside a folder or hub id, not a GGUF file.")
    path = str(bundled_target_folder()) if name == BUNDLED_TARGET else name
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"target {name!r}: its config.json can't be read ({reason}); pass --target.") from error
    inner = config.get_text_config()
    return TargetShape(
        path=path,
        architecture=(config.architectures or ["unknown"])[0],
        hidden_size=inner.hidden_size,
        vocab_size=inner.vocab_size,
        num_layers=inner.num_hidden_layers,
        max_length=int(getattr(inner, "max_position_embeddings", 2048)),
    )


def target_tensor(path: str, names: tuple[str, ...]) -> Tensor:
    """The first of `names` (ends of tensor names) that a target's safetensors files have.

    Raises:
        UserError: when the target has no safetensors files, or none of them has such a tensor.
    """
    files = _safetensors_files(path)
    for name in names:
        for file in files:
            with safe_open(file, "pt") as tensors:
                found = next((key for key in tensors.keys() if f".{key}".endswith(f".{name}")), None)  # noqa: SIM118
                if found is not None:
                    return tensors.get_tensor(found)
    raise UserError(f"target {path!r}: its safetensors files have no {' or '.join(names)}; export in another format.")


def _safetensors_files(path: str) -> list[str]:
    """Its one file, or the shards that its index names; hub ids are looked up as transformers does."""
    from transformers.utils.hub import cached_file

    def find(name: str) -> str | None:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False)

    single, index = find("model.safetensors"), find("model.safetensors.index.json")
    if single is not None:
        return [single]
    if index is None:
        raise UserError(f"target {path!r} has no safetensors files, which this format's copies come from.")
    shards = dict.fromkeys(json.loads(Path(index).read_text())["weight_map"].values())
    return [file for file in map(find, shards) if file is not None]


# d2t and t2d, the two directions between a head's reduced vocabulary and its target's.


def complete_token_map(found: Checkpoint, values: dict[str, Any]) -> None:
    """Check the token map of a checkpoint against its config, and derive the missing half, in place.

    Raises:
        UserError: for a map that is missing, or that the target's vocabulary has no room for.
    """
    tensors, vocab = found.tensors, int(values["vocab_size"])
    size = int(values.get("draft_vocab_size") or vocab)
    if size == vocab:
        return  # `fill` takes trivial maps only
    d2t, t2d = tensors.get("d2t"), tensors.get("t2d")
    if d2t is None and t2d is None:
        raise UserError(
            f"{str(found.folder)!r}: draft_vocab_size is {size} of {vocab} tokens, and there is no d2t to say which; "
            "get the whole head."
        )
    if t2d is not None and t2d.shape != (vocab,):
        raise UserError(
            f"{str(found.folder)!r}: t2d has {len(t2d)} entries and the target's vocabulary {vocab} tokens."
        )
    if d2t is None:
        assert t2d is not None
        ids = t2d.bool().nonzero()[:, 0]
        tensors["d2t"] = ids - torch.arange(len(ids))
        found.notes.append("filled in d2t from t2d: draft ids in the order of their target ids.")
    else:
        tensors["d2t"] = d2t.to(torch.int64)
    problem = token_map_problem(tensors["d2t"], size, vocab)
    if problem:
        raise UserError(f"{str(found.folder)!r}: {problem}; use the target that the head was made for.")
    marks = torch.zeros(vocab, dtype=torch.bool)
    marks[tensors["d2t"] + torch.arange(size)] = True
    if t2d is None:
        found.notes.append("filled in t2d from d2t.")
    elif not torch.equal(t2d.bool(), marks):
        raise UserError(
            f"{str(found.folder)!r}: t2d marks {int(t2d.bool().sum())} target tokens and d2t gives {size}, others; "
            "the two belong to different heads."
        )
    tensors["t2d"] = marks


def token_map_problem(d2t: Tensor, size: int, vocab: int) -> str | None:
    """What is wrong with offsets d2t [draft_vocab] into a vocabulary, in words; None: nothing."""
    if d2t.shape != (size,):
        return f"d2t has {len(d2t)} entries and the draft vocabulary {size}"
    ids = d2t.to(torch.int64) + torch.arange(size)
    outside = ((ids < 0) | (ids >= vocab)).nonzero()
    if len(outside):
        place = int(outside[0])
        absolute = int(d2t.min()) >= 0 and int(d2t.max()) < vocab and len(d2t.unique()) == size
        hint = " (it seems to hold target ids where offsets are expected)" if absolute else ""
        return f"d2t maps draft id {place} to target id {int(ids[place])}, and the target's vocabulary is {vocab}{hint}"
    if len(ids.unique()) != size:
        return f"d2t maps {size} draft ids to only {len(ids.unique())} target ids"
    return None
