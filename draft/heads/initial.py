"""A new head's first weights, in closed form: ridge regressions instead of the first hours of gradient descent.

A head has to turn the target's state at token t, and most the embedding of token t+1, into the target's next state.
Its linear part can be solved for. EAGLE-3, with n_t the target's last hidden state at t, before the final norm's
weights:

    fc                 ridge regression of n_t       on the auxiliary states of t, as fc reads them
    o_proj · v_proj    ridge regression of n_{t+1} - residual on cat(embedding of t+1, fc(...)), both normed

which has rank at most heads * head_dim and so splits into the two matrices by a singular value decomposition.
Queries and keys start as the same random projection of the embedding: every position then attends mostly to itself,
as the regression assumes. The MLP starts from the target's last layer with an almost silent output; the LM head and the
norm are the target's, the norm scaled so that a prediction is no sharper than it should be.

EAGLE-1, with h_t the last hidden state after the final norm: fc is the regression of h_{t+1} on cat(embedding of t+1,
h_t), and attention and MLP start almost silent.

Medusa: LM head k is the target's after the regression M_k of h_{t+1+k} on h_t, and the blocks start as the identity,
as FasterDecoding has them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from draft.heads.layers import MLP, RMSNorm
from draft.target import Target

_NORMS_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm")  # Gemma has both
_RIDGE = 1e-3  # of the mean diagonal of X^T X
SCALES = [step / 20 for step in range(1, 25)]
SILENT = 0.002  # standard deviation of an output matrix that hardly says anything yet
SELF_ATTENTION_STD = 0.05  # for normed inputs of unit scale: a query's own key wins against some hundred others


class Ridge:
    """Least squares with a ridge, from sums over batches: W minimises |X W - Y|² + λ|W|²."""

    def __init__(self) -> None:
        self.xx: Tensor | float = 0.0
        self.xy: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: [rows, inputs], y: [rows, outputs]."""
        self.xx, self.xy = self.xx + (x.T @ x).double(), self.xy + (x.T @ y).double()

    def solve(self) -> Tensor:
        """W transposed as nn.Linear has it: [outputs, inputs], float64; ValueError when no data was added."""
        if not isinstance(self.xx, Tensor):
            raise ValueError("no data was added")
        eye = torch.eye(len(self.xx), dtype=torch.float64, device=self.xx.device)
        return torch.linalg.solve(self.xx + _RIDGE * self.xx.diagonal().mean() * eye, self.xy).T


def normed_states(target: Target, last_hidden: Tensor) -> Tensor:
    """The target's last hidden states before the final norm's weights, [rows, hidden] of unit root mean square."""
    weight = norm_weight(target.decoder.norm, last_hidden.shape[-1])
    return nn.functional.rms_norm(widened(last_hidden) / widened(weight), last_hidden.shape[-1:])


def widened(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(torch.float32, x.dtype))


def norm_weight(norm: nn.Module, size: int) -> Tensor:
    """The factors of an RMSNorm, [size]: Gemma's are one more than its weight."""
    weight = next(norm.parameters())
    return norm(torch.ones(1, size, dtype=weight.dtype, device=weight.device))[0].detach()


def split_product(product: Tensor, v_proj: nn.Linear, o_proj: nn.Linear, head_dim: int) -> None:
    """Set o_proj · v_proj = product [hidden, 2 * hidden], as nearly as their rank allows.

    Where key-value heads are shared by g queries, the same values arrive g times: o_proj takes each with 1/g.
    """
    rank = v_proj.out_features
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    rank = min(rank, len(s))
    left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * v[:rank]
    v_proj.weight.zero_()
    v_proj.weight[:rank] = right.to(v_proj.weight)
    groups = o_proj.in_features // v_proj.out_features
    per_value = torch.zeros(o_proj.out_features, v_proj.out_features, dtype=left.dtype, device=left.device)
    per_value[:, :rank] = left / groups
    per_head = per_value.view(len(per_value), -1, head_dim).repeat_interleave(groups, dim=1)
    o_proj.weight.copy_(per_head.flatten(1))


def start_mlp(mlp: MLP, norm: RMSNorm, target: Target, generator: torch.Generator) -> None:
    """The inner features of the target's last MLP, with an almost silent output; `norm`: of its input."""
    last = target.decoder.layers[-1]
    their_norm = next((getattr(last, name) for name in _NORMS_BEFORE_MLP if hasattr(last, name)), None)
    for ours, source in zip((mlp.gate_proj, mlp.up_proj), _gate_and_up(last), strict=True):
        if their_norm is not None and source is not None and source.shape == ours.weight.shape:
            ours.weight.copy_(source)
            norm.weight.copy_(norm_weight(their_norm, ours.in_features))
        else:
            ours.weight.normal_(std=ours.in_features**-0.5, generator=generator)
    mlp.down_proj.weight.normal_(std=SILENT, generator=generator)


def _gate_and_up(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The two matrices that an MLP's input meets first, where it is one MLP and not a choice of experts."""
    mlp = getattr(layer, "mlp", None)
    fused = getattr(mlp, "gate_up_proj", None)  # Phi-3
    if isinstance(fused, nn.Linear):
        gate, up = fused.weight.chunk(2)
        return gate, up
    both = (getattr(mlp, name, None) for name in ("gate_proj", "up_proj"))
    return tuple(each.weight if isinstance(each, nn.Linear) else None for each in both)  # type: ignore[return-value]
