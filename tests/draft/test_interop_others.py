"""EAGLE-1 and Medusa heads go to other engines' formats and come back, and those of other trainers are understood."""

import json
import shlex

import pytest
import torch
from interop_heads import Foreign, files, make_world, refused

from draft.errors import UserError
from draft.heads.checkpoint import load_head
from draft.interop.exporting import export_head
from draft.interop.importing import import_head

# heads of other architectures: options, and the formats that they have with what they are recognised as
FORMATS = ("plain", "vllm", "sglang", "speculators")
MEDUSA = {"vllm": "Medusa of vLLM"}
OTHERS = {
    "EAGLE-1": ({"architecture": "eagle"}, {"vllm": "EAGLE-1 of vLLM", "sglang": "EAGLE-1 of SGLang"}),
    "EAGLE-1, fc_bias": ({"architecture": "eagle", "fc_bias": True}, {"sglang": "EAGLE-1 of SGLang"}),
    "EAGLE-1, qkv_bias": ({"architecture": "eagle", "qkv_bias": True}, {"vllm": "EAGLE-1 of vLLM"}),
    "Medusa": ({"architecture": "medusa"}, MEDUSA),
    "Medusa, full": ({"architecture": "medusa", "draft_vocab_size": 259, "num_heads": 2}, MEDUSA),
    "Medusa, shared": ({"architecture": "medusa", "draft_vocab_size": 259, "shared_lm_head": True}, MEDUSA),
    "Medusa, two layers": ({"architecture": "medusa", "num_layers": 2}, MEDUSA),
}
WHY_NOT = {
    ("EAGLE-1, fc_bias", "vllm"): "fc has a bias, which vLLM silently leaves out; use --format sglang",
    ("EAGLE-1, qkv_bias", "sglang"): "no biases of queries.*use --format vllm",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target on disk, and the heads beside it."""
    return make_world(tmp_path_factory.mktemp("world"), {name: options for name, (options, _) in OTHERS.items()})


@pytest.mark.parametrize("option", OTHERS)
@pytest.mark.parametrize("format", FORMATS)
def test_other_architectures_go_and_come_back_too(world, tmp_path, format, option):
    folder, target = world
    _, formats = OTHERS[option]
    if format not in formats:
        words = WHY_NOT.get((option, format), r"architecture \w+ can't be exported as .*; use --format vllm")
        refused(tmp_path / "out", words, export_head, folder / option, format)
        return
    exported = export_head(folder / option, format, tmp_path / "out", speculation_length=9)
    imported = import_head(tmp_path / "out", target, tmp_path / "back")
    assert files(tmp_path / "back") == files(folder / option)
    assert imported.kind == formats[format]
    for engine, command in exported.commands.items():
        words = shlex.split(command)
        assert str(tmp_path / "out") in command
        if engine == "vLLM":
            speculative = {"method": "eagle", "model": str(tmp_path / "out"), "num_speculative_tokens": 9}
            assert words[:3] == ["vllm", "serve", target.name] and json.loads(words[4]) == speculative
        elif engine == "SGLang":
            assert words[words.index("--speculative-algorithm") + 1] == "EAGLE"
    if "Medusa" in option:
        assert not exported.commands and exported.notes[0].startswith("vLLM 0.33 and later serve no Medusa heads")
    # our own folder is read as well
    import_head(folder / option, target, tmp_path / "again")
    assert files(tmp_path / "again") == files(folder / option)


def as_fasterdecoding(foreign):
    """Names and configuration of FasterDecoding's `medusa_model.py`: one linear layer and an LM head a position."""
    count, shared = foreign.config["num_heads"], foreign.tensors.get("lm_head.weight")
    tensors = {}
    for index in range(count):
        for what in ("weight", "bias"):
            tensors[f"{index}.0.linear.{what}"] = foreign.tensors[f"blocks.{index}.layers.0.{what}"]
        tensors[f"{index}.1.weight"] = foreign.tensors.get(f"lm_heads.{index}.weight", shared)
    foreign.tensors = tensors | {name: foreign.tensors[name] for name in ("d2t", "t2d") if name in foreign.tensors}
    foreign.config = {"medusa_num_heads": count, "medusa_num_layers": 1, "base_model_name_or_path": "vicuna"}


def test_an_eagle_head_of_safeailab_is_read_from_a_pickle_and_completed(world, tmp_path):
    foreign = Foreign(world, tmp_path, "vllm", "EAGLE-1, qkv_bias")
    for key in ("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps", "head_dim", "qkv_bias"):
        del foreign.config[key]
    foreign.config.update(architectures=["LlamaForCausalLM"], max_position_embeddings=64, bias=True)
    target = foreign.target
    foreign.tensors |= {
        "embed_tokens.weight": target.embedding.weight.detach().half(),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "fc.bias": torch.zeros(32, dtype=torch.bfloat16),
    }
    foreign.publish("pytorch_model.bin")
    words = ("rms_norm_eps = 1e-06", "rope_theta = 10000.0", "from 64 to the target's 512", "embed_tokens", "fc.bias")
    imported, head = foreign.taken(*words)
    assert imported.kind == "SafeAILab EAGLE-1" and head.config.qkv_bias and not head.config.fc_bias


def test_a_bias_that_says_something_is_kept(world, tmp_path):
    foreign = Foreign(world, tmp_path, "sglang", "EAGLE-1, fc_bias")
    del foreign.config["eagle_fc_bias"]
    foreign.publish("model.safetensors")
    imported, head = foreign.taken("fc has a bias, which SGLang knows and vLLM leaves out")
    assert imported.kind == "EAGLE-1 of SGLang" and head.config.fc_bias


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c, t: c.update(hidden_size=64), "hidden size is 64 and the target's is 32"),
        (lambda c, t: c.update(vocab_size=300), "vocabulary is 300 and the target's is 259"),
        (lambda c, t: t.update({"lm_head.weight": torch.zeros(259, 32)}), "lm_head.weight is not the target's"),
        (lambda c, t: t.update({"embed_tokens.weight": torch.zeros(259, 32)}), "embed_tokens.weight differs"),
        (lambda c, t: t.update({"layers.0.input_layernorm.weight": torch.ones(32)}), "input_layernorm.* unexpected"),
        (lambda c, t: t.pop("layers.0.mlp.up_proj.weight"), "up_proj.weight is missing"),
        (lambda c, t: c.update(num_hidden_layers=2), "num_hidden_layers = 2"),
    ],
)
def test_an_eagle_head_that_does_not_fit_is_refused_with_both_values(world, tmp_path, edit, words):
    foreign = Foreign(world, tmp_path, "vllm", "EAGLE-1")
    edit(foreign.config, foreign.tensors)
    foreign.publish("model.safetensors")
    foreign.refused(words)


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "pytorch_model.bin"])
def test_a_medusa_head_of_fasterdecoding_is_counted_by_its_file(world, tmp_path, file):
    """Published configurations say 2 or 3 positions beside files of 5, and neither of the target's sizes."""
    foreign = Foreign(world, tmp_path, "vllm", "Medusa, shared")
    as_fasterdecoding(foreign)
    foreign.config["medusa_num_heads"] = 3
    foreign.tensors = {f"medusa_head.{name}": value for name, value in foreign.tensors.items()}
    foreign.publish(file)
    imported, head = foreign.taken("medusa_num_heads = 3, and the file 5 positions", "left out the LM heads")
    assert imported.kind == "FasterDecoding Medusa" and head.longest == 5


