"""AFA-LoRA's layer beside all that PEFT can do to a layer: formula, other adapters, refusals."""

import copy
import math

import pytest
import torch
from afa_models import PLACEMENTS, SIGMA, Head, X, adapted, close, formula, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from draft.afa import AfaLinear, AfaLoraConfig, add_adapter, beta_at, set_annealing_step
from draft.errors import UserError


def expected_fc(model: PeftModel, names: dict[str, tuple[float, str, str]], scaling: float = 6 / 4) -> Tensor:
    """fc's output for adapters {name: (beta, activation, placement)}."""
    fc = model.get_base_model().fc
    out = X @ fc.base_layer.weight.double().T + fc.base_layer.bias.double()
    for name, (beta, activation, placement) in names.items():
        a, b = fc.lora_A[name].weight, fc.lora_B[name].weight
        out = out + scaling * formula(X, a, b, beta, activation, placement)
    return out


# ---- schedule and configuration ----


def test_schedule_formulas_at_some_steps():
    assert [beta_at(step, 10) for step in range(11)] == pytest.approx([1, 2 / 3, 1 / 3] + [0] * 8)
    assert beta_at(3, 10) == 0.0 and beta_at(7, 100, 0.07) == 0.0  # exactly, though 0.07 * 100 > 7 in binary
    assert beta_at(1, 1, 1.0) == 0.0
    assert beta_at(15, 100, 0.3, "cosine") == pytest.approx(0.5)
    assert beta_at(10, 100, 0.3, "cosine") == pytest.approx(0.75)
    tail = math.exp(-5)
    assert beta_at(15, 100, 0.3, "exponential") == pytest.approx((math.exp(-2.5) - tail) / (1 - tail))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize(("total", "ratio"), [(100, 0.3), (7, 0.5), (3, 1.0), (1, 0.3), (1000, 0.001)])
def test_every_schedule_falls_from_one_to_exactly_zero(schedule, total, ratio):
    betas = [beta_at(step, total, ratio, schedule) for step in range(total + 1)]
    assert betas[0] == 1.0 and betas[-1] == 0.0 and betas == sorted(betas, reverse=True)
    assert all((beta == 0.0) == (step >= ratio * total - 1e-9) for step, beta in enumerate(betas) if step)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"activation": "swish"}, "swish"),
        ({"placement": "A-B-s"}, "A-B-s"),
        ({"schedule": "step"}, "step"),
        ({"decay_ratio": 0.0}, "decay_ratio is 0.0"),
        ({"decay_ratio": float("nan")}, "nan"),
        ({"beta": -0.1}, "-0.1"),
        ({"step": -1, "total_steps": 4}, "-1"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"target_parameters": ["experts.down"]}, "target_parameters"),
    ],
)
def test_a_wrong_option_is_named(options, word):
    with pytest.raises(UserError, match=word):
        AfaLoraConfig(**options)


def test_config_follows_step_and_total():
    config = AfaLoraConfig(placement="σ-A-σ-B", step=1, total_steps=10)
    assert config.placement == "s-A-s-B" and config.beta == pytest.approx(2 / 3)
    assert copy.deepcopy(config) == config and config._custom_modules == {nn.Linear: AfaLinear}


# ---- the layer ----


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("activation", SIGMA)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_layer_is_the_formula(use_rslora, placement, activation, beta):
    model = adapted(placement=placement, activation=activation, beta=beta, use_rslora=use_rslora)
    scaling = 6 / math.sqrt(4) if use_rslora else 6 / 4
    close(model.get_base_model().fc(X), expected_fc(model, {"default": (beta, activation, placement)}, scaling))


def test_beta_follows_the_step_in_every_layer():
    model = adapted(activation="tanh")
    head = model.get_base_model()
    for step in range(5):
        beta = set_annealing_step(model, step, 10)
        assert beta == beta_at(step, 10) == model.peft_config["default"].beta
        close(head.fc(X), expected_fc(model, {"default": (beta, "tanh", "A-s-B")}))
        assert [m.annealed["default"].beta_on(X.device).item() for m in (head.fc, head.lm_head)] == [beta] * 2
    assert (model.peft_config["default"].step, model.peft_config["default"].total_steps) == (4, 10)
    assert not any("beta" in name for name, _ in [*model.named_buffers(), *model.state_dict().items()])


