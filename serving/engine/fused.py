"""Decoders of the Llama family in one call: all layers run in C++, with nothing between them.

A decoder is of that family when the parts of each layer are the known ones, and no others, and a pass gives what the
model's own code gives, but for rounding; its name does not count.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cpu_kernels.ops import FusedChains, FusedDecoder, OneCallNorm, PackedLinear, weight_memory
from serving.engine.kv_cache import RaggedBatch, Segment
from serving.engine.model import Angles, HeadRunner, TargetRunner

log = logging.getLogger(__name__)

PROBED = 24  # tokens that are compared; no slot holds fewer
_NOTHING = torch.empty(0)


@dataclass(frozen=True)
class LayerParts:
    """The names of a layer's parts; projections that one product may give are listed together."""

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    input_norm: str = "input_layernorm"
    embed_norm: str = ""  # where attention reads cat(norm(embeddings), norm(hidden))
    post_norm: str = "post_attention_layernorm"
    o: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    q_norm: str = "self_attn.q_norm"  # these two where a layer has them
    k_norm: str = "self_attn.k_norm"

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.qkv, self.o, *self.gate_up, self.down)


HEAD_LAYOUT = LayerParts(input_norm="hidden_norm", embed_norm="input_layernorm")
LAYOUTS = (LayerParts(), LayerParts(("self_attn.qkv_proj",), ("mlp.gate_up_proj",)))


def fuse_target(runner: TargetRunner) -> bool:
    """Run the target's layers in one call from now on and return True, if it is of the family that can.

    The linear layers must have been packed. The weights of projections that read the same input are laid behind each
    other, and the layers keep views of them.
    """
    layers, norm, scoring = runner.target.decoder.layers, in_one_call(runner.target.decoder.norm), runner.scoring
    layout = next((layout for layout in LAYOUTS if all(_has_parts(layer, layout) for layer in layers)), None)
    if layout is None or norm is None:
        return False
    epsilons = {_epsilon(layer.get_submodule(layout.input_norm)) for layer in layers}
    width = getattr(layers[0].self_attn, "head_dim", None)
    if len(epsilons) != 1 or width is None or len({(each.scale, each.softcap) for each in scoring}) != 1:
        return False
    output = layers[0].get_submodule(layout.o)
    fused = FusedDecoder(
        _weights(layers, layout),
        [each.window for each in scoring],
        output.in_features // width,
        epsilons.pop() or 0.0,
        scoring[0].scale,
        scoring[0].softcap,
    )
    runner.norm = norm
    if not _agrees(runner, fused):
        log.info("the layers run one by one: one call for all gives other states than %s", type(layers[0]).__name__)
        return False
    runner.fused, runner.angles = fused, _angles(runner)
    return True


@torch.inference_mode()
def _angles(runner: TargetRunner) -> Angles | None:
    """Return the table of the target's angles, unless those of a position depend on how far the others reach."""
    decoder, last = runner.target.decoder, runner.cache.capacity - 1
    dtype = runner.target.embedding.weight[:1]  # the angles are of its dtype

    def compute(positions: Tensor) -> tuple[Tensor, Tensor]:
        return decoder.rotary_emb(dtype, position_ids=positions)

    # position 0 turns by nothing, whatever the frequencies are
    alone, together = [compute(torch.tensor([[place]])) for place in (1, last)], compute(torch.tensor([[1, last]]))
    for part in (0, 1):
        if not all(torch.equal(each[part][0, 0], together[part][0, place]) for place, each in enumerate(alone)):
            return None
    return Angles(compute, runner.cache.capacity)


def fuse_head(runner: HeadRunner) -> bool:
    """Run the layer of an EAGLE-3 head in one call from now on and return True, if the operator has its options.

    Its linear layers must have been packed.
    """
    head, layer = runner.head, getattr(runner.head, "midlayer", None)
    if layer is None or layer.norm_before_residual or not _has_parts(layer, HEAD_LAYOUT):
        return False
    width = layer.self_attn.head_dim
    heads = layer.self_attn.o_proj.in_features // width
    weights = _weights([layer], HEAD_LAYOUT)
    runner.fused = FusedDecoder(weights, [0], heads, layer.hidden_norm.eps, head.config.head_dim**-0.5, 0.0)
    head.norm = in_one_call(head.get_submodule("norm")) or head.norm
    runner.norm = head.norm if getattr(head.config, "norm_output", False) else None
    runner.chains = _fuse_chains(runner, weights)
    return True


def _fuse_chains(runner: HeadRunner, layer: list[Tensor]) -> FusedChains | None:
    """Return whole chains in one call, if embeddings and LM head are plain tables; layer: as of `_weights`."""
    head: Any = runner.head
    fused, lm_head = runner.fused, head.get_lm_head()
    if fused is None or type(runner.embedding) is not nn.Embedding or not isinstance(lm_head, PackedLinear):
        return None
    if not isinstance(head.norm, OneCallNorm) or head.norm.eps != fused.eps:
        return None
    if (
        lm_head.bias is not None
        or head.fc.bias is not None
        or int(head.vocabulary.max()) >= runner.embedding.num_embeddings
    ):
        return None
    runner.reads_raw = (
        head.input_norm is None and head.fc_norm is None
    )  # otherwise fc reads what the head makes of them
    fc = head.fc.packed if runner.reads_raw else _NOTHING
    return FusedChains(
        [*layer, fc, head.norm.weight, lm_head.packed],
        runner.embedding.weight.detach().to(runner.dtype),
        head.vocabulary,
        fused.heads,
        fused.eps,
        fused.scale,
        runner.norm is not None,
    )


