"""Heads go to other engines' formats and come back bit for bit; what doesn't fit is refused with both values."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from interop import cases
from interop.cases import CASES, random_head
from interop_heads import files, make_world, refused
from safetensors.torch import load_file

from draft.heads.checkpoint import load_head, save_head
from draft.interop.eagle3 import EAGLE3_FORMATS
from draft.interop.exporting import export_head
from draft.interop.importing import import_head

FORMATS = tuple(EAGLE3_FORMATS)
TABLE = Path(cases.__file__).parent / "table.json"
NAMES = "eagle_aux_hidden_state_layer_ids"
# (format, option) -> why it can't be
REFUSED = {
    ("plain", "norm_before_residual"): "SGLang has no norm_before_residual",
    ("sglang", "norm_before_residual"): "SGLang has no norm_before_residual",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target on disk, and a head with each option beside it."""
    return make_world(tmp_path_factory.mktemp("world"), CASES)


@pytest.mark.parametrize("option", CASES)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_exported_and_imported_again_is_the_same_bit_for_bit(world, tmp_path, format, option):
    folder, target = world
    if (format, option) in REFUSED:
        refused(tmp_path / "out", REFUSED[format, option], export_head, folder / option, format)
        return
    export_head(folder / option, format, tmp_path / "out")
    imported = import_head(tmp_path / "out", target, tmp_path / "back")
    assert files(tmp_path / "back") == files(folder / option)
    assert load_head(tmp_path / "back")[1]["trained_rows"] == ["a"]
    assert imported.kind.startswith("speculators" if format == "speculators" else "plain")


@pytest.mark.parametrize("case", CASES)
def test_what_speculators_loaded_is_what_is_written(world, tmp_path, case):
    """`make interop` wrote the table after the package had loaded these and given our logits."""
    written = json.loads(TABLE.read_text())["speculators"]["cases"][case]
    export_head(world[0] / case, "speculators", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: list(value.shape) for name, value in tensors.items()} == written["tensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in written["config"]} == written["config"]
    assert "model_type" not in config and sorted(config) == written["keys"]
    assert sorted(config["transformer_layer_config"]) == written["layer_keys"]


def test_the_bundled_head_can_be_exported(tmp_path):
    for format in ("plain", "speculators"):
        exported = export_head("smollm2-eagle3", format, tmp_path / format)
        assert (exported.folder / "model.safetensors").is_file()


@pytest.mark.parametrize("format", FORMATS)
def test_the_command_lines_name_target_head_and_length(world, tmp_path, format):
    folder, target = world
    out = tmp_path / "it's here"
    commands = export_head(folder / "default", format, out, speculation_length=5).commands
    assert set(commands) <= {"vLLM", "SGLang", "llama.cpp (conversion)"}
    for engine, command in commands.items():
        words = shlex.split(command)
        assert str(out) in command.replace("'\"'\"'", "'")
        if format == "speculators":
            assert words == ["vllm", "serve", str(out)]
            config = json.loads((out / "config.json").read_text())
            assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
            assert config["speculators_config"]["verifier"]["name_or_path"] == target.name
        elif engine == "vLLM":
            assert words[:3] == ["vllm", "serve", target.name]
            speculative = {"method": "eagle3", "model": str(out), "num_speculative_tokens": 5}
            assert json.loads(words[4]) == speculative
        elif engine == "SGLang":
            assert words[words.index("--speculative-num-draft-tokens") + 1] == "6"
            assert words[words.index("--speculative-draft-model-path") + 1] == str(out)


@pytest.mark.parametrize(
    ("option", "served", "words"),
    [
        ("default", True, ""),
        ("EAGLE-3.1", False, "llama.cpp has no fc_norm and no norm_output, so there is no command for it"),
        ("five layers", False, "llama.cpp has no fc_norm and no auxiliary layers other than three, so"),
        ("three other layers", True, ""),
        ("norm_before_fc", True, ""),
        ("shared LM head", True, ""),
    ],
)
def test_llama_cpp_is_named_for_heads_that_it_can_serve(world, tmp_path, option, served, words):
    exported = export_head(world[0] / option, "plain", tmp_path / "out")
    assert ("llama.cpp (conversion)" in exported.commands) == served
    notes = " ".join(note for note in exported.notes if note.startswith("llama.cpp"))
    assert words in notes and bool(words) == bool(notes)


def test_a_full_vocabulary_has_no_token_map_and_a_shared_lm_head_nothing_of_its_size(world):
    folder, _ = world
    for option in ("full vocabulary", "shared LM head"):
        tensors = load_file(folder / option / "model.safetensors")
        assert not {"d2t", "t2d"} & set(tensors)  # vLLM fails on them
        config = json.loads((folder / option / "config.json").read_text())
        shared = option == "shared LM head"
        assert config["draft_vocab_size"] == (None if shared else 259)
        assert ("lm_head.weight" in tensors) is not shared


def test_other_layers_are_written_in_both_conventions(world, tmp_path):
    folder, _ = world
    export_head(folder / "five layers", "sglang", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[NAMES] == [0, 2, 4, 5, 7]
    assert config["eagle_config"][NAMES] == [-1, 1, 3, 4, 6]
    assert config["num_aux_hidden_states"] == 5


def test_the_state_after_the_last_layer_is_for_vllm_only(world, tmp_path):
    _, target = world
    head = random_head(target, auxiliary_layers=[2, 4, 8])
    save_head(head, tmp_path / "head", dtype=torch.float32, about={"target": target.name})
    export_head(tmp_path / "head", "vllm", tmp_path / "vllm")
    refused(tmp_path / "out", r"\[2, 4, 8\] must rise, within 0 and 7", export_head, tmp_path / "head", "sglang")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 300}, "vocab_size is 300 and the target's is 259"),
        ({"max_position_embeddings": 64}, "max_position_embeddings is 64 and the target's is 512"),
    ],
)
def test_a_head_that_an_engine_would_stumble_over_is_not_written(world, tmp_path, change, words):
    _, target = world
    head = random_head(target)
    for key, value in change.items():
        setattr(head.config, key, value)
    head = type(head)(head.config)
    head.set_vocabulary(torch.arange(200))
    save_head(head, tmp_path / "head", dtype=torch.float32, about={"target": target.name})
    refused(tmp_path / "out", words, export_head, tmp_path / "head", "plain")


def test_an_unknown_format_and_an_unnamed_target_are_refused(world, tmp_path):
    folder, target = world
    refused(
        tmp_path / "out",
        "choose one of plain, vllm, sglang, speculators\\.",
        export_head,
        folder / "default",
        "onnx",
    )
    save_head(random_head(target), tmp_path / "head", dtype=torch.float32, about={})
    refused(tmp_path / "out", "pass --target", export_head, tmp_path / "head", "plain")
    export_head(tmp_path / "head", "plain", tmp_path / "out", target=target.name)


def test_a_head_of_an_adapted_target_says_so(world, tmp_path):
    folder, target = world
    about = {"target": target.name, "target_adapter": "runs/tuned"}
    save_head(random_head(target), tmp_path / "head", dtype=torch.float32, about=about)
    exported = export_head(tmp_path / "head", "plain", tmp_path / "out")
    assert (
        set(exported.commands) == {"vLLM", "SGLang", "llama.cpp (conversion)"} and "'runs/tuned'" in exported.notes[-1]
    )
