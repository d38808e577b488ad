"""The Medusa draft head (arXiv 2401.10774), with the tensor names that vLLM loads.

For position k of the draft, with h the target's last hidden state of token t, after its final norm:

    x_k      = h;  x_k = x_k + silu(linear(x_k))     once for each layer of block k
    logits_k = lm_heads[k](x_k)                      predicting token t+2+k

No position sees what was drafted at another one, so that all of them are known at once, and there is no attention.
(FasterDecoding's `medusa/model/medusa_model.py`, vLLM's `medusa.py`.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from draft.heads.base import DraftHead, Features
from draft.heads.config import STRICT, HeadConfig, check_unknown, read_flag
from draft.heads.initial import Ridge
from draft.heads.unroll import take
from draft.target import Target


@dataclass(kw_only=True, config=STRICT)
class MedusaConfig(HeadConfig):
    """Shapes and options; config.json has them under vLLM's keys."""

    hidden_size: PositiveInt
    vocab_size: PositiveInt  # the target's
    draft_vocab_size: PositiveInt
    num_heads: PositiveInt = 5  # positions that are drafted
    num_layers: PositiveInt = 1  # of each block
    shared_lm_head: bool = False  # the target's, for all positions

    @classmethod
    def for_target(cls, target: Target, draft_vocab_size: int, **options: Any) -> MedusaConfig:
        """A head of the target's own width; options: fields of this class."""
        sizes = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
        return cls.checked(**sizes, draft_vocab_size=draft_vocab_size, **options)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MedusaConfig:
        """Read a config.json with vLLM's keys."""
        check_unknown(values)
        values = dict(values)
        values["num_layers"] = values.get("num_hidden_layers", 1)
        values["draft_vocab_size"] = values.get("truncated_vocab_size") or values.get("vocab_size")
        values["shared_lm_head"] = read_flag(values, "original_lm_head")
        return cls.of_known(values)

    def as_json(self, dtype: torch.dtype) -> dict[str, Any]:
        values = asdict(self)
        layers, vocabulary, shared = (values.pop(key) for key in ("num_layers", "draft_vocab_size", "shared_lm_head"))
        return {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            **values,
            "num_hidden_layers": layers,
            "truncated_vocab_size": vocabulary,
            "original_lm_head": shared,
            "medusa_fc_bias": True,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }


class ResidualBlock(nn.Module):
    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, size) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + nn.functional.silu(layer(x))
        return x


class MedusaHead(DraftHead):
    """A Medusa head; its state dict has the names that vLLM loads, and d2t where the vocabulary is reduced."""

    architecture = "medusa"
    stored_as = "MedusaModel"
    config_class = MedusaConfig
    options = ("num_heads", "num_layers", "shared_lm_head")
    reduced_vocabulary = True

    config: MedusaConfig

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__(config)
        size, count = config.hidden_size, config.num_heads
        self.blocks = nn.ModuleList([ResidualBlock(size, config.num_layers) for _ in range(count)])
        own = 0 if config.shared_lm_head else count
        self.lm_heads = nn.ModuleList([nn.Linear(size, config.draft_vocab_size, bias=False) for _ in range(own)])
        self.longest = count
        self.adapter_targets = tuple(
            f"blocks.{block}.layers.{layer}" for block in range(count) for layer in range(config.num_layers)
        )

    @property
    def lm_head_modules(self) -> dict[str, nn.Linear]:
        return {f"lm_heads.{index}": lm_head for index, lm_head in enumerate(self.lm_heads)}  # type: ignore[misc]

    def beyond(self, steps: int) -> list[nn.Module]:
        return [*self.blocks[steps:], *self.lm_heads[steps:]]

    def auxiliary_layers(self, target: Target) -> tuple[int, ...]:
        return (target.output_layer,)

    def combine(self, auxiliary: Tensor) -> Tensor:
        return auxiliary

    def forward(self, hidden: Tensor, step: int) -> Tensor:
        """The target's last hidden states [..., hidden] -> states of draft step `step`, same shape."""
        return self.blocks[step](hidden)

    def logits(self, hidden: Tensor, step: int = 0) -> Tensor:
        if self.lm_heads:
            return self.lm_heads[step](hidden)
        target = self.shared_target
        return target.logits(hidden.to(target.dtype)).to(hidden.dtype)

    def unroll(
        self, embeds: Tensor, auxiliary: Tensor, steps: int, *, places: Tensor | None = None, **_: Any
    ) -> Iterator[Tensor]:
        """Yield the states of as many steps as the head has positions; embeddings and the mask make no difference."""
        hidden = take(self.combine(auxiliary), places)
        for step in range(min(steps, self.config.num_heads)):
            yield self(hidden, step)

    @torch.no_grad()
    def initialise(self, target: Target, batches: Iterable[tuple[Features, Tensor]], seed: int) -> None:
        """Set the weights in place; see `draft.heads.initial`."""
        for parameter in self.blocks.parameters():
            parameter.zero_()
        batches = list(batches)
        if not batches:
            return
        rows = target.lm_head.weight[self.vocabulary.to(target.device)].double()  # [draft_vocab, hidden]
        for step, lm_head in enumerate(self.lm_heads):
            ahead = Ridge()
            for features, mask in batches:
                later = mask[:, 1 + step :]  # token t+1+k exists
                states = features.last_hidden[:, : later.shape[1]][later]
                ahead.add(states.float(), features.last_hidden[:, 1 + step :][later].float())
            lm_head.weight.copy_(rows @ ahead.solve())  # type: ignore[operator]
