"""The optimisers of a run, its learning rates, and the average of its weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from draft.heads import DraftHead
from draft.target.target import fastest_cpu_dtype
from draft.training.config import RunSettings

_BETAS = (0.9, 0.95)
_MOMENTUM = 0.95  # of Muon
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic, by the post on Muon


def make_optimizer(parameters: Mapping[str, nn.Parameter], head: DraftHead, settings: RunSettings) -> Any:
    """The optimiser of a run, one group a parameter with its `scale`: see `share_of_rate`.

    parameters: what is trained, by name.
    """
    scaled = settings.method == "full"
    groups = {
        name: {"params": [parameter], "scale": share_of_rate(parameter) if scaled else 1.0}
        for name, parameter in parameters.items()
    }
    if settings.training.optimizer == "adamw":
        return torch.optim.AdamW(groups.values(), lr=settings.learning_rate, betas=_BETAS, weight_decay=0.0)
    layers = tuple(f"{target}.weight" for target in head.adapter_targets)
    matrices = [group for name, group in groups.items() if name.endswith(layers)]
    others = [group for name, group in groups.items() if not name.endswith(layers)]
    return MuonWithAdamW(matrices, others, settings.learning_rate)


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/), its steps scaled to the size of AdamW's (arXiv 2502.16982).

    As `torch.optim.Muon(weight_decay=0, adjust_lr_fn="match_rms_adamw")`, which multiplies in bfloat16 everywhere: on
    a CPU that does not, a step of the bundled head took three times as long as its whole forward and backward pass.
    """

    def __init__(self, matrices: list[dict[str, Any]], rate: float) -> None:
        super().__init__(matrices, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - _MOMENTUM)
                update = orthogonalised(parameter.grad.lerp(momentum, _MOMENTUM))  # Nesterov's
                parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix [rows, columns] with its singular values moved near 1, by Newton and Schulz's iteration.

    Near: 0.68 to 1.21, of values above about a 500th of the norm; smaller ones grow towards that. Computed in the dtype
    that the device multiplies fastest, since the iteration forgives rounding.
    """
    dtype = torch.bfloat16 if matrix.device.type == "cuda" else fastest_cpu_dtype()
    result = matrix.to(dtype)
    tall = len(matrix) > matrix.shape[1]
    result = result.T if tall else result
    result = result / result.norm().clamp_min(1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(steps):
        gram = result @ result.T
        result = torch.addmm(result, torch.addmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return (result.T if tall else result).to(matrix.dtype)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the decoder layer, AdamW for the rest (fc, norms, the LM head); one rate suits both."""

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], rate: float) -> None:
        super().__init__([*matrices, *others], {"lr": rate})
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(Muon(matrices, rate))
        if others:
            self._parts.append(torch.optim.AdamW(others, rate, betas=_BETAS, weight_decay=0.0))
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self.state: defaultdict[Any, Any] = defaultdict(dict)
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def share_of_rate(parameter: Tensor) -> float:
    """A parameter's share of the learning rate where all weights of a head are trained.

    Adam moves every weight by about the rate, whatever its size. `fc` reads raw residual streams of large scale and has
    small weights: a rate that suits the other matrices would overwrite it in a few steps. So the share falls with the
    root mean square of the starting weights, below that of a common initialisation (0.02).
    """
    size = float(parameter.detach().float().pow(2).mean().sqrt())
    return min(1.0, size / 0.02) if size else 1.0  # what starts at zero says nothing about its size


def learning_rate_at(step: int, total_steps: int, settings: RunSettings) -> float:
    """The rate of the step after `step` steps: a linear rise, then a cosine to `final_rate` of the peak."""
    warmup = max(1, round(settings.training.warmup_ratio * total_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    last = settings.training.final_rate
    return settings.learning_rate * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress)))


class Average:
    """Exponential moving average of the trained weights, which is what is evaluated and kept.

    Its memory is shorter in the first steps, so that it does not drag the starting weights along.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """step: optimiser steps done."""
        share = 1 - min(self.decay, step / (step + 9))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter.detach(), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters hold the average for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            current = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name] = current
