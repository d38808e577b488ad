"""EAGLE-3 heads of other projects are read and completed; what does not fit is refused with both values."""

import json
import sys

import pytest
import torch
from conftest import make_tiny_target
from interop.cases import CASES
from interop_heads import Foreign, files, make_world, refused
from safetensors.torch import save_file

from draft.cli import main
from draft.errors import UserError
from draft.heads.checkpoint import attach_head, load_head
from draft.interop.importing import import_head

NAMES = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target on disk, and a head with each option beside it."""
    return make_world(tmp_path_factory.mktemp("world"), CASES)


@pytest.fixture
def foreign(world, tmp_path):
    return Foreign(world, tmp_path)


def test_a_head_of_safeailab_is_read_from_a_pickle_and_completed(foreign):
    config = foreign.config
    for key in ("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps", "head_dim", "norm_before_residual"):
        del config[key]
    config.update(architectures=["LlamaForCausalLM"], max_position_embeddings=64, torch_dtype="float16")
    del foreign.tensors["t2d"]
    foreign.publish("pytorch_model.bin")
    words = ("rms_norm_eps = 1e-06", "rope_theta = 10000.0", "from 64 to the target's 512", "t2d from d2t")
    imported, head = foreign.taken(*words)
    assert imported.kind == "SafeAILab EAGLE-3"
    about = load_head(foreign.out)[1]
    assert head.config.max_position_embeddings == 512 and head.config.rope_parameters["rope_theta"] == 10000.0
    assert about["target_fingerprint"] == foreign.target.fingerprint
    assert head.fc.weight.dtype == torch.bfloat16  # the tensors', not config.json's


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


def test_a_pickle_that_would_run_code_is_refused(foreign, tmp_path):
    class Trap:
        def __reduce__(self):
            return (type(tmp_path), (str(tmp_path),))

    foreign.tensors = {"fc.weight": Trap()}
    foreign.publish("pytorch_model.bin")
    foreign.refused("more than tensors")


@pytest.mark.parametrize("content", [b"nonsense", b"", b"hello"])
def test_a_damaged_file_is_refused(foreign, content):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (foreign.folder / "model.safetensors").unlink(missing_ok=True)
        (foreign.folder / name).write_bytes(content)
        foreign.refused(name)


def test_a_pickle_whose_keys_are_no_names_is_refused(foreign):
    foreign.tensors = {0: torch.ones(1)}
    foreign.publish("pytorch_model.bin")
    foreign.refused("0 is no named tensor")


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
    index.write_text(json.dumps({"weight_map": {**places, "extra": shard}}))
    foreign.refused("lacks extra")
    index.write_text(json.dumps({"weight_map": {**places, "fc.weight": "../fc"}}))
    foreign.refused("no file beside it")
    (foreign.folder / shard).unlink()
    index.write_text(json.dumps({"weight_map": places}))
    foreign.refused("is missing, which the index names")
    index.write_text("{}")
    foreign.refused("weight_map")


def test_other_names_of_the_same_tensors_are_understood(world, tmp_path):
    foreign = Foreign(world, tmp_path, "sglang", "EAGLE-3.1")
    renamed = {}
    for name, value in foreign.tensors.items():
        name = name.replace("midlayer", "layers.0")
        for index, depth in enumerate(("low", "mid", "high")):
            name = name.replace(f"fc_norm.{index}", f"aux_norm_{depth}")
        renamed[name if name in ("d2t", "t2d", "lm_head.weight") else f"model.{name}"] = value
    foreign.tensors = {**renamed, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    del foreign.config["fc_norm"]
    foreign.config["use_aux_norm"] = True
    foreign.publish()
    foreign.taken("inv_freq")


def test_the_targets_embedding_is_left_out_and_another_refused(foreign):
    own = foreign.target.embedding.weight.detach().to(torch.float16)
    foreign.tensors["embed_tokens.weight"] = own
    foreign.publish()
    foreign.taken("embed_tokens")
    foreign.out = foreign.out.with_name("other")
    foreign.tensors["embed_tokens.weight"] = own + 0.01
    foreign.publish()
    foreign.refused("embed_tokens.weight differs from the target's by up to 0.01")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c, t: c.update(hidden_size=64), "hidden size is 64 and the target's is 32"),
        (lambda c, t: c.update(target_hidden_size=48), "target_hidden_size is 48 and the target's is 32"),
        (lambda c, t: c.update(vocab_size=300), "vocabulary is 300 and the target's is 259"),
        (
            lambda c, t: t["d2t"].__setitem__(-1, 99),
            "draft id 199 to target id 298, and the target's vocabulary is 259",
        ),
        (lambda c, t: t["d2t"].copy_(torch.arange(200)), "seems to hold target ids"),
        (lambda c, t: t["d2t"].__setitem__(0, 1), "200 draft ids to only 199 target ids"),
        (lambda c, t: t["t2d"].__setitem__(0, False), "t2d marks 199 target tokens and d2t gives 200"),
        (lambda c, t: t.update(t2d=torch.ones(300, dtype=torch.bool)), "t2d has 300 entries and .* 259"),
        (lambda c, t: (t.pop("d2t"), t.pop("t2d")), "draft_vocab_size is 200 of 259 .* no d2t"),
        (lambda c, t: t.pop("lm_head.weight"), "draft_vocab_size is 200 where the target's LM head has 259 rows"),
        (lambda c, t: c.update(tie_word_embeddings=True), "tie_word_embeddings"),
        (lambda c, t: c.update(num_hidden_layers=2), "num_hidden_layers = 2"),
        (lambda c, t: t.update({"midlayer.self_attn.q_norm.weight": torch.ones(8)}), "q_norm.weight is unexpected"),
        (lambda c, t: t.pop("fc.weight"), "fc.weight is missing"),
        (lambda c, t: c.update({NAMES: [1, 3, 9]}), r"\[1, 3, 9\] and the target has 8 layers"),
        (lambda c, t: c.update({NAMES: [1, 3, 6], "eagle_config": {NAMES: [1, 2, 6]}}), "name different layers"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_with_both_values(foreign, edit, words):
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


def test_layer_ids_that_engines_read_differently_need_the_users_word(foreign):
    foreign.config["eagle_config"] = {NAMES: [1, 3, 6]}
    foreign.publish()
    foreign.refused("1,3,6 as vLLM reads it, 2,4,7 as SGLang")
    assert foreign.taken(auxiliary_layers=[2, 4, 7])[1].config.auxiliary_layers == [2, 4, 7]


def test_speculators_must_say_where_the_residual_starts(world, tmp_path):
    foreign = Foreign(world, tmp_path, "speculators")
    del foreign.config["norm_before_residual"]
    foreign.publish()
    foreign.refused("no norm_before_residual, which vLLM then takes for true and speculators for false")
    foreign.config.update(norm_before_residual=False, speculators_model_type="dflash")
    foreign.publish()
    foreign.refused("dflash")


def test_a_missing_half_of_the_token_map_is_derived(foreign):
    del foreign.tensors["d2t"]
    foreign.publish()
    foreign.taken("filled in d2t from t2d")


def test_something_else_is_named_with_the_known_formats(foreign, tmp_path):
    foreign.config["architectures"] = ["HydraModel"]
    foreign.tensors = {"hydra.0.weight": torch.zeros(2, 2)}
    foreign.publish()
    foreign.refused("HydraModel.*SafeAILab EAGLE-3.*FasterDecoding Medusa")
    refused(tmp_path / "out", "config.json", import_head, tmp_path / "nowhere", make_tiny_target())


def test_the_commands_say_what_they_did(world, tmp_path, monkeypatch, capsys):
    folder, target = world

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["draft-train", *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0, "".join(capsys.readouterr())
        return 0, "".join(capsys.readouterr())

    out, back = tmp_path / "out", tmp_path / "back"
    status, shown = call("export", folder / "three other layers", "--format", "sglang", "--out", out)
    assert status == 0 and f"--speculative-draft-model-path {out}" in shown
    status, shown = call("import", out, "--target", target.name, "--out", back)
    assert status == 0 and "plain EAGLE-3" in shown and f"Wrote {back}" in shown
    assert files(back) == files(folder / "three other layers")
    status, shown = call("import", out, "--target", target.name, "--out", back, "--auxiliary-layers", "1;2")
    assert status == 2 and "'1;2'" in shown
    status, shown = call("export", folder / "norm_before_residual", "--out", tmp_path / "no")
    assert status == 2 and "norm_before_residual" in shown and "Traceback" not in shown
