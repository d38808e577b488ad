"""Each family of targets from its folder to served answers: prepare, pretrain, adapt, merge, replay, decode.

All in float64, where the three ways of decoding must give the same tokens, and replay and engine the same τ.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, make_tiny_head, make_tiny_target
from families import (
    CONTEXT,
    EXPERTS,
    FAMILIES,
    LLAMA3_ROPE,
    PHI,
    SHORT_ROPE,
    SMALL,
    WINDOWS,
    longrope,
    save_model,
    target_of,
)
from oracle import PLANS, Case, Fickle, Oracle, engine_of, serve
from rich.console import Console
from tiny_targets import texts_from
from trained_heads import responses_of
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from written_data import prepared

from draft.data.dataset import Row
from draft.errors import UserError
from draft.evaluation.replay import replay
from draft.heads.checkpoint import load_head
from draft.target import load_target
from draft.training.config import resolve
from draft.training.merge import merge_run
from draft.training.trainer import Trainer
from serving.engine import Engine, SamplingParams

NEW = 12
DECODED_ONLY = ("qwen3", "mistral, windows", "mixtral, windows")
DRAFTED = {
    "plain": {"speculation": "off"},
    "chain": {"speculation": "chain"},
    "tree": {"speculation": "tree", "tree_size": 6},
}


def train(mode: Any, out: Path, **flags: Any) -> Path:
    common = {"dtype": "float64", "draft_steps": 2, "eval_every": 0, "max_steps": 2}
    return Trainer(resolve(mode, str(out), flags={**common, **flags}), Console(quiet=True)).train()


answers = partial(responses_of, max_new_tokens=NEW)


def decoded(engine: Engine, prompts: list[list[int]], **fields: Any) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(prompts, SamplingParams(NEW, **fields))]


# the others differ in nothing that training sees, and are decoded below and in test_exactness.py
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in DECODED_ONLY])
def test_from_a_folder_to_served_answers(family, tmp_path):
    folder = str(save_model(tmp_path / "target", FAMILIES[family][0], **FAMILIES[family][1]))
    target = load_target(folder, "float64")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"number {n}" * (1 + n % 2)}) + "\n" for n in range(4)))
    data = prepared(target, tmp_path / "data", prompts=[questions], max_new_tokens=NEW, held_out_share=0.5,
                    greedy_share=1.0, max_length=CONTEXT)  # fmt: skip
    rows = data.rows("train") + data.rows("held-out")
    prompts = [row.ids[: row.prompt_length] for row in rows]
    written = answers(target, prompts)
    assert [row.ids[row.prompt_length :] for row in rows] == written
    assert min(map(len, prompts)) > 20 and len({token for ids in written for token in ids}) > 1

    common = {"target": folder, "data": [str(tmp_path / "data")]}
    base = train("pretrain", tmp_path / "pretrained", draft_vocab_size=200, **common)
    train("adapt", tmp_path / "adapted", head=str(base), method="afa-lora", rank=2, alpha=4, **common)
    head, _ = load_head(merge_run(tmp_path / "adapted", tmp_path / "head").head, dtype=torch.float64)
    for options in DRAFTED.values():
        engine = Engine(target, head, speculation_length=3, max_batch=4, prefill_chunk=32, **options)
        completions = engine.generate(prompts, SamplingParams(NEW))
        assert [completion.token_ids for completion in completions] == written, options
        if options["speculation"] == "chain":
            emitted, verified = (sum(getattr(c.stats, n) for c in completions) for n in ("emitted", "verifications"))
            assert replay(target, {"head": head}, rows, 3)["head"].tau(3) == emitted / verified


# rotary embeddings that change with the length


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi")
    return load_target(str(save_model(folder, "phi3", **PHI, rope_parameters=longrope(4))), "float64")


def test_longrope_never_mixes_its_two_tables(phi):
    """A row on the way to the limit, beside short ones, is what transformers writes for it alone."""
    assert phi.max_length == SHORT_ROPE
    generator = torch.Generator().manual_seed(3)
    lengths = (SHORT_ROPE - NEW, 5, 20)
    prompts = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    for options in DRAFTED.values():
        engine = Engine(phi, make_tiny_head(phi), speculation_length=5, max_batch=3, **{**options, "tree_size": 16})
        assert engine.max_length == SHORT_ROPE and decoded(engine, prompts) == answers(phi, prompts)
    # the danger is real: one row beyond the limit changes the states of another
    alone = phi.decoder(torch.tensor([prompts[0]])).last_hidden_state[0]
    beyond = torch.zeros(2, SHORT_ROPE + 1, dtype=torch.int64)
    beyond[0, : len(prompts[0])] = torch.tensor(prompts[0])
    assert not torch.allclose(phi.decoder(beyond).last_hidden_state[0, : len(prompts[0])], alone)


def test_what_would_cross_the_limit_is_refused_by_name(phi, tmp_path):
    with pytest.raises(UserError, match=rf"max_length = {SHORT_ROPE + 1}.*longrope"):
        Engine(phi, max_length=SHORT_ROPE + 1)
    row = Row("long", [5] * (SHORT_ROPE + 1), [False] * 40 + [True] * 25, 40, 0.0, 1.0, "test")
    with pytest.raises(UserError, match="longrope"):
        replay(phi, {"head": make_tiny_head(phi)}, [row], 3)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    llama = load_target(str(save_model(tmp_path, "llama", rope_parameters=dynamic)), "float64")
    with pytest.raises(UserError, match="dynamic"):
        Engine(llama, max_length=CONTEXT + 1)
    assert make_tiny_head(phi).config.rope_parameters == {"rope_theta": 1e4, "rope_type": "default"}
    assert make_tiny_head(phi).config.max_position_embeddings == CONTEXT  # of the target's file, as engines compare


# what is no target, or only in part


def test_the_text_part_of_a_model_of_images_is_used(tmp_path):
    text = {**SMALL, "sliding_window": 6, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=200, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    target = load_target(str(tmp_path), "float64")
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [20, 21]]
    expected = answers(target, prompts)
    engine = Engine(target, make_tiny_head(target), speculation="tree", tree_size=8, speculation_length=3)
    assert decoded(engine, prompts) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "mamba"}, "MambaForCausalLM has no list of decoder layers"),
        ({"model_type": "rwkv"}, "RwkvForCausalLM has no list of decoder layers"),
        ({"model_type": "llava"}, "other media.*text part"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "doge"}, "by the values of the tokens"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "later tokens"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
         "quantised .bitsandbytes"),
        ({"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}, "quantised .fp8"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "quantised .mxfp4"),
        ({"model_type": "llama", "hidden_size": 2**16, "intermediate_size": 2**19}, "GiB.*several devices"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_target_is_refused_by_its_config(config, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        load_target(str(tmp_path), "float32", "cpu")


@pytest.mark.parametrize("layers", [1, 2])
def test_too_few_layers_for_the_default_ones(layers):
    target, head = target_of("llama", num_hidden_layers=layers), make_tiny_head(make_tiny_target())
    for build in (lambda: make_tiny_head(target), lambda: Engine(target, head)):
        with pytest.raises(UserError, match=f"has {layers} layers, too few"):
            build()
    assert decoded(Engine(target, speculation="off"), [[5, 6, 7]]) == answers(target, [[5, 6, 7]])


# one target, several threads


def test_engines_and_replay_share_a_target_from_several_threads():
    target = make_tiny_target()
    head = make_tiny_head(target)
    prompts = [[5, 6, 7], [9] * 20]
    expected = decoded(Engine(target, speculation="off"), prompts, ignore_eos=True)
    states = target.forward(torch.tensor([[5, 6, 7]]), layers=(2, 4, 5))

    def decode(speculation):
        engine = Engine(target, head, speculation=speculation, max_batch=2)
        for _ in range(2):
            assert decoded(engine, prompts, ignore_eos=True) == expected

    def read():
        for _ in range(20):
            output = target.forward(torch.tensor([[5, 6, 7]]), layers=(2, 4, 5))
            torch.testing.assert_close(output.auxiliary, states.auxiliary, rtol=0, atol=0)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor() as pool:
            works = [pool.submit(decode, name) for name in ("chain", "chain", "off")] + [pool.submit(read)]
            for work in works:
                work.result(240)
    finally:
        sys.setswitchinterval(switch)


# any decoder that takes an attention function; families with windows and bounded scores: test_exactness.py

# some choose their experts in float32, whatever the dtype of the model: their weights differ by some 1e-7, as the
# products of a CPU depend on the number of rows
TOLERANCE = 1e-5
EAGER_EXPERTS = {**EXPERTS, "experts_implementation": "eager"}
LATENT = {"head_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
          "v_head_dim": 6, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
          "topk_group": 1, "first_k_dense_replace": 2}  # fmt: skip
# name -> model type and what it adds to the common small shape
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
    "gemma": ("gemma", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 5}),
    "granite": ("granite", {"logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3}),
    "smollm3, layers without rope": ("smollm3", {"no_rope_layer_interval": 2}),
    "glm4": ("glm4", {"attention_bias": True}),
    "exaone4": ("exaone4", {"sliding_window": 5}),
    "deepseek_v3": ("deepseek_v3", {**EAGER_EXPERTS, **LATENT}),
    "mixtral, windows": FAMILIES["mixtral, windows"],
}


@pytest.mark.parametrize("family", ARCHITECTURES)
@torch.inference_mode()
def test_greedy_answers_are_those_of_transformers(family):
    kind, own = ARCHITECTURES[family]
    target = target_of(kind, **own)
    generator = torch.Generator().manual_seed(1)
    texts = [text for length in (1, 12) for text in texts_from(target, 2, length, 11, generator)]
    cases = [Case.greedy(text, text.written, SamplingParams(11, ignore_eos=True, logprobs=1)) for text in texts]
    oracle = engine_of(target, Oracle(target, 0.3, tolerance=TOLERANCE), Fickle(PLANS), max_batch=3, prefill_chunk=5)
    with_head = Engine(target, make_tiny_head(target), speculation="tree", tree_size=8, max_batch=4)
    for engine in (oracle, with_head):
        assert sum(completion.stats.drafted for completion in serve(engine, cases, TOLERANCE)) > 0


@pytest.mark.parametrize(
    ("kind", "own", "words"),
    [
        ("cohere", {}, "RMSNorm"),
        ("gpt_oss", {"num_local_experts": 4, **WINDOWS, **EAGER_EXPERTS}, "sinks"),
        ("qwen3_next", {"num_experts": 4, **EAGER_EXPERTS}, "linear_attention"),
        ("opt", {"ffn_dim": 32}, "list of decoder layers"),
        ("diffllama", {}, "more than once"),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_name(kind, own, words):
    with pytest.raises(UserError, match=words):
        Engine(target_of(kind, **own))


def test_the_target_remains_as_it_was():
    target = make_tiny_target()
    before = target.model.config._attn_implementation
    expected = answers(target, [[5, 6]])
    first, second = Engine(target, make_tiny_head(target)), Engine(target)
    for engine in (first, second, first):
        assert decoded(engine, [[5, 6]]) == expected
        assert target.model.config._attn_implementation == before
        assert answers(target, [[5, 6]]) == expected
