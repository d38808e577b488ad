"""Damaged targets, heads and adapters: refused in one sentence, or read to the right result, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target, save_tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import Mutation, mutated, mutations, result_or_refusal
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from draft.heads import DraftHead
from draft.heads.checkpoint import load_head, save_head
from draft.interop.importing import import_head
from draft.target import Target, load_target

IDS = torch.tensor([[5, 60, 7, 80, 9, 100]])
FILES = ("config.json", "model.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A target, heads of two architectures and an adapter, as a user has them."""
    root = tmp_path_factory.mktemp("world")
    target = save_tiny_target(root / "target")
    for architecture in ("eagle3", "medusa"):
        head = make_tiny_head(target, architecture=architecture, draft_vocab_size=100)
        save_head(head, root / architecture, dtype=torch.float32, about={})
    options: Any = {"r": 2, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]}
    adapted = get_peft_model(
        make_tiny_target(dtype=torch.float32).model, LoraConfig(**options, init_lora_weights=False)
    )
    adapted.save_pretrained(root / "adapter")
    logging.disable(logging.WARNING)
    yield root
    logging.disable(logging.NOTSET)


def logits_of(target: Target) -> torch.Tensor:
    return target.logits(target.forward(IDS).last_hidden)


@settings(max_examples=30)
@given(data=st.data())
def test_a_target(world: Path, data: st.DataObject) -> None:
    mutation = data.draw(mutations(world / "target", (*FILES, "tokenizer.json", "tokenizer_config.json")))
    folder = mutated(world / "target", mutation, world / "damaged")
    target = result_or_refusal(lambda: load_target(str(folder), "float32", "cpu"))
    if target is None:
        return
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert torch.equal(logits_of(target), theirs(IDS).logits)
    if mutation.file == "model.safetensors":
        tolerance = 0.5 if mutation.keeps_values else 0
        torch.testing.assert_close(
            logits_of(target), logits_of(load_target(str(world / "target"), "float32")), rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("architecture", ["eagle3", "medusa"])
@settings(max_examples=80)
@given(data=st.data())
def test_a_head(world: Path, architecture: str, data: st.DataObject) -> None:
    mutation = data.draw(mutations(world / architecture, FILES))
    read = result_or_refusal(lambda: load_head(mutated(world / architecture, mutation, world / "damaged")))
    if read is None:
        return
    head, valid = read[0], load_head(world / architecture)[0]
    if mutation.file == "config.json":
        assert_read_or_of_no_effect(mutation, head, valid)
    for (name, ours), theirs in zip(head.state_dict().items(), valid.state_dict().values(), strict=True):
        torch.testing.assert_close(
            ours.to(theirs.dtype), theirs, rtol=2**-7 if mutation.keeps_values else 0, atol=0, msg=name
        )


def assert_read_or_of_no_effect(mutation: Mutation, head: DraftHead, valid: DraftHead) -> None:
    """The configuration is as it was, or has the new value."""
    ours, theirs = asdict(head.config), asdict(valid.config)
    changed = {key for key in ours if ours[key] != theirs[key]}
    assert not changed or (mutation.how == "set" and ours.get(mutation.key) == mutation.value) or changed <= {
        "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters", "auxiliary_layers", "shared_lm_head"
    }, (mutation, changed)  # fmt: skip


@settings(max_examples=20)
@given(data=st.data())
def test_an_adapter(world: Path, data: st.DataObject) -> None:
    files = ("adapter_config.json", "adapter_model.safetensors")
    mutation = data.draw(mutations(world / "adapter", files))
    folder = mutated(world / "adapter", mutation, world / "damaged")
    target = result_or_refusal(lambda: load_target(str(world / "target"), "float32", "cpu", folder))
    if target is None:
        return
    base = load_target(str(world / "target"), "float32", "cpu")
    kept = PeftModel.from_pretrained(base.model, folder).eval()
    torch.testing.assert_close(logits_of(target), kept(IDS).logits, rtol=0, atol=1e-4)
    if mutation.file == files[1] and not mutation.keeps_values:
        valid = load_target(str(world / "target"), "float32", "cpu", world / "adapter")
        assert torch.equal(logits_of(target), logits_of(valid))


@settings(max_examples=20)
@given(data=st.data())
def test_an_import(world: Path, data: st.DataObject) -> None:
    mutation = data.draw(mutations(world / "eagle3", FILES))
    target = make_tiny_target(dtype=torch.float32)
    out = world / "imported"
    read = result_or_refusal(lambda: import_head(mutated(world / "eagle3", mutation, world / "damaged"), target, out))
    if read is None:
        return
    head, valid = load_head(out)[0], load_head(world / "eagle3")[0]
    for (name, ours), theirs in zip(head.state_dict().items(), valid.state_dict().values(), strict=True):
        rtol = 2**-7 if mutation.keeps_values else 0
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=rtol, atol=0, msg=name)
