"""Each family of targets from its folder to served answers: prepare, pretrain, adapt, merge, replay, decode.

All in float64, where the three ways of decoding must give the same tokens, and replay and engine the same τ.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, make_tiny_head, make_tiny_target
from families import CONTEXT, FAMILIES, LONGROPE, PHI, SHORT_ROPE, SMALL, save_family, save_model
from rich.console import Console
from written_data import prepared

from draft.data.dataset import Row
from draft.errors import UserError
from draft.evaluation.replay import replay
from draft.heads.checkpoint import load_head
from draft.target import Target, load_target
from draft.training.config import resolve
from draft.training.merge import merge_run
from draft.training.trainer import Trainer
from serving.engine import Engine, SamplingParams

NEW = 12
DRAFTED = {
    "plain": {"speculation": "off"},
    "chain": {"speculation": "chain"},
    "tree": {"speculation": "tree", "tree_size": 6},
}


def train(mode: Any, out: Path, **flags: Any) -> Path:
    common = {"dtype": "float64", "draft_steps": 2, "eval_every": 0, "max_steps": 2}
    return Trainer(resolve(mode, str(out), flags={**common, **flags}), Console(quiet=True)).train()


def answers(target: Target, prompts: list[list[int]], count: int = NEW) -> list[list[int]]:
    """transformers' own, one prompt after the other."""
    written = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        ends = sorted(target.eos_token_ids)
        options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 2, "eos_token_id": ends}
        all_ids = target.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        written.append(all_ids[0, len(prompt) :].tolist())
    return written


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_folder_to_served_answers(family: str, tmp_path: Path) -> None:
    folder = str(save_family(tmp_path / "target", family))
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
    train("adapt", tmp_path / "adapted", head=str(base), rank=2, alpha=4, **common)
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
def phi(tmp_path_factory: pytest.TempPathFactory) -> Target:
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 6.0, 9.0, 12.0]}
    folder = save_model(tmp_path_factory.mktemp("phi"), "phi3", **PHI, rope_parameters={**LONGROPE, **factors})
    return load_target(str(folder), "float64")


def test_longrope_never_mixes_its_two_tables(phi: Target) -> None:
    """A row on the way to the limit, beside short ones, is what transformers writes for it alone."""
    assert phi.max_length == SHORT_ROPE
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in (SHORT_ROPE - 10, 5, 20)]
    expected = answers(phi, prompts, 10)
    for options in DRAFTED.values():
        engine = Engine(phi, make_tiny_head(phi), speculation_length=5, max_batch=3, **{**options, "tree_size": 16})
        assert engine.max_length == SHORT_ROPE
        got = [completion.token_ids for completion in engine.generate(prompts, SamplingParams(10, ignore_eos=True))]
        assert [ids[: len(e)] for ids, e in zip(got, expected, strict=True)] == expected
    # the danger is real: one row beyond the limit changes the states of another
    alone = phi.decoder(torch.tensor([prompts[0]])).last_hidden_state[0]
    beyond = torch.zeros(2, SHORT_ROPE + 1, dtype=torch.int64)
    beyond[0, : len(prompts[0])] = torch.tensor(prompts[0])
    assert not torch.allclose(phi.decoder(beyond).last_hidden_state[0, : len(prompts[0])], alone)


def test_what_would_cross_the_limit_is_refused_by_name(phi: Target, tmp_path: Path) -> None:
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


def test_the_text_part_of_a_model_of_images_is_used(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

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
    assert [completion.token_ids for completion in engine.generate(prompts, SamplingParams(NEW))] == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "mamba"}, "state-space"),
        ({"model_type": "rwkv"}, "state-space or recurrent"),
        ({"model_type": "llava"}, "other media.*text part"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "doge"}, "by the values of the tokens"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "later tokens"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
         "quantised .bitsandbytes, 4 bits"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
         "quantised .bitsandbytes, 8 bits"),
        ({"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}, "quantised .fp8"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "quantised .mxfp4"),
        ({"model_type": "llama", "hidden_size": 2**16, "intermediate_size": 2**19}, "GiB.*several devices"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_target_is_refused_by_its_config(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        load_target(str(tmp_path), "float32", "cpu")


@pytest.mark.parametrize("layers", [1, 2])
def test_too_few_layers_for_the_default_ones(layers: int, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "target", "llama", num_hidden_layers=layers)
    target = load_target(str(folder), "float64")
    with pytest.raises(UserError, match=f"has {layers} layers, too few"):
        make_tiny_head(target)
    head = make_tiny_head(make_tiny_target())
    with pytest.raises(UserError, match=f"has {layers} layers, too few"):
        Engine(target, head)
    expected = answers(target, [[5, 6, 7]])
    assert [c.token_ids for c in Engine(target).generate([[5, 6, 7]], SamplingParams(NEW))] == expected


# one target, several threads


def test_engines_and_replay_share_a_target_from_several_threads() -> None:
    target = make_tiny_target()
    head = make_tiny_head(target)
    prompts = [[5, 6, 7], [9] * 20]
    expected = Engine(target).generate(prompts, SamplingParams(NEW, ignore_eos=True))
    states = target.forward(torch.tensor([[5, 6, 7]]), layers=(2, 4, 5))
    failures: list[object] = []

    def decode(speculation: str) -> None:
        engine = Engine(target, head, speculation=speculation, max_batch=2)
        for _ in range(6):
            got = engine.generate(prompts, SamplingParams(NEW, ignore_eos=True))
            if [c.token_ids for c in got] != [c.token_ids for c in expected]:
                failures.append(speculation)

    def read() -> None:
        for _ in range(60):
            output = target.forward(torch.tensor([[5, 6, 7]]), layers=(2, 4, 5))
            assert output.auxiliary is not None and states.auxiliary is not None
            if not torch.equal(output.auxiliary, states.auxiliary):
                failures.append("read")

    def guarded(work: Any, *arguments: str) -> None:
        try:
            work(*arguments)
        except Exception as error:
            failures.append(error)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=guarded, args=(decode, name)) for name in ("chain", "chain", "off")]
        threads.append(threading.Thread(target=guarded, args=(read,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert failures == []
