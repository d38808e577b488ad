"""The kernels inside the machinery of training: autocast, checkpointing, torch.compile, no gradients."""

import logging

import pytest
import torch
from kernel_cases import DEVICE, OUTPUTS, exact, limit, make_case, relative_error, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from afa_kernels import KernelsError, afa_lora_linear, ops, reference, triton_kernels, tuning


class Layer(nn.Module):
    """An adapted layer between two activations, as in a draft head."""

    def __init__(self, dtype: torch.dtype = torch.float32, function=afa_lora_linear) -> None:
        super().__init__()
        case = make_case(1, 33, 20, 4)
        self.weight = nn.Parameter(case.weight.to(dtype), requires_grad=False)
        self.lora_a, self.lora_b = nn.Parameter(case.lora_a), nn.Parameter(case.lora_b)
        self.beta, self.function = case.beta.double(), function

    def forward(self, x: Tensor) -> Tensor:
        options = {"beta": self.beta, "scaling": 2.0, "activation": "silu"}
        return torch.tanh(self.function(x * 2, self.weight, None, self.lora_a, self.lora_b, **options))


def gradients(layer: nn.Module, x: Tensor, call=None) -> dict[str, Tensor]:
    """The output, and the gradients of x, A and B."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = (layer if call is None else call)(x)
    y.float().square().sum().backward()
    inner = getattr(layer, "module", layer)
    return {"y": y.detach(), "dx": x.grad, "dA": inner.lora_a.grad.clone(), "dB": inner.lora_b.grad.clone()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in OUTPUTS)


X = make_case(6, 33, 1, 1, seed=4).x.reshape(2, 3, 33)


def test_checkpoint():
    layer = Layer()
    expected = gradients(layer, X)
    for reentrant in (False, True):
        assert same(expected, gradients(layer, X, lambda x, way=reentrant: checkpoint(layer, x, use_reentrant=way)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiling_the_surrounding_model_keeps_one_graph(dynamic):
    layer = Layer()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for beta, x in ((0.3, X), (0.0, X), *((0.5, x) for x in (X[:1], X[:, :2]) if dynamic)):
        layer.beta.fill_(beta)
        assert same(gradients(layer, x), gradients(layer, x, compiled))
        if x is X:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # a new beta is no new graph


def test_the_operators_keep_torchs_contract():
    case = make_case(5, 7, 3, 2)
    tensors = (case.x, case.weight, case.bias, case.lora_a, case.lora_b, case.beta)
    torch.library.opcheck(ops.forward_op, (*tensors, 1.5, "silu"))
    z = case.x @ case.lora_a.T
    for wanted in ([True, True, True], [True, False, True], [False, True, False]):
        args = (case.dy, case.x, case.weight, case.lora_a, case.lora_b, z, case.beta, 1.5, "tanh", wanted)
        torch.library.opcheck(ops.backward_op, (*args, torch.float32, torch.bfloat16))


def test_autocast():
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(24, 33, 28, 4, dtypes="fp32" if dtype == torch.float32 else "bf16+fp32")
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            got = run(case)
        expected = exact(case)
        assert got["y"].dtype == torch.bfloat16 and got["dx"].dtype == dtype
        assert got["dA"].dtype == got["dB"].dtype == torch.float32
        assert all(relative_error(got[name], expected[name]) < limit(torch.bfloat16) for name in OUTPUTS)
    layer = Layer()
    with tuning.only("update"):  # whose frozen product is torch's, and would be cast
        x = X.clone().requires_grad_()
        (plain,) = torch.autograd.grad(layer(x).sum(), x)
        y = layer(x)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):  # around the backward pass alone, it changes nothing
            (under,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(plain, under)


def test_gradients_switched_off_and_none_of_beta():
    layer = Layer()
    layer.beta.requires_grad_()
    expected = gradients(layer, X)["y"]
    assert layer.beta.grad is None
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            y = layer(X)
        assert torch.equal(y, expected) and not y.requires_grad


def test_double_backward_is_refused():
    layer = Layer()
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative .double backward.*AFA_KERNELS=reference"):
        dx.sum().backward()


def test_only_the_gradients_that_are_wanted():
    case = make_case(9, 8, 7, 3, bias=True)
    everything = run(case)
    for wanted, name in (("x", "dx"), ("lora_a", "dA"), ("lora_b", "dB")):
        tensors = {k: getattr(case, k).detach().clone() for k in ("x", "weight", "bias", "lora_a", "lora_b")}
        tensors[wanted].requires_grad_()
        y = afa_lora_linear(**tensors, beta=case.beta, scaling=case.scaling, activation=case.activation)
        y.backward(case.dy)
        assert torch.equal(tensors[wanted].grad, everything[name])
        assert all(t.grad is None for k, t in tensors.items() if k != wanted)


# ---- what takes the reference path, and says so ----


SHAPES = {"x": (4, 5), "weight": (6, 5), "bias": (6,)}


@pytest.mark.parametrize(
    ("word", "replaced"),
    [
        ("rank 257 is above 256", {"lora_a": torch.ones(257, 5), "lora_b": torch.ones(6, 257)}),
        ("torch.float64 is not one of", {name: torch.ones(shape).double() for name, shape in SHAPES.items()}),
        ("weight or bias wants a gradient", {"weight": torch.ones(6, 5, requires_grad=True)}),
    ],
)
def test_a_layer_that_the_kernels_do_not_cover(word, replaced, monkeypatch, caplog):
    """With AFA_KERNELS=triton an error gives the reason; by itself the reference runs, and the log says so once."""
    case = make_case(4, 5, 6, 3)
    tensors = {k: getattr(case, k) for k in ("x", "weight", "bias", "lora_a", "lora_b")}
    tensors |= {k: t.detach().to(DEVICE).requires_grad_(t.requires_grad) for k, t in replaced.items()}
    options = {"beta": case.beta, "scaling": 1.1, "activation": "gelu"}
    with pytest.raises(KernelsError, match=word):
        afa_lora_linear(**tensors, **options)
    monkeypatch.setenv("AFA_KERNELS", "auto")
    monkeypatch.setattr(triton_kernels, "down", lambda *a: pytest.fail("the kernels ran"))
    ops._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="afa_kernels"):
        for _ in range(3):
            y = afa_lora_linear(**tensors, **options)
    assert torch.equal(y, reference.afa_lora_linear(**tensors, **options))
    assert [word in record.message for record in caplog.records] == [True]