@pytest.mark.parametrize("option", ["Medusa", "Medusa, full"])
def test_a_medusa_head_of_fasterdecoding_keeps_its_lm_heads(world, tmp_path, option):
    foreign = Foreign(world, tmp_path, "vllm", option)
    as_fasterdecoding(foreign)
    foreign.publish("medusa_lm_head.pt")
    assert foreign.taken()[0].kind == "FasterDecoding Medusa"


def test_vllms_token_map_is_ours_in_other_words(world, tmp_path):
    foreign = Foreign(world, tmp_path, "vllm", "Medusa")
    ids = foreign.tensors.pop("d2t") + torch.arange(200)
    del foreign.tensors["t2d"]
    foreign.tensors["token_map"] = ids
    foreign.config["truncated_vocab_size"] = 200
    foreign.publish("model.safetensors")
    _, head = foreign.taken("t2d from d2t")
    assert torch.equal(head.vocabulary, ids)


def test_one_lm_head_of_all_positions_is_one_for_each(world, tmp_path):
    foreign = Foreign(world, tmp_path, "vllm", "Medusa, full")
    single = foreign.tensors.pop("lm_heads.0.weight")
    del foreign.tensors["lm_heads.1.weight"]
    foreign.tensors["lm_head.weight"] = single
    foreign.config["original_lm_head"] = True
    foreign.publish("model.safetensors")
    imported = import_head(foreign.folder, foreign.target, foreign.out)
    assert "the one LM head" in " ".join(imported.notes)
    head, _ = load_head(foreign.out)
    assert all(torch.equal(lm_head.weight, single) for lm_head in head.lm_heads) and len(head.lm_heads) == 2


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c, t: c.update(vocab_size=300), "vocabulary is 300 and the target's is 259"),
        (lambda c, t: c.update(logit_scale=0.5), "logit_scale = 0.5"),
        (lambda c, t: t.pop("lm_heads.1.weight"), r"lm_heads.1.weight is missing, of 2 positions"),
        (lambda c, t: t.update({"lm_heads.1.weight": torch.zeros(300, 32)}), "has 300 rows and the target's .* 259"),
        (lambda c, t: t.update(token_map=torch.arange(60, 319)), "draft id 199 to target id 259.* is 259"),
        (lambda c, t: t.update({"blocks.1.layers.0.weight": torch.zeros(9, 9)}), r"\(9, 9\), its config"),
        (lambda c, t: t.pop("blocks.0.layers.0.weight"), "blocks.0.layers.0.weight is missing"),
    ],
)
def test_a_medusa_head_that_does_not_fit_is_refused(world, tmp_path, edit, words):
    foreign = Foreign(world, tmp_path, "vllm", "Medusa, full")
    edit(foreign.config, foreign.tensors)
    foreign.publish("model.safetensors")
    foreign.refused(words)


