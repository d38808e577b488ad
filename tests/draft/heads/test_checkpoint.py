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
        (lambda t: (t.pop("t2d"), t["d2t"].add_(100)), "d2t maps draft id 159 to target id 259.*is 259"),
        (lambda t: t["d2t"].view(-1)[3:4].sub_(1), "d2t maps 200 draft ids to only 199"),
        (lambda t: t["t2d"].view(-1)[250:251].fill_(True), "t2d marks 201 of 259.*different heads"),
        (lambda t: t.update(d2t=t["d2t"].to(torch.bfloat16)), "d2t is of dtype bfloat16.*a list of integers"),
        (lambda t: t.update(t2d=t["t2d"].to(torch.float32)), "t2d is of dtype float32.*a list of integers"),
        (lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.int8)}), "fc.weight is of dtype int8.*quantised"),
        (
            lambda t: t.update({"fc.weight": t["fc.weight"].to(torch.float8_e4m3fn)}),
            "fc.weight is of dtype float8_e4m3fn",
        ),
        (lambda t: t.update({"fc.weight_scale": torch.ones(1)}), "fc.weight_scale is unexpected"),
        (lambda t: t.update({"midlayer.self_attn.sinks": torch.ones(4)}), "midlayer.self_attn.sinks is unexpected"),
        (lambda t: t["fc.weight"].view(-1)[7:8].fill_(math.inf), "fc.weight holds NaN or infinity"),
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
        ("norm_before_residual", "no", "norm_before_residual = 'no'; it must be true or false"),
        ("eagle_config", {"use_last_layernorm": False}, "eagle_config.use_last_layernorm"),
        ("layer_types", ["sliding_attention"], "sliding_attention"),
        ("sliding_window", 16, "sliding_window = 16 is not supported"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping = 50.0"),
        ("attention_sinks", True, "attention_sinks = True"),
        ("query_pre_attn_scalar", 64, "query_pre_attn_scalar = 64"),
        ("attention_multiplier", 0.1, "attention_multiplier = 0.1"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config.*before it was quantised"),
        ("rope_parameters", {"rope_type": "longrope", "factor": 2.0}, "'longrope', which depends on a text's length"),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("hidden_size", 10**6, "hidden_size = 1000000, and its tensors hold"),
        ("draft_vocab_size", 259, "d2t reorders"),
        ("architectures", ["OtherModel"], "OtherModel"),
        ("rms_norm_eps", None, "rms_norm_eps"),
        ("rms_norm_eps", math.inf, "rms_norm_eps = inf"),
        ("rms_norm_eps", 1e300, r"rms_norm_eps = 1e\+300.*less than or equal to 1"),
        ("rms_norm_eps", 0.0, "rms_norm_eps = 0.0"),
        ("hidden_size", -32, "hidden_size = -32"),
        ("intermediate_size", 0, "intermediate_size = 0"),
        ("num_attention_heads", -4, "num_attention_heads = -4"),
        ("num_key_value_heads", 0, "num_key_value_heads = 0"),
        ("head_dim", -8, "head_dim = -8"),
        ("head_dim", 0, "head_dim = 0"),
        ("vocab_size", -1, "vocab_size = -1"),
        ("draft_vocab_size", 0, "draft_vocab_size = 0"),
        ("max_position_embeddings", -5, "max_position_embeddings = -5"),
        ("eagle_aux_hidden_state_layer_ids", [3, 1, 4], r"\[3, 1, 4\].*must rise"),
        ("eagle_config", {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}, "1,3,5 as vLLM reads it, 2,4,6 as SGLang"),
        ("num_attention_heads", 0, "num_attention_heads = 0"),
        ("num_key_value_heads", 3, "4 attention heads can't share 3"),
        ("rope_parameters", {"rope_type": "su", "factor": 2.0}, "unknown rope_type.*'su'"),
        ("rope_parameters", {"rope_type": "yarn"}, "lacks a value.*factor"),
        ("rope_parameters", {"rope_type": "linear", "factor": -2.0}, "positive, finite frequencies"),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}, "an object for full_attention"),
        ("rope_theta", 5e5, "rope_theta is 10000.0 in rope_parameters and 500000.0 beside it"),
        (
            "rope_scaling",
            {"rope_type": "linear", "factor": 2.0},
            "rope_type is 'default' in rope_parameters and 'linear'",
        ),
        ("scale_embeddings", True, "scale_embeddings = True"),
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


@pytest.mark.parametrize("theta", [0, -1e4, 1.0, math.inf, math.nan, "big", True])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_theta"])
def test_a_rope_theta_that_no_head_has_is_refused(folder, theta, spelling):
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"], config["rope_parameters"]
    config[spelling] = {"rope_type": "default", "rope_theta": theta} if spelling == "rope_parameters" else theta
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"rope_theta = {theta!r}: it must be a finite number above 1"):
        load_head(folder)


@pytest.mark.parametrize("values", [
    {"sliding_window": 512, "use_sliding_window": False, "max_window_layers": 3}, {"sliding_window": None},
    {"layer_types": ["full_attention"]}, {"attn_logit_softcapping": None}, {"attention_multiplier": 1.0},
    {"attention_dropout": 0.1, "attn_implementation": "sdpa"},
], ids=lambda values: next(iter(values)))  # fmt: skip
def test_settings_of_no_effect_are_passed_over(folder, values, tiny_head):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    assert load_head(folder)[0].config == tiny_head.config


def test_a_weight_that_a_narrower_dtype_cannot_hold_is_named(folder):
    edit(folder, lambda tensors: tensors["norm.weight"].fill_(1e5))
    with pytest.raises(UserError, match="norm.weight is too large for float16"):
        load_head(folder, dtype=torch.float16)


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
