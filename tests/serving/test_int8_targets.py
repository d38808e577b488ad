"""Targets with int8 weights: the integers of a GGUF file in Q8_0, and matrices that cannot be rounded."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, make_tiny_target
from families import FAMILIES, target_of
from torch import Tensor

from cpu_kernels.ops import packed_linear
from serving.cli import load_engine
from serving.engine import Engine

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a projection in the order that GGUF files have them in: halves of a head become pairs."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_q8_0(file: Path) -> dict[str, np.ndarray]:
    """Write a tiny Llama; returns the rounded weights, level times scale, by the names of its modules."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 260}
    model = make_tiny_target(dtype=torch.float32, **shape).model
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(260)
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocabulary, key=lambda token: vocabulary[token]), "aa"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a a"])  # without any the file is not read
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kept = {}
    for name, tensor in model.state_dict().items():
        weight, module = tensor.numpy(), name.removesuffix(".weight")
        place = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.get(module)
        if module == "lm_head":  # tied to the embedding
            continue
        part = ""
        if place is None:
            layer, part = module.removeprefix("model.layers.").split(".", 1)
            place = f"blk.{layer}.{NAMES[part]}"
        if weight.ndim == 1:
            writer.add_tensor(f"{place}.weight", weight)
            continue
        blocks = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
        kept[module] = levels_times_scales(blocks)
        blocks = turned(blocks, HEADS[part]) if part in HEADS else blocks
        writer.add_tensor(f"{place}.weight", np.ascontiguousarray(blocks), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    kept["lm_head"] = kept["model.embed_tokens"]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def levels_times_scales(blocks: np.ndarray) -> np.ndarray:
    """Rows of bytes -> float64: a block is a float16 scale and 32 int8 levels."""
    parts = blocks.reshape(len(blocks), -1, 34)
    scales = np.ascontiguousarray(parts[..., :2]).view(np.float16).astype(np.float64)
    return (parts[..., 2:].view(np.int8) * scales).reshape(len(blocks), -1)


def multiplied(module: torch.nn.Module) -> Tensor:
    """127 times the weight that a packed layer multiplies by, [out, in]: 127 is kept, a product rounded once."""
    units = 127 * torch.eye(module.in_features)
    return packed_linear(units, module.packed, module.out_features).T


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_integers_are_those_of_the_file(tmp_path, dtype):
    kept = write_q8_0(tmp_path / "tiny.gguf")
    options = {"mode": "compiled", "weights": "int8", "speculation": "off", "max_batch": 2}
    loading = {"target_adapter": None, "chat_template": None, "warm_up": False, "self_check": False, "threads": 1}
    engine = load_engine(str(tmp_path / "tiny.gguf"), None, dtype, **loading, **options)
    model = engine.models.runner.target.model
    same = [
        torch.equal(multiplied(model.get_submodule(name)), (127 * torch.from_numpy(weight)).float())
        for name, weight in kept.items()
        if name != "model.embed_tokens"
    ]
    assert len(same) == 15
    assert all(same) if dtype == "auto" else not any(same)  # bfloat16 rounds what is rounded again


@pytest.mark.parametrize(("family", "warned"), [("llama", False), ("qwen3_moe", True)])
def test_matrices_that_stay_as_they_are_are_reported(family, warned, caplog):
    kind, own = FAMILIES[family]
    target = target_of(kind, **own)
    target.model.float()
    Engine(target, None, mode="compiled", weights="int8", speculation="off", max_batch=1)
    assert ("of the matrices stay in float32" in caplog.text) == warned
