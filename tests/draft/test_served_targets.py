"""What an export says about the engines that accept its target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_head, save_tiny_target

from draft.heads.checkpoint import save_head
from draft.interop.exporting import export_head
from draft.interop.served_targets import accepted_by

COMMANDS = {"vLLM": "vllm serve", "SGLang": "sglang", "llama.cpp (conversion)": "python"}


@pytest.mark.parametrize(
    ("architecture", "engines"),
    [
        ("LlamaForCausalLM", {"vLLM", "SGLang", "llama.cpp (conversion)"}),
        ("MistralForCausalLM", {"vLLM", "SGLang", "llama.cpp (conversion)"}),
        ("Qwen2ForCausalLM", {"vLLM", "SGLang"}),
        ("Qwen3ForCausalLM", {"vLLM", "SGLang", "llama.cpp (conversion)"}),
        ("Qwen3MoeForCausalLM", {"vLLM", "SGLang", "llama.cpp (conversion)"}),
        ("Phi3ForCausalLM", {"vLLM", "SGLang"}),
        ("GraniteForCausalLM", {"vLLM"}),
        ("Gemma3ForCausalLM", {"SGLang"}),
        ("Gemma2ForCausalLM", set()),
        ("MixtralForCausalLM", {"llama.cpp (conversion)"}),
    ],
)
def test_who_serves_eagle3_beside_it(architecture: str, engines: set[str]) -> None:
    kept, notes = accepted_by(COMMANDS, architecture, {})
    assert set(kept) == engines
    for engine in COMMANDS:
        (note,) = (note for note in notes if note.startswith(engine.split()[0]))
        assert architecture in note and ("serves no eagle3" in note) == (engine not in engines)


@pytest.mark.parametrize(
    ("method", "engine", "architecture", "served", "words"),
    [
        ("eagle", "vLLM", "LlamaForCausalLM", True, "vLLM 0.32 serves eagle heads beside LlamaForCausalLM"),
        ("eagle", "vLLM", "GPT2LMHeadModel", False, "serves no eagle head beside GPT2LMHeadModel"),
        ("eagle", "vLLM", "HydraForCausalLM", True, "not checked whether it serves eagle heads beside Hydra"),
        ("eagle", "vLLM", "Gemma3ForCausalLM", False, "without its scale"),
        ("eagle", "SGLang", "Qwen3ForCausalLM", True, "SGLang 0.5.23 serves eagle heads beside Qwen3ForCausalLM"),
        ("eagle", "SGLang", "MixtralForCausalLM", False, "SGLang 0.5.23 serves no eagle head beside Mixtral"),
        ("medusa", "vLLM", "Qwen2ForCausalLM", True, "not checked whether it serves medusa heads beside Qwen2"),
        ("medusa", "FasterDecoding", "LlamaForCausalLM", True, "FasterDecoding 1.0 serves medusa heads beside Llama"),
        ("medusa", "FasterDecoding", "Qwen2ForCausalLM", False, "serves no medusa head beside Qwen2ForCausalLM"),
    ],
)
def test_who_serves_other_heads_beside_it(
    method: str, engine: str, architecture: str, served: bool, words: str
) -> None:
    kept, (note,) = accepted_by({engine: "command"}, architecture, {}, method)
    assert (engine in kept) == served and words in note
    assert ("draft-serve does" in note) != served


def test_an_export_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    target = save_tiny_target(tmp_path / "target")
    about = {"target": str(tmp_path / "target"), "target_adapter": "runs/tuned"}
    save_head(make_tiny_head(target), tmp_path / "head", dtype=torch.float32, about=about)
    exported = export_head(tmp_path / "head", "plain", tmp_path / "llama")
    assert set(exported.commands) == set(COMMANDS) and "'runs/tuned'" in exported.notes[-1]
    path = tmp_path / "target" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["Gemma2ForCausalLM"]}))
    monkeypatch.setattr("sys.argv", ["draft-train", "export", str(tmp_path / "head"), "--out", str(tmp_path / "gemma")])
    from draft.cli import main

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "vLLM 0.32 serves no eagle3 head beside Gemma2ForCausalLM" in told and "vllm serve" not in told
