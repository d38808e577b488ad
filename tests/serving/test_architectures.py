"""Any decoder that takes an attention function: its answers are those of transformers, and what cannot be is refused.

The families with windows and bounded scores are tested much more in test_exactness.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, make_tiny_head, make_tiny_target
from oracle import PLANS, Case, Fickle, Oracle, check, engine_of, serve
from tiny_targets import CONTEXT, SMALL, Text, greedy_by_transformers, target_of
from transformers import AutoConfig, AutoModelForCausalLM

from draft.errors import UserError
from draft.target import Target
from serving.engine import Engine, SamplingParams

# some choose their experts in float32, whatever the dtype of the model: their weights differ by some 1e-7, as the
# products of a CPU depend on the number of rows
TOLERANCE = 1e-5
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "experts_implementation": "eager"}
LATENT = {
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
# name -> model type and what it adds to the common small shape
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
    "qwen2, windows from layer 3": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, **EXPERTS}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": 6, **EXPERTS}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "gemma": ("gemma", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 5}),
    "granite": ("granite", {"logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3}),
    "smollm3, layers without rope": ("smollm3", {"no_rope_layer_interval": 2}),
    "glm4": ("glm4", {"attention_bias": True}),
    "exaone4": ("exaone4", {"sliding_window": 5}),
    "deepseek_v3": ("deepseek_v3", {**EXPERTS, **LATENT}),
}


def make(family: str) -> Target:
    kind, own = FAMILIES[family]
    return target_of(AutoConfig.for_model(kind, **{**SMALL, **own}), family)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_greedy_answers_are_those_of_transformers(family: str) -> None:
    target = make(family)
    texts = []
    for length in (1, 12):
        prompts = torch.randint(3, 259, (2, length), generator=torch.Generator().manual_seed(length))
        ids = greedy_by_transformers(target, prompts, 11)
        output = target.forward(ids, layers=target.default_auxiliary_layers)
        log_p = target.logits(output.last_hidden).log_softmax(-1)
        assert output.auxiliary is not None
        texts += [Text(ids[row].tolist(), length, output.auxiliary[row], log_p[row]) for row in range(2)]
    cases = [Case.greedy(text, text.written, params()) for text in texts]
    oracle = engine_of(target, Oracle(target, 0.3, tolerance=TOLERANCE), Fickle(PLANS), max_batch=3, prefill_chunk=5)
    with_head = Engine(target, make_tiny_head(target), speculation="tree", tree_size=8, max_batch=4)
    for engine in (oracle, with_head):
        completions = serve(engine, cases)
        for case, completion in zip(cases, completions, strict=True):
            check(target, case, completion, tolerance=TOLERANCE)
        assert sum(completion.stats.drafted for completion in completions) > 0


def params() -> SamplingParams:
    return SamplingParams(11, ignore_eos=True, logprobs=1)


@pytest.mark.parametrize(
    ("kind", "own", "words"),
    [
        ("cohere", {}, ["RMSNorm"]),
        ("gpt_oss", {"num_local_experts": 4, "sliding_window": 5, **EXPERTS}, ["sinks"]),
        ("qwen3_next", {"num_experts": 4, **EXPERTS}, ["linear_attention"]),
        ("opt", {"ffn_dim": 32}, ["list of decoder layers"]),
        ("diffllama", {}, ["more than once"]),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_name(kind: str, own: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **own})).to(torch.float64)
        Engine(Target("other", model, byte_tokenizer()))
    assert all(word in str(error.value) for word in words)


def test_the_target_remains_as_it_was() -> None:
    target = make_tiny_target(max_length=CONTEXT)
    before = target.model.config._attn_implementation
    expected = greedy_by_transformers(target, torch.tensor([[5, 6]]), 8)
    first, second = Engine(target, make_tiny_head(target)), Engine(target)
    for engine in (first, second, first):
        assert engine.generate([[5, 6]], params())[0].token_ids[:8] == expected[0, 2:].tolist()
        assert target.model.config._attn_implementation == before
        assert torch.equal(greedy_by_transformers(target, torch.tensor([[5, 6]]), 8), expected)
