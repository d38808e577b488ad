"""What engines do with a head's folder when they load it, as rules that are asked before the folder is written.

Read from the sources of vLLM 0.32.0 (`llama_eagle3.py`, `gpu_model_runner.py`, `configs/speculators/`), SGLang 0.5.23
(`llama_eagle3.py`, `spec_aux_hidden_state.py`, `eagle_worker_v2.py`) and speculators 0.9.0 (`models/eagle3/`). An
engine that finds a tensor that it doesn't know fails (vLLM) or goes on without it (SGLang); one that misses a tensor
goes on with random weights or zeros. So names and shapes must be exactly what the config.json makes an engine expect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from draft.heads.eagle3_config import LAYER_IDS
from draft.interop.token_map import token_map_problem


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