def test_set_annealing_step_needs_an_afa_adapter():
    with pytest.raises(UserError, match="no AFA-LoRA adapter"):
        set_annealing_step(add_adapter(Head(), LoraConfig(target_modules=["fc"])), 0, 10)
    with pytest.raises(UserError, match="'other'"):
        set_annealing_step(adapted(), 0, 10, "other")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_bf16_input_is_never_cast_up(placement, beta, monkeypatch):
    model = adapted(torch.bfloat16, placement=placement, beta=beta)
    fc = model.get_base_model().fc
    assert fc.lora_A["default"].weight.dtype == torch.float32
    seen: set[torch.dtype] = set()
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: (seen.add(x.dtype), linear(x, *rest))[1])
    out = fc(X.bfloat16())
    assert out.dtype == torch.bfloat16 and seen == {torch.bfloat16}
    expected = expected_fc(model, {"default": (beta, "silu", placement)})
    assert (out - expected).norm() < 0.02 * expected.norm()
    out.float().sum().backward()
    assert fc.lora_A["default"].weight.grad.dtype == torch.float32


def test_dropout_acts_in_training_only():
    model = adapted(beta=0.4, lora_dropout=0.5)
    fc = model.get_base_model().fc
    expected = expected_fc(model, {"default": (0.4, "silu", "A-s-B")})
    close(fc(X), expected)
    model.train()
    torch.manual_seed(5)
    dropped = nn.functional.dropout(X, 0.5)
    torch.manual_seed(5)
    base = X @ fc.base_layer.weight.T + fc.base_layer.bias
    a, b = fc.lora_A["default"].weight, fc.lora_B["default"].weight
    close(fc(X), base + 1.5 * formula(dropped, a, b, 0.4, "silu", "A-s-B"))


@pytest.mark.parametrize("plain_first", [False, True])
def test_plain_lora_beside_afa_on_the_same_layers(plain_first):
    shared = {"r": 4, "lora_alpha": 6, "target_modules": ["fc", "lm_head"]}
    configs = {"plain": LoraConfig(**shared), "afa": AfaLoraConfig(**shared, beta=0.4)}
    first, second = ("plain", "afa") if plain_first else ("afa", "plain")
    model = get_peft_model(Head(), configs[first], adapter_name=first)
    model.add_adapter(second, configs[second])
    randomise(model)
    model.eval()
    fc = model.get_base_model().fc
    alone = {"plain": {"plain": (0.0, "silu", "A-s-B")}, "afa": {"afa": (0.4, "silu", "A-s-B")}}
    for name, adapters in alone.items():
        model.set_adapter(name)
        close(fc(X), expected_fc(model, adapters))
    model.base_model.set_adapter(["plain", "afa"])
    close(fc(X), expected_fc(model, alone["plain"] | alone["afa"]))
    rows = ["afa", "plain", "__base__"]
    mixed = model(X, adapter_names=rows)
    for row, name in enumerate(rows):
        model.set_adapter(name) if name != "__base__" else model.base_model.disable_adapter_layers()
        close(mixed[row], model(X)[row])


def test_two_afa_adapters_add_up_and_anneal_apart():
    model = adapted(beta=1.0)
    add_adapter(model, AfaLoraConfig(r=4, lora_alpha=6, target_modules=["fc"], placement="s-A-B-s"), "two")
    randomise(model)
    model.base_model.set_adapter(["default", "two"])
    set_annealing_step(model, 1, 10, "two")
    expected = expected_fc(model, {"default": (1.0, "silu", "A-s-B"), "two": (2 / 3, "silu", "s-A-B-s")})
    close(model.eval().get_base_model().fc(X), expected)


def test_beta_moved_in_inference_mode_can_be_trained_with():
    model = adapted(beta=0.5)
    variant = model.get_base_model().fc.annealed["default"]
    with torch.inference_mode():
        model(X)
        moved = variant.beta_on(torch.device("meta"))  # as by the first forward on a GPU
    assert moved.device.type == "meta" and not moved.is_inference()


# ---- refusals ----


class QuantisedLinear(nn.Linear):
    """A subclass, as quantisation libraries make them."""


def quantised_weight() -> nn.Linear:
    odd = nn.Linear(6, 6)
    odd.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    return odd


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (nn.Embedding(9, 6), "Embedding"),
        (nn.Conv1d(6, 6, 1), "Conv1d"),
        (QuantisedLinear(6, 6), "QuantisedLinear"),
        (quantised_weight(), "int8"),
    ],
)
def test_layers_that_are_not_plain_linear_are_named(layer, word, existing):
    model: nn.Module = nn.ModuleDict({"odd": copy.deepcopy(layer)})
    config = AfaLoraConfig(target_modules=["odd"])
    if existing:
        model = get_peft_model(model, LoraConfig(target_modules=["odd"]))
    with pytest.raises(UserError, match=f"'odd' is .*{word}"):
        model.add_adapter("afa", config) if isinstance(model, PeftModel) else get_peft_model(model, config)


def test_target_that_names_no_layer():
    with pytest.raises(UserError, match="'q_projj'.*fc, lm_head"):
        add_adapter(Head(), AfaLoraConfig(target_modules=["fc", "q_projj"]))
    with pytest.raises(UserError, match="Head"):
        add_adapter(Head(), AfaLoraConfig(target_modules="nothing.*"))