def test_a_wider_medusa_head_is_refused_with_both_values(world, tmp_path):
    foreign = Foreign(world, tmp_path, "vllm", "Medusa, full")
    foreign.tensors = {"blocks.0.layers.0.weight": torch.zeros(64, 64), "lm_heads.0.weight": torch.zeros(259, 64)}
    foreign.publish("model.safetensors")
    foreign.refused("hidden size is 64 and the target's is 32")


def test_a_medusa_pickle_that_would_run_code_is_refused(world, tmp_path):
    class Trap:
        def __reduce__(self):
            return (type(tmp_path), (str(tmp_path),))

    foreign = Foreign(world, tmp_path, "vllm", "Medusa, full")
    foreign.tensors = {"0.0.linear.weight": Trap()}
    foreign.publish("medusa_lm_head.pt")
    foreign.refused("more than tensors")


def test_auxiliary_layers_are_for_heads_that_have_some(world, tmp_path):
    for option, format in (("EAGLE-1", "vllm"), ("Medusa", "vllm")):
        export_head(world[0] / option, format, tmp_path / option)
        with pytest.raises(UserError, match="--auxiliary-layers 2,4,5: .* is no EAGLE-3 head"):
            import_head(tmp_path / option, world[1], tmp_path / "out", auxiliary_layers=[2, 4, 5])
