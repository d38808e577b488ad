"""The reference arithmetic of AFA-LoRA against the formula, written out again without torch's layers."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from afa_kernels import ACTIVATIONS, PLACEMENTS, afa_lora_linear, annealed_activation, annealed_lora

BETAS = [0.0, 0.3, 1.0]
SIGMA = {
    "silu": lambda z: z / (1 + math.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))),
    "relu": lambda z: max(z, 0.0),
    "tanh": lambda z: (math.exp(2 * z) - 1) / (math.exp(2 * z) + 1),
}


def phi(z: Tensor, beta: float, activation: str) -> Tensor:
    values = [beta * SIGMA[activation](v) + (1 - beta) * v for v in z.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).reshape(z.shape)


def formula(x: Tensor, a: Tensor, b: Tensor, beta: float, activation: str, placement: str) -> Tensor:
    h = x
    for stage in placement.split("-"):
        h = {"s": lambda h: phi(h, beta, activation), "A": lambda h: h @ a.T, "B": lambda h: h @ b.T}[stage](h)
    return h


def make(dtype: torch.dtype = torch.float64, adapter_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 5), "weight": (7, 5), "bias": (7,), "lora_a": (4, 5), "lora_b": (7, 4)}
    tensors = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    other = adapter_dtype or dtype
    return {k: v.to(other if k.startswith("lora") else dtype) for k, v in tensors.items()}


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
    t = make(dtype)
    base = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    plain = base + 2.0 * torch.nn.functional.linear(torch.nn.functional.linear(t["x"], t["lora_a"]), t["lora_b"])
    got = afa_lora_linear(**t, beta=torch.tensor(0.0), scaling=2.0, activation=activation)
    assert torch.equal(got, plain)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_fp32_adapters_beside_bf16_never_cast_x_up(placement, monkeypatch):
    t = make(torch.bfloat16, torch.float32)
    t["lora_a"].requires_grad_(), t["lora_b"].requires_grad_()
    seen: list[torch.dtype] = []
    linear = torch.nn.functional.linear

    def spy(x, *rest):
        seen.append(x.dtype)
        return linear(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    options = {"beta": torch.tensor(0.4, dtype=torch.float64), "scaling": 0.5, "activation": "silu"}
    out = annealed_lora(t["x"], t["lora_a"], t["lora_b"], placement=placement, **options)
    assert out.dtype == torch.bfloat16 and seen == [torch.bfloat16] * 2
    out.float().square().sum().backward()
    assert t["lora_a"].grad.dtype == t["lora_b"].grad.dtype == torch.float32
    exact = 0.5 * formula(*(t[name].detach().double() for name in ("x", "lora_a", "lora_b")), 0.4, "silu", placement)
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.05)
    if placement == "A-s-B":
        assert afa_lora_linear(**t, **options).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", ["silu", "gelu", "tanh", "relu"])
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


def test_no_bias():
    t = make() | {"bias": None}
    got = afa_lora_linear(**t, beta=torch.tensor(0.0), scaling=1.0, activation="silu")
    torch.testing.assert_close(got, t["x"] @ (t["weight"] + t["lora_b"] @ t["lora_a"]).T)
