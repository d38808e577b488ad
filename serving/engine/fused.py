"""Decoders of the Llama family in one call: all layers run in C++, with nothing between them.

Which decoders are of that family is not decided by their name: the parts of each layer must be the known ones, and no
others, and then a pass must give what the model's own code gives (`TargetRunner.fuse_layers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cpu_kernels.ops import NATIVE_ROWS, PackedLinear, decoder_layers, panel_width, rms_norm, weight_memory
from serving.engine.kv_cache import Batch, Scoring, Segment

if TYPE_CHECKING:
    from serving.engine.model import TargetRunner


_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class LayerParts:
    """Where a layer of the family keeps its parts; projections that one product may give are listed together."""

    qkv: tuple[str, ...]
    gate_up: tuple[str, ...]
    o: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    input_norm: str = "input_layernorm"
    embed_norm: str | None = None  # where attention reads cat(norm(embeddings), norm(hidden))
    post_norm: str = "post_attention_layernorm"
    head_norms: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")  # where a layer has them
    activations: tuple[str, ...] = ("mlp.act_fn", "mlp.activation_fn")  # one of them; none: the layer's code has it


HEAD_LAYOUT = LayerParts(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
    input_norm="hidden_norm",
    embed_norm="input_layernorm",
    activations=(),
)
LAYOUTS = (
    LayerParts(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")),
    LayerParts(("self_attn.qkv_proj",), ("mlp.gate_up_proj",)),
)


@dataclass(frozen=True)
class FusedDecoder:
    """What the operator is given besides the batch: see `decoder_layers`."""

    weights: list[Tensor]
    windows: list[int]
    heads: int
    eps: float
    scale: float
    softcap: float
    widest: int | None = None  # tokens; a wider pass is faster layer by layer, where the CPU multiplies natively

    def takes(self, tokens: int) -> bool:
        return self.widest is None or tokens <= self.widest

    def run(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        slots: Sequence[tuple[Tensor, Tensor]],
        positions: Tensor,
        table: Tensor,
        masks: Sequence[Tensor],
        captured: Sequence[int],
        embeds: Tensor = _NOTHING,
    ) -> Tensor:
        """hidden [1, N, hidden] -> [1 + captured, N, hidden] float32; `slots` and `masks`: one entry a layer."""
        return decoder_layers(
            hidden,
            embeds,
            *rotation,
            self.weights,
            [keys for keys, _ in slots],
            [values for _, values in slots],
            positions,
            table,
            masks,
            self.windows,
            captured,
            self.heads,
            self.eps,
            self.scale,
            self.softcap,
        )


def recognise(layers: Sequence[nn.Module], scoring: Sequence[Scoring]) -> FusedDecoder | None:
    """The layers as the operator takes them, or None; their linear layers must have been packed.

    The weights of projections that read the same input are laid behind each other, and the layers keep views of them.
    """
    layout = next((layout for layout in LAYOUTS if all(_has_parts(layer, layout) for layer in layers)), None)
    if layout is None:
        return None
    epsilons = {_epsilon(layer.get_submodule(layout.input_norm)) or 0.0 for layer in layers}
    first = layers[0].get_submodule("self_attn")
    width = getattr(first, "head_dim", None)
    alike = len({(each.scale, each.softcap) for each in scoring}) == 1
    if len(epsilons) != 1 or width is None or not alike:
        return None
    weights = _tensors(layers, layout)
    heads = layers[0].get_submodule(layout.o).in_features // width
    windows = [each.window for each in scoring]
    native = any(isinstance(part, PackedLinear) and part.weight is not None for part in layers[0].modules())
    widest = NATIVE_ROWS - 1 if native else None
    return FusedDecoder(weights, windows, heads, epsilons.pop(), scoring[0].scale, scoring[0].softcap, widest)


def _has_parts(layer: nn.Module, layout: LayerParts) -> bool:
    """Whether a layer consists of the layout's parts and of nothing else that computes."""
    linears = {*layout.qkv, *layout.gate_up, layout.o, layout.down}
    norms = {name for name in (layout.input_norm, layout.embed_norm, layout.post_norm) if name}
    modules = dict(layer.named_modules())
    present = {name for name in layout.head_norms if name in modules}
    idle = (nn.Dropout, nn.Identity)  # nothing happens in them when a model is not training
    leaves = {n for n, module in modules.items() if n and not list(module.children()) and not isinstance(module, idle)}
    activation = leaves & set(layout.activations)
    return (
        leaves - activation - present == linears | norms
        and all(isinstance(modules[name], PackedLinear) for name in linears)
        and all(modules[name].out_features % panel_width() == 0 for name in linears)
        and all(_epsilon(modules[name]) is not None for name in norms | present)
        and all(
            isinstance(modules[name], nn.SiLU) or type(modules[name]).__name__ == "SiLUActivation"
            for name in activation
        )
        and len(activation) == min(1, len(layout.activations))
    )


