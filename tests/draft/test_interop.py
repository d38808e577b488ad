"""Heads go to other engines' formats and come back bit for bit, heads of other projects are read and completed.

What does not fit is refused with both values."""

import json
import shlex

import pytest
import torch
from conftest import make_tiny_target, save_tiny_target
from interop.cases import CASES, random_head
from safetensors.torch import load_file, save_file

from draft.errors import UserError
from draft.heads.checkpoint import attach_head, load_head, save_head
from draft.interop.exporting import export_head
from draft.interop.importing import import_head

# heads of the tests: options of `random_head`
HEADS = {
    **CASES,
    "EAGLE-1": {"architecture": "eagle"},
    "EAGLE-1, fc_bias": {"architecture": "eagle", "fc_bias": True},
    "EAGLE-1, qkv_bias": {"architecture": "eagle", "qkv_bias": True},
    "Medusa": {"architecture": "medusa"},
    "Medusa, full": {"architecture": "medusa", "draft_vocab_size": 259, "num_heads": 2},
    "Medusa, shared": {"architecture": "medusa", "draft_vocab_size": 259, "shared_lm_head": True},
    "Medusa, two layers": {"architecture": "medusa", "num_layers": 2},
}


def make_world(folder):
    """(folder, target): a target in folder/target, and each of HEADS beside it."""
    target = save_tiny_target(folder / "target")
    target.name = str(folder / "target")
    for name, options in HEADS.items():
        about = {"target": target.name, "trained_rows": ["a"]}
        save_head(random_head(target, **options), folder / name, dtype=torch.bfloat16, about=about)
    return folder, target


def files(folder):
    return [(folder / name).read_bytes() for name in ("config.json", "model.safetensors")]


def refused(out, pattern, function, *arguments, **options):
    with pytest.raises(UserError, match=pattern):
        function(*arguments, out, **options)
    assert not out.exists()


class Foreign:
    """A head as another project would publish it, to be changed before it is imported."""

    def __init__(self, world, folder, format="vllm", option="default"):
        self.source, self.target, self.folder = world[0] / option, world[1], folder / "foreign"
        export_head(self.source, format, self.folder)
        (self.folder / "draftsmith.json").unlink()
        self.config = json.loads((self.folder / "config.json").read_text())
        self.tensors = load_file(self.folder / "model.safetensors")
        self.out = folder / "imported"

    def publish(self, file="model.safetensors"):
        """Under this name, as a pickle or as safetensors."""
        (self.folder / "model.safetensors").unlink(missing_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        if file.endswith(".safetensors"):
            save_file({name: value.clone() for name, value in self.tensors.items()}, self.folder / file)
        else:
            torch.save(self.tensors, self.folder / file)

    def taken(self, *words, **options):
        """Import it; its weights are the original's, and the notes have these words. Returns (import, head)."""
        imported = import_head(self.folder, self.target, self.out, **options)
        original, written = (load_file(folder / "model.safetensors") for folder in (self.source, self.out))
        assert original.keys() == written.keys()
        assert all(torch.equal(value, original[name]) for name, value in written.items())
        assert all(word in " ".join(imported.notes) for word in words), imported.notes
        return imported, load_head(self.out)[0]

    def refused(self, pattern, **options):
        refused(self.out, pattern, import_head, self.folder, self.target, **options)


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


# ---- heads of other projects ----


@pytest.fixture
def foreign(world, tmp_path):
    return Foreign(world, tmp_path)


@pytest.mark.parametrize("option", ["default", "EAGLE-1, qkv_bias"])
def test_a_head_of_safeailab_is_read_from_a_pickle_and_completed(world, tmp_path, option):
    foreign = Foreign(world, tmp_path, "vllm", option)
    eagle = option.startswith("EAGLE-1")
    dropped = ("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps", "head_dim", "norm_before_residual")
    foreign.config = {key: value for key, value in foreign.config.items() if key not in (*dropped, "qkv_bias")}
    foreign.config.update(architectures=["LlamaForCausalLM"], max_position_embeddings=64, torch_dtype="float16")
    words = ["rms_norm_eps = 1e-06", "rope_theta = 10000.0", "from 64 to the target's 512"]
    if eagle:
        foreign.config["bias"] = True
        foreign.tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        foreign.tensors["embed_tokens.weight"] = foreign.target.embedding.weight.detach().half()
        foreign.tensors["fc.bias"] = torch.zeros(32, dtype=torch.bfloat16)
    else:
        del foreign.tensors["t2d"]
    foreign.publish("pytorch_model.bin")
    imported, head = foreign.taken(*words, *(("embed_tokens", "fc.bias") if eagle else ("t2d from d2t",)))
    assert imported.kind == f"SafeAILab {'EAGLE-1' if eagle else 'EAGLE-3'}"
    assert load_head(foreign.out)[1]["target_fingerprint"] == foreign.target.fingerprint
    assert head.config.max_position_embeddings == 512 and head.config.rope_parameters["rope_theta"] == 10000.0
    assert head.fc.weight.dtype == torch.bfloat16  # the tensors', not config.json's
    assert not eagle or (head.config.qkv_bias and not head.config.fc_bias)


def test_an_export_stays_a_head_for_its_target(foreign):
    stale = {"target": "elsewhere", "target_fingerprint": "feed", "target_adapter": "runs/tuned"}
    (foreign.folder / "draftsmith.json").write_text(json.dumps(stale))
    _, head = foreign.taken("made for target 'elsewhere' with fingerprint feed")
    about = load_head(foreign.out)[1]
    assert {key: about[key] for key in stale} == stale
    with pytest.raises(UserError, match="made for target feed"):
        attach_head(head, about, foreign.target)
    foreign.out = foreign.out.with_name("other")
    stale["target_fingerprint"] = foreign.target.fingerprint
    (foreign.folder / "draftsmith.json").write_text(json.dumps(stale))
    assert foreign.taken()[0].notes == []
    about = load_head(foreign.out)[1]
    assert about["target"] == foreign.target.name and about["target_adapter"] is None


class Trap:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "medusa_lm_head.pt"])
@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"fc.weight": Trap()}, "holds more than tensors, which may run"),
        ({0: torch.ones(1)}, "more than named"),
        ({"fc.weight": torch.ones(2, 2).to_sparse()}, "fc.weight is sparse, or has no data"),
        ({"fc.weight": torch.ones(2, 2, device="meta")}, "fc.weight is sparse, or has no data"),
    ],
)
def test_a_pickle_of_other_than_plain_named_tensors_is_refused(foreign, capfd, file, tensors, words):
    foreign.tensors = tensors
    foreign.publish(file)
    foreign.refused(words)
    assert "this ran" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"nonsense", b"", b"hello"])
