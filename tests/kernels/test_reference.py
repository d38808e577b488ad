"""The reference arithmetic of AFA-LoRA against the formula."""

from functools import partial

import pytest
import torch
from afa_models import SIGMA, formula
from torch import Tensor

from afa_kernels import ACTIVATIONS, PLACEMENTS, afa_lora_linear, annealed_activation, annealed_lora

BETAS = [0.0, 0.3, 1.0]


def make(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 5), "weight": (7, 5), "bias": (7,), "lora_a": (4, 5), "lora_b": (7, 4)}
    return {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in shapes.items()}


def test_tables_are_complete():
    assert set(ACTIVATIONS) == set(SIGMA)
    assert set(PLACEMENTS) == {"A-s-B", "s-A-B", "s-A-B-s", "s-A-s-B", "s-A-s-B-s"}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("activation", SIGMA)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_is_the_formula(placement, activation, beta):
    t = make()
    options = {"beta": torch.tensor(beta, dtype=torch.float64), "scaling": 1.7, "activation": activation}
    delta = 1.7 * formula(t["x"], t["lora_a"], t["lora_b"], beta, activation, placement)
    got = annealed_lora(t["x"], t["lora_a"], t["lora_b"], placement=placement, **options)
    torch.testing.assert_close(got, delta, rtol=1e-12, atol=1e-12)
    if placement == "A-s-B":
        full = t["x"] @ t["weight"].T + t["bias"] + delta
        torch.testing.assert_close(afa_lora_linear(**t, **options), full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", SIGMA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_beta_zero_is_plain_lora_bit_for_bit(dtype, activation):
    t, linear = make(dtype), torch.nn.functional.linear
    for bias in (t["bias"], None):
        base = linear(t["x"], t["weight"], bias)
        plain = base + 2.0 * linear(linear(t["x"], t["lora_a"]), t["lora_b"])
        got = afa_lora_linear(**t | {"bias": bias}, beta=torch.tensor(0.0), scaling=2.0, activation=activation)
        assert torch.equal(got, plain)


@pytest.mark.parametrize("activation", SIGMA)
def test_gradients(activation):
    t = {k: v.requires_grad_() for k, v in make().items()}
    beta = torch.tensor(0.6, dtype=torch.float64)

    def layer(*tensors):
        return afa_lora_linear(*tensors, beta=beta, scaling=1.3, activation=activation)

    assert torch.autograd.gradcheck(layer, tuple(t.values()))
    for placement in PLACEMENTS:
        delta = partial(annealed_lora, beta=beta, scaling=1.3, activation=activation, placement=placement)
        assert torch.autograd.gradcheck(delta, (t["x"], t["lora_a"], t["lora_b"]))


def test_names():
    t = make()
    options = {"beta": torch.tensor(0.5), "scaling": 1.0, "activation": "tanh"}
    adapter = (t["x"], t["lora_a"], t["lora_b"])
    glyph = annealed_lora(*adapter, placement="σ-A-σ-B", **options)
    assert torch.equal(glyph, annealed_lora(*adapter, placement="s-A-s-B", **options))
    with pytest.raises(ValueError, match="'A-B-s'.*A-s-B"):
        annealed_lora(*adapter, placement="A-B-s", **options)
    with pytest.raises(ValueError, match="'swish'.*silu"):
        annealed_activation(t["x"], torch.tensor(0.5), "swish")
