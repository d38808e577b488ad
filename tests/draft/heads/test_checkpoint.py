"""Heads are read strictly and written whole."""

import json
import math

import pytest
import torch
from conftest import make_tiny_target
from safetensors.torch import load_file, save_file

from draft.errors import UserError
from draft.heads.checkpoint import attach_head, head_sha256, load_head, save_head

NORMS = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
MATRICES = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", *(f"self_attn.{letter}_proj" for letter in "qkvo"))
PLAIN_NAMES = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
PLAIN_NAMES |= {f"midlayer.{name}.weight" for name in NORMS + MATRICES}


@pytest.fixture
def folder(tiny_head, tiny_target, tmp_path):
    save_head(tiny_head, tmp_path / "head", dtype=torch.float64, about={"target_fingerprint": tiny_target.fingerprint})
    return tmp_path / "head"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_round_trip_is_exact(folder, tiny_head):
    head, about = load_head(folder)
    assert about["target_fingerprint"]
    assert head.config == tiny_head.config
    for (name, ours), theirs in zip(tiny_head.state_dict().items(), head.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_file_has_the_names_and_offsets_that_engines_read(folder, tiny_head):
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == PLAIN_NAMES
    target_ids = torch.arange(len(tensors["d2t"])) + tensors["d2t"]
    assert torch.equal(target_ids, tensors["t2d"].nonzero()[:, 0])
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 1
    assert config["draft_vocab_size"] == 200 and config["vocab_size"] == 259
    assert config["norm_before_residual"] is False and config["tie_word_embeddings"] is False
    assert not any("layer_ids" in key for key in config)  # engines disagree on what such ids mean


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("fc.weight"), "fc.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is unexpected"),
        (lambda t: t.update({"embed_tokens.weight": torch.zeros(259, 32)}), "embed_tokens.*draft-train import"),
        (lambda t: (t.pop("t2d"), t["d2t"].add_(100)), "target ids from 100 to 299.*has 259"),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), r"norm.weight has shape \(3,\)"),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, words):
    edit(folder, change)
    with pytest.raises(UserError, match=words):
        load_head(folder)


def test_names_of_other_trainers_are_understood(folder, tiny_head):
    def rename(tensors):
        for name in [name for name in tensors if name.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)
        del tensors["t2d"]

    edit(folder, rename)
    head, _ = load_head(folder)
    assert torch.equal(head.t2d, tiny_head.t2d)
    assert torch.equal(head.midlayer.mlp.up_proj.weight, tiny_head.midlayer.mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("mlp_bias", True, "mlp_bias = True"),
        ("eagle_config", {"use_last_layernorm": False}, "eagle_config.use_last_layernorm"),
        ("layer_types", ["sliding_attention"], "sliding_attention"),
        ("draft_vocab_size", 259, "d2t reorders"),
        ("architectures", ["OtherModel"], "OtherModel"),
        ("rms_norm_eps", None, "rms_norm_eps"),
        ("rms_norm_eps", math.inf, "rms_norm_eps = inf"),
        ("eagle_aux_hidden_state_layer_ids", [3, 1, 4], r"\[3, 1, 4\].*must rise"),
        ("eagle_config", {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}, "1,3,5 as vLLM reads it, 2,4,6 as SGLang"),
        ("num_attention_heads", 0, "num_attention_heads = 0"),
        ("num_key_value_heads", 3, "4 attention heads can't share 3"),
        ("rope_parameters", {"rope_type": "su", "factor": 2.0}, "unknown rope_type.*'su'"),
        ("rope_parameters", {"rope_type": "yarn"}, "lacks a value.*factor"),
        ("rope_parameters", {"rope_type": "linear", "factor": 0.0}, "finite|ZeroDivision"),
    ],
)
def test_an_unsupported_config_is_refused(folder, key, value, words):
    config = json.loads((folder / "config.json").read_text())
    config[key] = value
    if value is None:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        attach_head(*load_head(folder), make_tiny_target())


def test_the_older_spelling_of_a_scaled_rotary_embedding_is_read(folder, tiny_head):
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    head, _ = load_head(folder)
    assert torch.equal(head.rope.inverse_frequencies * 2, tiny_head.rope.inverse_frequencies)
    save_head(head, folder, dtype=torch.float64, about={})
    again, _ = load_head(folder)
    assert torch.equal(again.rope.inverse_frequencies, head.rope.inverse_frequencies)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "[]", "config.json' holds a list"),
        ("config.json", "{ nonsense", "config.json"),
        ("model.safetensors", "{ nonsense", "model.safetensors' is not a whole"),
        ("model.safetensors", None, "model.safetensors' is missing"),
    ],
)
def test_a_damaged_file_is_named(folder, name, content, words):
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(UserError, match=words):
        load_head(folder)
    if content is None:
        with pytest.raises(UserError, match=words):  # and it has no hash either
            head_sha256(folder)


def test_a_missing_head_names_the_bundled_ones(tmp_path):
    with pytest.raises(UserError, match="smollm2-eagle3"):
        load_head(tmp_path / "nowhere")


def test_another_target_is_refused_with_both_fingerprints(folder, tiny_target):
    head, about = load_head(folder)
    other = make_tiny_target(seed=1)
    attach_head(head, about, tiny_target)
    with pytest.raises(UserError, match=f"{tiny_target.fingerprint}.*{other.fingerprint}"):
        attach_head(head, about, other)