def test_a_damaged_file_is_refused(foreign, name, content):
    (foreign.folder / "model.safetensors").unlink()
    (foreign.folder / name).write_bytes(content)
    foreign.refused(name)


@pytest.mark.parametrize(("file", "save"), [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)])
def test_a_checkpoint_of_several_files_is_read(foreign, file, save):
    (foreign.folder / "model.safetensors").unlink()
    names, places = sorted(foreign.tensors), {}
    for part, chosen in enumerate((names[::2], names[1::2])):
        shard = f"part-{part}-of-2.{file.rpartition('.')[2]}"
        save({name: foreign.tensors[name] for name in chosen}, foreign.folder / shard)
        places.update(dict.fromkeys(chosen, shard))
    index = foreign.folder / f"{file}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    foreign.taken()
    foreign.out = foreign.out.with_name("other")
    for changed, words in (
        ({"weight_map": {**places, "extra": shard}}, "lacks extra"),
        ({"weight_map": {**places, "fc.weight": "../fc"}}, "no file beside it"),
        ({"weight_map": {**places, "fc.weight": "absent"}}, "no file beside it"),
        ({}, "weight_map"),
    ):
        index.write_text(json.dumps(changed))
        foreign.refused(words)


def test_other_names_of_the_same_tensors_are_understood(world, tmp_path):
    foreign = Foreign(world, tmp_path, "sglang", "EAGLE-3.1")
    renamed = {}
    for name, value in foreign.tensors.items():
        name = name.replace("midlayer", "layers.0")
        for index, depth in enumerate(("low", "mid", "high")):
            name = name.replace(f"fc_norm.{index}", f"aux_norm_{depth}")
        renamed[name if name in ("d2t", "t2d", "lm_head.weight") else f"model.{name}"] = value
    foreign.tensors = {**renamed, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    del foreign.config["fc_norm"], foreign.tensors["d2t"]
    foreign.config["use_aux_norm"] = True
    foreign.publish()
    foreign.taken("inv_freq", "filled in d2t from t2d")


EAGLE3, EAGLE, MEDUSA = ("vllm", "default"), ("vllm", "EAGLE-1"), ("vllm", "Medusa, full")
SPECULATORS = ("speculators", "default")
RESIDUAL = "no norm_before_residual, which vLLM then takes for true and speculators for false"


@pytest.mark.parametrize(
    ("option", "edit", "words"),
    [
        (EAGLE3, lambda c, t: c.update(hidden_size=64), "hidden size is 64 and the target's is 32"),
        (EAGLE3, lambda c, t: c.update(target_hidden_size=48), "target_hidden_size is 48 and the target's is 32"),
        (EAGLE3, lambda c, t: c.update(vocab_size=300), "vocabulary is 300 and the target's is 259"),
        (EAGLE3, lambda c, t: t["d2t"].__setitem__(-1, 99), "draft id 199 to target id 298, and .* is 259"),
        (EAGLE3, lambda c, t: t["d2t"].copy_(torch.arange(200)), "seems to hold target ids"),
        (EAGLE3, lambda c, t: t["d2t"].__setitem__(0, 1), "200 draft ids to only 199 target ids"),
        (EAGLE3, lambda c, t: t["t2d"].__setitem__(0, False), "t2d marks 199 target tokens and d2t gives 200"),
        (EAGLE3, lambda c, t: t.update(t2d=torch.ones(300, dtype=torch.bool)), "t2d has 300 entries and .* 259"),
        (EAGLE3, lambda c, t: (t.pop("d2t"), t.pop("t2d")), "draft_vocab_size is 200 of 259 .* no d2t"),
        (EAGLE3, lambda c, t: t.pop("lm_head.weight"), "draft_vocab_size is 200 where the target's LM head has 259"),
        (EAGLE3, lambda c, t: c.update(tie_word_embeddings=True), "tie_word_embeddings"),
        (EAGLE3, lambda c, t: t.update({"midlayer.self_attn.q_norm.weight": torch.ones(8)}), "q_norm.* unexpected"),
        (EAGLE3, lambda c, t: c.update(num_hidden_layers=2), "num_hidden_layers = 2"),
        (EAGLE3, lambda c, t: c.update({NAMES: [1, 3, 9]}), r"\[1, 3, 9\] and the target has 8 layers"),
        (EAGLE3, lambda c, t: c.update({NAMES: [1, 3, 6], "eagle_config": {NAMES: [1, 2, 6]}}), "different layers"),
        (EAGLE, lambda c, t: t.update({"lm_head.weight": torch.zeros(259, 32)}), "lm_head.weight is not the target's"),
        (EAGLE3, lambda c, t: t.update({"embed_tokens.weight": torch.zeros(259, 32)}), "differs from the target's by"),
        (EAGLE, lambda c, t: t.update({"layers.0.input_layernorm.weight": torch.ones(32)}), "layernorm.* unexpected"),
        (MEDUSA, lambda c, t: c.update(logit_scale=0.5), "logit_scale = 0.5"),
        (MEDUSA, lambda c, t: t.pop("lm_heads.1.weight"), r"lm_heads.1.weight is missing, of 2 positions"),
        (MEDUSA, lambda c, t: t.update({"lm_heads.1.weight": torch.zeros(300, 32)}), "300 rows and .* 259"),
        (MEDUSA, lambda c, t: t.update(token_map=torch.arange(60, 319)), "draft id 199 to target id 259.* is 259"),
        (MEDUSA, lambda c, t: t.update({"blocks.1.layers.0.weight": torch.zeros(9, 9)}), r"\(9, 9\), its config"),
        (MEDUSA, lambda c, t: [t.update({n: torch.zeros(64, 64)}) for n in t if "layers.0.weight" in n], "size is 64"),
        (SPECULATORS, lambda c, t: c.pop("norm_before_residual"), RESIDUAL),
        (SPECULATORS, lambda c, t: c.update(speculators_model_type="dflash"), "dflash"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_with_both_values(world, tmp_path, option, edit, words):
    foreign = Foreign(world, tmp_path, *option)
    edit(foreign.config, foreign.tensors)
    foreign.publish()
    foreign.refused(words)


@pytest.mark.parametrize(
    ("keys", "layers", "note"),
    [
        ({"eagle_config": {NAMES: [1, 3, 4]}}, None, "leaving"),  # the default layers of eight, as SGLang counts
        ({"eagle_config": {NAMES: [2, 4, 5]}}, None, "entering"),  # as vLLM counts
        ({NAMES: [2, 4, 5]}, None, ""),
        ({NAMES: [2, 4, 5], "eagle_config": {NAMES: [2, 4, 5]}}, None, ""),
        ({NAMES: [1, 3, 4]}, [1, 3, 4], "import it with --auxiliary-layers 2,4,5"),
        ({NAMES: [1, 3, 7], "eagle_config": {NAMES: [0, 2, 6]}}, [1, 3, 7], ""),
    ],
)
def test_layer_ids_are_understood_where_they_can_mean_one_thing(foreign, keys, layers, note):
    foreign.config.update(keys)
    foreign.publish()
    assert foreign.taken(note)[1].config.auxiliary_layers == layers


def test_layer_ids_that_engines_read_differently_need_the_users_word(world, tmp_path, foreign):
    other = Foreign(world, tmp_path / "other", "vllm", "EAGLE-1")
    other.refused("--auxiliary-layers 2,4,5: .* is no EAGLE-3 head", auxiliary_layers=[2, 4, 5])
    foreign.config["eagle_config"] = {NAMES: [1, 3, 6]}
    foreign.publish()
    foreign.refused("1,3,6 as vLLM reads it, 2,4,7 as SGLang")
    assert foreign.taken(auxiliary_layers=[2, 4, 7])[1].config.auxiliary_layers == [2, 4, 7]


def test_a_bias_that_says_something_is_kept(world, tmp_path):
    foreign = Foreign(world, tmp_path, "sglang", "EAGLE-1, fc_bias")
    del foreign.config["eagle_fc_bias"]
    foreign.publish()
    imported, head = foreign.taken("fc has a bias, which SGLang knows and vLLM leaves out")
    assert imported.kind == "EAGLE-1 of SGLang" and head.config.fc_bias


@pytest.mark.parametrize(
    ("option", "file"),
    [
        ("Medusa, shared", "medusa_lm_head.pt"),
        ("Medusa, shared", "medusa_lm_head.safetensors"),
        ("Medusa", "pytorch_model.bin"),
        ("Medusa, full", "medusa_lm_head.pt"),
    ],
)
def test_a_medusa_head_of_fasterdecoding_is_counted_by_its_file(world, tmp_path, option, file):
    """Published configurations say 2 or 3 positions beside files of 5, and neither of the target's sizes."""
    foreign = Foreign(world, tmp_path, "vllm", option)
    count, given = foreign.config["num_heads"], foreign.tensors
    foreign.config = {"medusa_num_heads": 3, "medusa_num_layers": 1, "base_model_name_or_path": "vicuna"}
    foreign.tensors = {name: given[name] for name in ("d2t", "t2d") if name in given}
    for index in range(count):  # of `medusa_model.py`: one linear layer and an LM head a position
        for what in ("weight", "bias"):
            foreign.tensors[f"medusa_head.{index}.0.linear.{what}"] = given[f"blocks.{index}.layers.0.{what}"]
        lm_head = given.get(f"lm_heads.{index}.weight", given.get("lm_head.weight"))
        foreign.tensors[f"medusa_head.{index}.1.weight"] = lm_head
    foreign.publish(file)
    words = ["left out the LM heads"] if option == "Medusa, shared" else []
    imported, head = foreign.taken(f"medusa_num_heads = 3, and the file {count} positions", *words)
    assert imported.kind == "FasterDecoding Medusa" and head.longest == count


def test_vllms_token_map_is_ours_in_other_words(world, tmp_path):
    foreign = Foreign(world, tmp_path, "vllm", "Medusa")
    ids = foreign.tensors["token_map"] = foreign.tensors.pop("d2t") + torch.arange(200)
    del foreign.tensors["t2d"]
    foreign.config["truncated_vocab_size"] = 200
    foreign.publish()
    assert torch.equal(foreign.taken("t2d from d2t")[1].vocabulary, ids)


def test_one_lm_head_of_all_positions_is_one_for_each(world, tmp_path):
    foreign = Foreign(world, tmp_path, "vllm", "Medusa, full")
    single = foreign.tensors["lm_head.weight"] = foreign.tensors.pop("lm_heads.0.weight")
    del foreign.tensors["lm_heads.1.weight"]
    foreign.config["original_lm_head"] = True
    foreign.publish()
    imported = import_head(foreign.folder, foreign.target, foreign.out)
    assert "the one LM head" in " ".join(imported.notes)
    head, _ = load_head(foreign.out)
    assert all(torch.equal(lm_head.weight, single) for lm_head in head.lm_heads) and len(head.lm_heads) == 2


def test_something_else_is_named_with_the_known_formats(foreign, tmp_path):
    foreign.config["architectures"] = ["HydraModel"]
    foreign.tensors = {"hydra.0.weight": torch.zeros(2, 2)}
    foreign.publish()
    foreign.refused("HydraModel.*SafeAILab EAGLE-3.*FasterDecoding Medusa")
    refused(tmp_path / "out", "config.json", import_head, tmp_path / "nowhere", make_tiny_target())


def test_the_commands_say_what_they_did(world, tmp_path, draft_train):
    folder, target = world
    out, back = tmp_path / "out", tmp_path / "back"
    status, shown = draft_train("export", folder / "three other layers", "--format", "sglang", "--out", out)
    assert status == 0 and f"--speculative-draft-model-path {out}" in shown
    status, shown = draft_train("import", out, "--target", target.name, "--out", back)
    assert status == 0 and "plain EAGLE-3" in shown and f"Wrote {back}" in shown
    assert files(back) == files(folder / "three other layers")
    status, shown = draft_train("import", out, "--target", target.name, "--out", back, "--auxiliary-layers", "1;2")
    assert status == 2 and "'1;2'" in shown
    status, shown = draft_train("export", folder / "norm_before_residual", "--out", tmp_path / "no")
    assert status == 2 and "norm_before_residual" in shown and "Traceback" not in shown