class OneCallNorm(nn.Module):
    """A norm in one call: PyTorch's small operations, after a pass has emptied the caches, take a percent of a step."""

    def __init__(self, norm: nn.Module, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight: Tensor
        self.register_buffer("weight", norm.get_parameter("weight").detach().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def in_one_call(norm: nn.Module) -> OneCallNorm | None:
    """The same norm, faster; None: it is of another kind."""
    eps = _epsilon(norm)
    return None if eps is None else OneCallNorm(norm, eps)


def _epsilon(norm: nn.Module) -> float | None:
    """Of a root-mean-square norm with weights only; None for anything else, whatever it is called."""
    names = [name for name, _ in norm.named_parameters()]
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if names != ["weight"] or eps is None:
        return None
    weight = norm.get_parameter("weight").detach().float()
    x = torch.linspace(-1, 3, weight.numel())[None]  # with a mean, which other norms take away
    expected = x * (x.square().mean() + eps).rsqrt() * weight
    try:
        with torch.inference_mode():
            got = norm(x).float()
    except RuntimeError:  # one that does not mix dtypes
        return None
    return eps if torch.allclose(got, expected, rtol=0.01, atol=1e-4) else None


def _tensors(layers: Sequence[nn.Module], layout: LayerParts) -> list[Tensor]:
    """The layers' tensors in the operator's order; their weights lie in one memory in that order, from now on."""
    names = {*layout.qkv, *layout.gate_up, layout.o, layout.down}
    memory = _Memory([layer.get_submodule(name) for layer in layers for name in names])
    return [tensor for layer in layers for tensor in _of_layer(layer, layout, memory)]


def _of_layer(layer: nn.Module, layout: LayerParts, memory: _Memory) -> list[Tensor]:
    def norm(name: str | None) -> Tensor:
        modules = dict(layer.named_modules())
        return modules[name].weight.detach().float() if name in modules else _NOTHING

    q_norm, k_norm = layout.head_norms
    return [
        norm(layout.input_norm),
        norm(layout.embed_norm),
        *memory.join([layer.get_submodule(name) for name in layout.qkv]),
        norm(q_norm),
        norm(k_norm),
        *memory.join([layer.get_submodule(layout.o)]),
        norm(layout.post_norm),
        *memory.join([layer.get_submodule(name) for name in layout.gate_up]),
        *memory.join([layer.get_submodule(layout.down)]),
    ]


class _Memory:
    """Room for the packed weights of many layers: by themselves, most are smaller than a large page."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        parts = _packed(linears)
        # another engine of the same target has laid them out already: a copy would be read beside its own
        self.shared = len({part.packed.untyped_storage().data_ptr() for part in parts}) == 1
        self.free = weight_memory(0 if self.shared else sum(_rounded(part.packed.nbytes) for part in parts))

    def join(self, linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
        """(packed weight, float32 bias or nothing) of several projections of one input, moved here."""
        parts = _packed(linears)
        packed = self._joined(parts)
        if all(part.bias is None for part in parts):
            return packed, _NOTHING
        return packed, torch.cat(
            [torch.zeros(part.out_features) if part.bias is None else part.bias.float() for part in parts]
        )

    def _joined(self, parts: Sequence[PackedLinear]) -> Tensor:
        first, panels = parts[0].packed, sum(len(part.packed) for part in parts)
        if self.shared:
            ends = [part.packed.data_ptr() + part.packed.nbytes for part in parts]
            assert ends[:-1] == [part.packed.data_ptr() for part in parts[1:]]
            return first.as_strided((panels, *first.shape[1:]), first.stride())
        size = panels * first[0].nbytes
        packed = self.free[:size].view(first.dtype).view(panels, *first.shape[1:])
        self.free = self.free[_rounded(size) :]
        start = 0
        for part in parts:
            end = start + len(part.packed)
            part.packed = packed[start:end].copy_(part.packed)
            start = end
        return packed


def _packed(linears: Sequence[nn.Module]) -> list[PackedLinear]:
    return [linear for linear in linears if isinstance(linear, PackedLinear)]


def _rounded(size: int) -> int:
    """Up to a whole number of cache lines."""
    return -(-size // 64) * 64


def recognise_head(head: nn.Module, scale: float) -> FusedDecoder | None:
    """The one layer of an EAGLE-3 head as the operator takes it, or None: it has options that the operator has not."""
    layer = getattr(head, "midlayer", None)
    if layer is None or layer.norm_before_residual or not _has_parts(layer, HEAD_LAYOUT):
        return None
    weights = _tensors([layer], HEAD_LAYOUT)
    heads = layer.self_attn.o_proj.in_features // layer.self_attn.head_dim
    return FusedDecoder(weights, [0], heads, layer.hidden_norm.eps, scale, 0.0)


# Whether a faster way through a target's layers gives what the model's own code gives, but for rounding.


PROBED = 24  # tokens that are compared; no slot holds fewer


@torch.inference_mode()
def agree(
    runner: TargetRunner,
    run: Callable[[Batch], list[Tensor] | None],
    probes: Sequence[tuple[int, int]],
    *,
    precisely: bool,
) -> bool:
    """Whether `run` gives the hidden states of the model's code.

    probes: the position of the first token, as some models scale what is far into the context, and the number of a
    text. precisely: `run` computes in float32 whatever the dtype of the weights, and so does the model's code.
    """
    slot = runner.cache.acquire()
    errors = [_error(runner, run, slot, first, text, precisely) for first, text in probes]
    runner.cache.release(slot)
    # in half precision 0.02 and 0.05 were seen; states that have nothing in common differ by 1.4
    allowed = min(0.08 if precisely else 0.3, 64 * torch.finfo(runner.target.dtype).eps ** 0.75)
    return all(error <= allowed for error in errors)  # and none of them is NaN


@torch.inference_mode()
def adds_the_same(runner: TargetRunner, fused: FusedDecoder) -> bool:
    """Whether the first layer adds to the stream what it adds in the model's code.

    Behind many layers half precision hides what is a few percent of each, as where their outputs are scaled.
    """
    slot = runner.cache.acquire()
    batch = _probe(runner, slot, 1)
    runner.view.show(batch)
    entering = runner.target.embedding(batch.ids)[0].float()
    added = runner.all_layers(fused, batch, [1])[1] - entering
    captured = runner.model_pass(runner.embedded(batch.ids), batch.positions, (0, 1))[1]
    runner.cache.release(slot)
    # 0.006 was seen of good ones, 0.05 of layers whose outputs are scaled by 0.95
    return _apart(added, captured[1][0] - captured[0][0]) < 0.02


def _error(
    runner: TargetRunner,
    run: Callable[[Batch], list[Tensor] | None],
    slot: int,
    first: int,
    text: int,
    precisely: bool,
) -> float:
    batch = _probe(runner, slot, text)
    runner.view.show(batch)  # which keys are seen goes by the slot; only what is rotated is moved
    there = replace(batch, positions=batch.positions + first)
    output = run(there)
    if output is None:
        return torch.inf
    expected = runner.layer_by_layer(there.ids, there.positions, precisely=precisely)
    return _apart(torch.cat(output, dim=-1), torch.cat(expected, dim=-1))


def _probe(runner: TargetRunner, slot: int, text: int) -> Batch:
    ids = torch.arange(1, PROBED + 1).mul(7919 * text).remainder(runner.target.vocab_size).tolist()
    return Batch.of([Segment(slot, 0, 0, ids)], runner.target.device)


def _apart(got: Tensor, expected: Tensor) -> float:
    """How far two tensors differ, relative to the second."""
    difference = got.double() - expected.double()
    return float(difference.norm() / expected.double().norm())
