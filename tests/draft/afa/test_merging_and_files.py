"""Out of AFA-LoRA again: merging, guarded by beta, and adapter files for plain PEFT and for our own loader."""

import json

import pytest
import torch
from afa_models import PLACEMENTS, Head, X, adapted, close, randomise
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from safetensors.torch import load_file, save_file
from torch import nn

from draft.afa import AfaLoraConfig, add_adapter, load_afa_adapter, merge_adapter, set_annealing_step
from draft.errors import UserError

# ---- merging ----


@pytest.mark.parametrize("config_class", [AfaLoraConfig, LoraConfig])
def test_merge_gives_the_plain_module_back(config_class):
    model = add_adapter(Head(), config_class(r=4, lora_alpha=6, target_modules=["fc", "lm_head"]))
    randomise(model)
    if config_class is AfaLoraConfig:
        set_annealing_step(model, 3, 10)
    before = model.eval()(X)
    merged = merge_adapter(model)
    assert type(merged) is Head and type(merged.fc) is type(merged.lm_head) is nn.Linear
    assert merged.state_dict().keys() == Head().state_dict().keys() and not hasattr(merged, "peft_config")
    close(merged(X), before)


@pytest.mark.parametrize("config_class", [AfaLoraConfig, LoraConfig])
def test_what_was_trained_as_a_whole_is_saved_loaded_and_merged(config_class, tmp_path):
    options = {"r": 4, "target_modules": ["fc"], "modules_to_save": ["lm_head"]}
    model = add_adapter(Head(), config_class(**options))
    randomise(model)
    if config_class is AfaLoraConfig:
        set_annealing_step(model, 3, 10)
    head = model.get_base_model().lm_head.modules_to_save["default"]
    head.weight.data.normal_(generator=torch.Generator().manual_seed(5))
    before, trained = model.eval()(X), head.weight.clone()
    model.save_pretrained(tmp_path)
    for merged in (merge_adapter(load_afa_adapter(Head(), tmp_path)), merge_adapter(model)):
        assert type(merged.lm_head) is nn.Linear and not merged.lm_head.weight.requires_grad
        assert torch.equal(merged.lm_head.weight, trained) and merged.state_dict().keys() == Head().state_dict().keys()
        close(merged(X), before)


def test_merge_rounds_once_from_float64():
    model = adapted(torch.bfloat16, beta=0.0)
    fc = model.get_base_model().fc
    product = fc.lora_B["default"].weight.double() @ fc.lora_A["default"].weight.double()
    exact = fc.base_layer.weight.double() + 1.5 * product
    assert torch.equal(merge_adapter(model).fc.weight, exact.bfloat16())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_peft_merges_at_beta_zero_and_unmerges(placement):
    model = adapted(beta=0.0, placement=placement)
    before, base = model(X), Head()(X)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        close(model(X), before)
        model.unmerge_adapter()
        close(model(X), before)
        with model.disable_adapter():
            close(model(X), base)
    close(model.merge_and_unload()(X), before)


@pytest.mark.parametrize(
    "convert",
    [
        merge_adapter,
        lambda m: m.merge_adapter(),
        lambda m: m.merge_adapter(safe_merge=True),
        lambda m: m.merge_and_unload(),
        lambda m: m.get_base_model().fc.get_delta_weight("default"),
        lambda m: lora.convert_to_lora(m, rank=2),
    ],
)
def test_merging_is_refused_while_beta_is_not_zero(convert):
    model = adapted()
    set_annealing_step(model, 2, 20)
    before = model(X)
    with pytest.raises(UserError, match="step 2 of 20.*step 6, where beta reaches 0"):
        convert(model)
    close(model(X), before)
    set_annealing_step(model, 6, 20)
    convert(model)


def test_merge_refuses_what_it_would_get_wrong():
    with pytest.raises(UserError, match="no adapter"):
        merge_adapter(Head())
    model = adapted(beta=0.0)
    model.merge_adapter()
    with pytest.raises(UserError, match="merged adapter already"):
        merge_adapter(model)
    head = Head()
    head.tied = nn.Linear(5, 7, bias=False)
    head.tied.weight = head.lm_head.weight
    with pytest.raises(UserError, match=r"lm_head.*tied.* one tied weight"):
        merge_adapter(add_adapter(head, LoraConfig(target_modules=["lm_head"])))
    model = adapted(beta=0.0)
    model.get_base_model().fc.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="'fc' holds NaN"):
        merge_adapter(model)


# ---- saving ----


def test_saved_at_beta_zero_it_is_an_ordinary_lora_adapter(tmp_path):
    model = adapted(beta=0.0, placement="s-A-s-B", activation="tanh")
    model.save_pretrained(tmp_path)
    LoraConfig(target_modules=["fc"]).save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    plain = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config.keys() == plain.keys() and config["peft_type"] == "LORA"
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {f"{layer}.lora_{ab}.weight" for layer in ("fc", "lm_head") for ab in "AB"}
    loaded = PeftModel.from_pretrained(Head(), str(tmp_path)).eval()
    assert type(loaded.get_base_model().fc) is lora.Linear
    close(loaded(X), model(X))
    close(load_afa_adapter(Head(), tmp_path).eval()(X), model(X))


def test_saved_at_beta_above_zero_only_our_loader_opens_it(tmp_path):
    model = adapted(placement="s-A-B-s", activation="gelu", schedule="cosine", decay_ratio=0.5)
    set_annealing_step(model, 2, 8)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "AFA_LORA"
    with pytest.raises(Exception, match="AFA_LORA"):
        PeftModel.from_pretrained(Head(), str(tmp_path))
    with pytest.raises(Exception, match="AFA_LORA"):
        LoraConfig.from_pretrained(str(tmp_path))
    loaded = load_afa_adapter(Head(), tmp_path)
    config, saved = loaded.peft_config["default"], model.peft_config["default"]
    assert (config.step, config.total_steps, config.beta) == (2, 8, saved.beta) and config.beta > 0
    close(loaded.eval()(X), model(X))
    assert any(p.requires_grad for p in loaded.parameters())
    for either in (model, loaded):
        set_annealing_step(either, 3, 8)
    close(loaded(X), model(X))


def test_damaged_adapters_are_refused(tmp_path):
    with pytest.raises(UserError, match="adapter_config.json. is not readable"):
        load_afa_adapter(Head(), tmp_path / "missing")
    adapted().save_pretrained(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    good, tensors = json.loads(config.read_text()), load_file(weights)
    first = sorted(tensors)[0]
    wrong = {
        "has no": {k: v for k, v in tensors.items() if k != first},
        "has an unexpected": tensors | {"base_model.model.fc.lora_A.extra": torch.zeros(1)},
        "does not fit": tensors | {first: torch.zeros(1, 1)},
        "no plain float": tensors | {first: tensors[first].to(torch.int8)},
    }
    for word, broken in wrong.items():
        save_file(broken, weights)
        with pytest.raises(UserError, match=word):
            load_afa_adapter(Head(), tmp_path)
    weights.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_afa_adapter(Head(), tmp_path)
    for change, word in (({"peft_type": "IA3"}, "IA3"), ({"colour": 1}, "colour"), ({"activation": "x"}, "'x'")):
        config.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=word):
            load_afa_adapter(Head(), tmp_path)
