"""Whether a faster way through a target's layers gives what the model's own code gives, but for rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from serving.engine.batch import Batch, Segment

if TYPE_CHECKING:
    from serving.engine.cpu.decoder import FusedDecoder
    from serving.engine.runner import TargetRunner

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
