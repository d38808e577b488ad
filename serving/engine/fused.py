"""Decoders of the Llama family in one call: all layers run in C++, with nothing between them.

A decoder is of that family when the parts of each layer are the known ones, and no others, and a pass gives what the
model's own code gives, but for rounding; its name does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cpu_kernels.ops import NATIVE_ROWS, FusedDecoder, OneCallNorm, PackedLinear, panel_width, weight_memory
from serving.engine.kv_cache import RaggedBatch, Scoring, Segment
from serving.engine.model import HeadRunner, TargetRunner

PROBED = 24  # tokens that are compared; no slot holds fewer
_NOTHING = torch.empty(0)


def fuse_target(runner: TargetRunner) -> bool:
    """Run the target's layers in one call from now on and return True, if it is of the family that can.

    The linear layers must have been packed.
    """
    fused, norm = recognise(runner.target.decoder.layers, runner.scoring), in_one_call(runner.target.decoder.norm)
    if fused is None or norm is None:
        return False
    runner.norm = norm
    if _agrees(runner, fused):
        runner.fused = fused
    return runner.fused is not None


def fuse_head(runner: HeadRunner) -> bool:
    """Run the head's layer in one call from now on and return True, if it can be. Its linear layers are packed."""
    head = runner.head
    fused = recognise_head(head, head.config.head_dim**-0.5)
    if fused is None:
        return False
    head.norm = in_one_call(head.get_submodule("norm")) or head.norm
    # a step has so little arithmetic that computing angles would be a twentieth of it
    everywhere = torch.arange(runner.cache.capacity)[None]
    runner.angles = tuple(part[0, 0] for part in head.rope(everywhere, torch.float32))  # [capacity, head_dim] each
    runner.norm = head.norm if getattr(head.config, "norm_output", False) else None
    runner.fused, runner.run = fused, runner.run_fused
    return True


@dataclass(frozen=True)
class LayerParts:
    """The names of a layer's parts; projections that one product may give are listed together."""

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


def recognise(layers: Sequence[nn.Module], scoring: Sequence[Scoring]) -> FusedDecoder | None:
    """Return the layers as the operator takes them, or None; their linear layers must have been packed.

    The weights of projections that read the same input are laid behind each other, and the layers keep views of them.
    """
    layout = next((layout for layout in LAYOUTS if all(_has_parts(layer, layout) for layer in layers)), None)
    if layout is None:
        return None
    epsilons = {_epsilon(layer.get_submodule(layout.input_norm)) or 0.0 for layer in layers}
    width = getattr(layers[0].get_submodule("self_attn"), "head_dim", None)
    alike = len({(each.scale, each.softcap) for each in scoring}) == 1
    if len(epsilons) != 1 or width is None or not alike:
        return None
    native = any(isinstance(part, PackedLinear) and part.weight is not None for part in layers[0].modules())
    return FusedDecoder(
        _tensors(layers, layout),
        [each.window for each in scoring],
        layers[0].get_submodule(layout.o).in_features // width,
        epsilons.pop(),
        scoring[0].scale,
        scoring[0].softcap,
        NATIVE_ROWS - 1 if native else None,
    )


def recognise_head(head: nn.Module, scale: float) -> FusedDecoder | None:
    """Return the one layer of an EAGLE-3 head as the operator takes it; None: the operator lacks its options."""
    layer = getattr(head, "midlayer", None)
    if layer is None or layer.norm_before_residual or not _has_parts(layer, HEAD_LAYOUT):
        return None
    weights = _tensors([layer], HEAD_LAYOUT)
    heads = layer.self_attn.o_proj.in_features // layer.self_attn.head_dim
    return FusedDecoder(weights, [0], heads, layer.hidden_norm.eps, scale, 0.0)


def _has_parts(layer: nn.Module, layout: LayerParts) -> bool:
    """Test that a layer consists of the layout's parts and of nothing else that computes."""
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


