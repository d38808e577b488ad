"""Heads go to other engines' formats and come back bit for bit; what doesn't fit is refused with both values."""

import json
import shlex

import pytest
import torch
from interop.cases import random_head
from interop_heads import HEADS, files, make_world, refused
from safetensors.torch import load_file

from draft.heads.checkpoint import load_head, save_head
from draft.interop.exporting import export_head
from draft.interop.importing import import_head

FORMATS = ("plain", "vllm", "sglang", "speculators")
PLAIN = "plain EAGLE-3 of SGLang and vLLM"
# architecture -> format -> what it is recognised as
KINDS = {
    "eagle3": {"plain": PLAIN, "vllm": PLAIN, "sglang": PLAIN, "speculators": "speculators eagle3"},
    "eagle": {"vllm": "EAGLE-1 of vLLM", "sglang": "EAGLE-1 of SGLang"},
    "medusa": {"vllm": "Medusa of vLLM"},
}
WHY_NOT = {
    ("norm_before_residual", "plain"): "SGLang has no norm_before_residual",
    ("norm_before_residual", "sglang"): "SGLang has no norm_before_residual",
    ("EAGLE-1, fc_bias", "vllm"): "fc has a bias, which vLLM silently leaves out; use --format sglang",
    ("EAGLE-1, qkv_bias", "sglang"): "no biases of queries.*use --format vllm",
}
NAMES = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("option", HEADS)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_exported_and_imported_again_is_the_same_bit_for_bit(world, tmp_path, format, option):
    folder, target = world
    architecture = HEADS[option].get("architecture", "eagle3")
    kind, out = KINDS[architecture].get(format), tmp_path / "it's here"
    words = WHY_NOT.get(
        (option, format), "" if kind else r"architecture \w+ can't be exported as .*; use --format vllm"
    )
    if words:
        return refused(out, words, export_head, folder / option, format)
    exported = export_head(folder / option, format, out, speculation_length=9)
    imported = import_head(out, target, tmp_path / "back")
    assert files(tmp_path / "back") == files(folder / option) and imported.kind == kind
    assert load_head(tmp_path / "back")[1]["trained_rows"] == ["a"]
    commands = {engine: shlex.split(command) for engine, command in exported.commands.items()}
    assert set(commands) <= {"vLLM", "SGLang", "llama.cpp (conversion)"}
    assert all(str(out) in command.replace("'\"'\"'", "'") for command in exported.commands.values())
    if architecture == "medusa":
        assert not commands and exported.notes[0].startswith("vLLM 0.33 and later serve no Medusa heads")
    elif format == "plain":  # what vLLM loaded is in the table of its own tests
        export_head(folder / option, "vllm", tmp_path / "vllm")
        assert files(out) == files(tmp_path / "vllm")
    elif format == "speculators":
        assert commands == {"vLLM": ["vllm", "serve", str(out)]}
        config = json.loads((out / "config.json").read_text())["speculators_config"]
        assert config["proposal_methods"][0]["speculative_tokens"] == 9
    elif format == "vllm":
        speculative = {"method": architecture, "model": str(out), "num_speculative_tokens": 9}
        assert json.loads(commands["vLLM"][4]) == speculative
    if words := commands.get("SGLang"):
        assert words[words.index("--speculative-algorithm") + 1] == architecture.upper()
        assert words[words.index("--speculative-num-draft-tokens") + 1] == "10"


def test_our_own_folders_and_the_bundled_head_are_read(world, tmp_path):
    folder, target = world
    for option in ("EAGLE-1", "Medusa, two layers"):
        import_head(folder / option, target, tmp_path / option)
        assert files(tmp_path / option) == files(folder / option)
    assert (export_head("smollm2-eagle3", "speculators", tmp_path / "out").folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("EAGLE-3.1", "llama.cpp has no fc_norm and no norm_output, so there is no command for it"),
        ("five layers", "llama.cpp has no fc_norm and no auxiliary layers other than three, so"),
        ("three other layers", ""),
    ],
)
def test_llama_cpp_is_named_for_heads_that_it_can_serve(world, tmp_path, option, words):
    exported = export_head(world[0] / option, "plain", tmp_path / "out")
    assert ("llama.cpp (conversion)" in exported.commands) == (not words)
    notes = " ".join(note for note in exported.notes if note.startswith("llama.cpp"))
    assert words in notes and bool(words) == bool(notes)


@pytest.mark.parametrize(("option", "size"), [("full vocabulary", 259), ("shared LM head", None)])
def test_a_full_vocabulary_has_no_token_map_and_a_shared_lm_head_nothing_of_its_size(world, option, size):
    tensors = load_file(world[0] / option / "model.safetensors")
    assert not {"d2t", "t2d"} & set(tensors)  # vLLM fails on them
    assert json.loads((world[0] / option / "config.json").read_text())["draft_vocab_size"] == size
    assert ("lm_head.weight" in tensors) == (size is not None)


def test_other_layers_are_written_in_both_conventions(world, tmp_path):
    folder, target = world
    export_head(folder / "five layers", "sglang", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[NAMES] == [0, 2, 4, 5, 7] and config["eagle_config"][NAMES] == [-1, 1, 3, 4, 6]
    assert config["num_aux_hidden_states"] == 5
    # the state after the last layer is for vLLM only
    head = random_head(target, auxiliary_layers=[2, 4, 8])
    save_head(head, tmp_path / "head", dtype=torch.float32, about={"target": target.name})
    export_head(tmp_path / "head", "vllm", tmp_path / "vllm")
    refused(tmp_path / "none", r"\[2, 4, 8\] must rise, within 0 and 7", export_head, tmp_path / "head", "sglang")


@pytest.mark.parametrize(
    ("change", "about", "format", "words"),
    [
        ({"vocab_size": 300}, None, "plain", "vocab_size is 300 and the target's is 259"),
        ({"max_position_embeddings": 64}, None, "plain", "max_position_embeddings is 64 and the target's is 512"),
        ({}, None, "onnx", r"choose one of plain, vllm, sglang, speculators\."),
        ({}, {}, "plain", "pass --target"),
    ],
)
def test_a_head_that_an_engine_would_stumble_over_is_not_written(world, tmp_path, change, about, format, words):
    target = world[1]
    head = random_head(target)
    for key, value in change.items():
        setattr(head.config, key, value)
    head = type(head)(head.config)
    head.set_vocabulary(torch.arange(200))
    about = {"target": target.name} if about is None else about
    save_head(head, tmp_path / "head", dtype=torch.float32, about=about)
    refused(tmp_path / "out", words, export_head, tmp_path / "head", format)


def test_a_head_of_an_adapted_target_says_so(world, tmp_path):
    target = world[1]
    save_head(random_head(target), tmp_path / "head", dtype=torch.float32, about={"target_adapter": "runs/tuned"})
    exported = export_head(tmp_path / "head", "plain", tmp_path / "out", target=target.name)
    assert len(exported.commands) == 3 and "'runs/tuned'" in exported.notes[-1]