def _has_parts(layer: nn.Module, layout: LayerParts) -> bool:
    """Test that a layer consists of the layout's parts and of nothing else that computes."""
    required = {*layout.linears, *filter(None, (layout.input_norm, layout.embed_norm, layout.post_norm))}
    idle = (nn.Dropout, nn.Identity)  # nothing happens in them when a model is not training
    modules = layer.named_modules()
    leaves = {name: part for name, part in modules if not list(part.children()) and not isinstance(part, idle)}

    def fits(name: str, part: nn.Module) -> bool:
        if name in layout.linears:
            return isinstance(part, PackedLinear) and part.out_features % torch.ops.draftsmith.panel_width() == 0
        if name in required or name in (layout.q_norm, layout.k_norm):
            return _epsilon(part) is not None
        return isinstance(part, nn.SiLU) or type(part).__name__ == "SiLUActivation"

    return required <= leaves.keys() and all(fits(name, part) for name, part in leaves.items())


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


def _weights(layers: Sequence[nn.Module], layout: LayerParts) -> list[Tensor]:
    """Return the layers' tensors in the operator's order; from now on their weights lie in one memory in that order."""
    _lay_out([layer.get_submodule(name) for layer in layers for name in layout.linears])
    tensors: list[Tensor] = []
    for layer in layers:
        modules = dict(layer.named_modules())
        norms = {
            name: modules[name].weight.detach().float() if name in modules and name else _NOTHING
            for name in (layout.input_norm, layout.embed_norm, layout.q_norm, layout.k_norm, layout.post_norm)
        }
        tensors += [
            norms[layout.input_norm],
            norms[layout.embed_norm],
            *_joined([modules[name] for name in layout.qkv]),
            norms[layout.q_norm],
            norms[layout.k_norm],
            *_joined([modules[layout.o]]),
            norms[layout.post_norm],
            *_joined([modules[name] for name in layout.gate_up]),
            *_joined([modules[layout.down]]),
        ]
    return tensors


def _lay_out(linears: Sequence[Any]) -> None:
    """Move the weights of many packed layers into one memory: by themselves, most are smaller than a large page."""
    if len({linear.packed.untyped_storage().data_ptr() for linear in linears}) == 1:
        return  # another engine of the same target did it: a copy would be read beside the first one
    memory = weight_memory(sum(linear.packed.nbytes for linear in linears))
    for linear in linears:
        old = linear.packed
        linear.packed = memory[: old.nbytes].view(old.dtype).view(old.shape).copy_(old)
        memory = memory[old.nbytes :]


def _joined(linears: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Return several projections of one input, laid out together, as one: (packed weight, float32 bias or nothing)."""
    first, panels = linears[0].packed, sum(len(linear.packed) for linear in linears)
    weight = first.as_strided((panels, *first.shape[1:]), first.stride())
    if all(linear.bias is None for linear in linears):
        return weight, _NOTHING
    biases = [torch.zeros(each.out_features) if each.bias is None else each.bias.float() for each in linears]
    return weight, torch.cat(biases)


@torch.inference_mode()
def _agrees(runner: TargetRunner, fused: FusedDecoder) -> bool:
    """Compare the one call with the model's own code: the output at both ends of the context, and the first layer.

    Some models scale what is far into the context. And behind many layers half precision hides what is a few percent
    of each, as where their outputs are scaled; so what the first layer adds to the stream is compared by itself.
    """
    target, slot = runner.target, runner.cache.acquire(PROBED)
    ids = torch.arange(1, PROBED + 1).mul(7919).remainder(target.vocab_size).tolist()
    batch = RaggedBatch.of([Segment(slot, 0, 0, ids)], target.device)
    runner.view.show(batch)  # which keys are seen goes by the slot; only what is rotated is moved
    entering = target.embedding(batch.ids)
    # a residual stream in float32, or the target's dtype if that is wider
    given = {"inputs_embeds": entering.to(torch.promote_types(entering.dtype, torch.float32))}
    # in half precision 0.02 and 0.05 were seen; states that have nothing in common differ by 1.4. With integer weights
    # a last bit of x decides between two levels: 0.02 in float32 and 0.06 in bfloat16 were seen
    rounded = any(weight.dtype == torch.uint8 for weight in fused.weights)
    allowed = 0.2 if rounded else min(0.08, 64 * torch.finfo(target.dtype).eps ** 0.75)
    agrees = True
    for first in (0, runner.cache.capacity - PROBED):
        moved = replace(batch, positions=batch.positions + first)
        expected, captured = runner.run_layers(given, moved.positions, (0, 1))
        output, second = runner.run_fused(fused, moved, [1])
        agrees &= _difference(runner.norm(output), expected) <= allowed
        # 0.006 was seen of good first layers, with integers 0.018, and 0.05 of layers whose outputs are scaled by 0.95;
        # NaN is refused, too
        agrees &= _difference(second - entering[0].float(), captured[1] - captured[0]) < (0.03 if rounded else 0.02)
    runner.cache.release(slot)
    return agrees


def _difference(got: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the second."""
    difference = got.double() - expected.double()
    return float(difference.norm() / expected.double().norm())