def in_one_call(norm: nn.Module) -> OneCallNorm | None:
    """Return the same norm, faster; None: it is of another kind."""
    eps = _epsilon(norm)
    return None if eps is None else OneCallNorm(norm.get_parameter("weight"), eps)


def _epsilon(norm: nn.Module) -> float | None:
    """Return the epsilon of a root-mean-square norm with weights only; None for anything else, whatever its name."""
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
    """Return the layers' tensors in the operator's order; from now on their weights lie in one memory in that order."""
    names = {*layout.qkv, *layout.gate_up, layout.o, layout.down}
    memory = _Memory([layer.get_submodule(name) for layer in layers for name in names])
    return [tensor for layer in layers for tensor in _of_layer(layer, layout, memory)]


def _of_layer(layer: nn.Module, layout: LayerParts, memory: _Memory) -> list[Tensor]:
    def norm(name: str | None) -> Tensor:
        modules = dict(layer.named_modules())
        return modules[name].weight.detach().float() if name in modules else _NOTHING

    def linear(*names: str) -> tuple[Tensor, Tensor]:
        return memory.join([layer.get_submodule(name) for name in names])

    q_norm, k_norm = layout.head_norms
    return [
        norm(layout.input_norm),
        norm(layout.embed_norm),
        *linear(*layout.qkv),
        norm(q_norm),
        norm(k_norm),
        *linear(layout.o),
        norm(layout.post_norm),
        *linear(*layout.gate_up),
        *linear(layout.down),
    ]


class _Memory:
    """One memory for the packed weights of many layers: by themselves, most are smaller than a large page."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        parts = _packed(linears)
        # another engine of the same target has laid them out already: a copy would be read beside the first one
        self.shared = len({part.packed.untyped_storage().data_ptr() for part in parts}) == 1
        self.free = weight_memory(0 if self.shared else sum(_rounded(part.packed.nbytes) for part in parts))

    def join(self, linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
        """Move the weights of several projections of one input here: (packed weight, float32 bias or nothing)."""
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
    """Round up to a whole number of cache lines."""
    return -(-size // 64) * 64


@torch.inference_mode()
def _agrees(runner: TargetRunner, fused: FusedDecoder) -> bool:
    """Compare the one call with the model's own code: the states at both ends of the context, and the first layer.

    Some models scale what is far into the context. And behind many layers half precision hides what is a few percent
    of each, as where their outputs are scaled; so what the first layer adds to the stream is compared by itself.
    """
    target, slot = runner.target, runner.cache.acquire()
    ids = torch.arange(1, PROBED + 1).mul(7919).remainder(target.vocab_size).tolist()
    batch = RaggedBatch.of([Segment(slot, 0, 0, ids)], target.device)
    runner.view.show(batch)  # which keys are seen goes by the slot; only what is rotated is moved
    errors = []
    for first in (0, runner.cache.capacity - PROBED):
        moved = replace(batch, positions=batch.positions + first)
        expected = runner.layer_by_layer(moved.ids, moved.positions, precisely=True)
        errors.append(_difference(torch.cat(runner.fused_pass(fused, moved), dim=-1), torch.cat(expected, dim=-1)))
    entering = target.embedding(batch.ids).float()
    added = runner.fused_layers(fused, batch, [1])[1] - entering[0]
    captured = runner.model_pass({"inputs_embeds": entering}, batch.positions, (0, 1))[1]
    first_layer = _difference(added, captured[1][0] - captured[0][0])
    runner.cache.release(slot)
    # in half precision 0.02 and 0.05 were seen; states that have nothing in common differ by 1.4
    allowed = min(0.08, 64 * torch.finfo(target.dtype).eps ** 0.75)
    # 0.006 was seen of good first layers, 0.05 of layers whose outputs are scaled by 0.95; NaN is refused, too
    return all(error <= allowed for error in errors) and first_layer < 0.02


def _difference(got: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the second."""
    difference = got.double() - expected.double()
    return float(difference.norm() / expected.double().norm())
