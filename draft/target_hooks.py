"""What a pass changes in a target's model while it runs: how it attends, and what is seen of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from draft.target import Target


@contextmanager
def attending_by(target: Target, implementation: str) -> Iterator[None]:
    """Let the decoder attend by a function that is registered with transformers, while the block runs.

    No other pass of the same target begins meanwhile, in whatever thread.
    """
    config = target.decoder.config
    with target.lock:
        before = config._attn_implementation
        config._attn_implementation = implementation
        try:
            yield
        finally:
            config._attn_implementation = before


@contextmanager
def capture_hidden_states(decoder: nn.Module, layers: Sequence[int], into: dict[int, Tensor]) -> Iterator[None]:
    """Store the residual stream entering each of `layers` in `into` while the block runs.

    Index n is taken before the final norm, where vLLM takes it; transformers' own `output_hidden_states` would
    give it normalised. Index n + 1 is after it.
    """

    def store(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            into[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def store_output(layer: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            into[layer] = output

        return hook

    modules = [*decoder.layers, decoder.norm]  # type: ignore[misc]
    handles = [
        decoder.norm.register_forward_hook(store_output(layer))  # type: ignore[union-attr]
        if layer == len(modules)
        else modules[layer].register_forward_pre_hook(store(layer), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
