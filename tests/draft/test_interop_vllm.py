"""Exports are what vLLM and speculators loaded and drafted our tokens with, as `make interop` wrote down."""

import json
from pathlib import Path

import pytest
import torch
from interop import cases
from interop.cases import CASES, OTHERS, random_head, tiny_target
from interop.prepare import export_for_vllm
from safetensors.torch import load_file

from draft.heads.checkpoint import save_head
from draft.interop.exporting import export_head

TABLE = json.loads((Path(cases.__file__).parent / "table.json").read_text())
WRITTEN = TABLE["vllm"]["cases"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """(folder, printed commands) of the heads that the table has."""
    folder = tmp_path_factory.mktemp("vllm")
    _, _, commands = export_for_vllm(folder)
    return folder, commands


def test_the_table_has_every_head_that_is_exported(exports):
    assert set(WRITTEN) == set(exports[1])
    assert {name.partition("/")[2] for name in WRITTEN} == set(CASES | OTHERS)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_vllm_loaded_is_what_is_written(exports, name):
    folder, commands = exports
    written = WRITTEN[name]
    tensors = load_file(folder / name / "model.safetensors")
    assert {key: list(value.shape) for key, value in tensors.items()} == written["tensors"]
    config = (folder / name / "config.json").read_text()
    assert json.loads(config.replace(str(folder), "FOLDER")) == written["config"]
    # vLLM 0.32 loaded Medusa heads too; later ones don't
    command = "" if "Medusa" in name else written["command"]
    assert commands[name].replace(str(folder), "FOLDER") == command


@pytest.mark.parametrize("case", CASES)
def test_what_speculators_loaded_is_what_is_written(tmp_path, case):
    written = TABLE["speculators"]["cases"][case]
    head = random_head(tiny_target(tmp_path / "target"), **CASES[case])
    save_head(head, tmp_path / "head", dtype=torch.float32, about={"target": str(tmp_path / "target")})
    export_head(tmp_path / "head", "speculators", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: list(value.shape) for name, value in tensors.items()} == written["tensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in written["config"]} == written["config"]
    assert "model_type" not in config and sorted(config) == written["keys"]
    assert sorted(config["transformer_layer_config"]) == written["layer_keys"]
