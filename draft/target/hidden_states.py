"""Check of the captured hidden states: the target's log-probabilities are rebuilt from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from draft.errors import UserError
from draft.target.target import Target

_TEXT = "The lighthouse keeper rowed across the bay before the storm."
_TOKENS = 8


@torch.inference_mode()
def check_hidden_states(target: Target, layers: Sequence[int] | None = None) -> None:
    """Check that the states that `Target.forward` captures at `layers` are all that the layers after them read.

    layers: None for all that heads read by default.

    Each is put in the place of what enters its layer while the target reads other tokens: what comes out must be the
    log-probabilities of the first tokens. The error is the root mean square of the differences over the spread
    (standard deviation) of the log-probabilities: at rounding level when the state is right, and far above it when it
    is that of another layer, was changed after it was captured, or is not all that later layers read.

    Raises:
        UserError: naming the layer, with the error.
    """
    if layers is None:
        layers = [layer for layer in target.default_auxiliary_layers if layer >= 0] + [target.output_layer]
    layers = sorted(set(layers))
    tokens = [each for each in target.tokenizer(_TEXT, add_special_tokens=False).input_ids if each < target.vocab_size]
    tokens = tokens[:_TOKENS]
    if tokens == tokens[::-1]:  # read backwards, it has to be another text
        tokens = list(range(min(_TOKENS, target.vocab_size)))
    ids = torch.tensor([tokens], device=target.device)  # [1, tokens]
    with target.lock:
        own = target.model(input_ids=ids, use_cache=False).logits.double().log_softmax(dim=-1)  # [1, tokens, vocab]
    output = target.forward(ids, layers=layers)
    tolerance = max(4 * torch.finfo(target.dtype).eps, 1e-5)
    for layer in layers:
        states, error = output.states_of([layer]), float("inf")
        if states.shape == (*ids.shape, target.hidden_size):
            last_hidden = states
            if layer != target.output_layer:
                with target.lock, _entering(target.decoder, layer, states):
                    last_hidden = target.forward(ids.flip(1)).last_hidden
            rebuilt = target.logits(last_hidden).double().log_softmax(dim=-1)
            error = float((rebuilt - own).square().mean().sqrt() / own.std())
        if not error <= tolerance:  # NaN, too
            place = "after the final norm" if layer == target.output_layer else f"entering layer {layer}"
            raise UserError(
                f"target {target.title}: its log-probabilities, rebuilt from the hidden states captured {place}, are "
                f"off by {error:.2g} of their spread, and rounding explains {tolerance:.1g}; the states are those of "
                f"another layer or not all that {type(target.model).__name__} passes on, so use another target, or the "
                "version of transformers in constraints.txt."
            )


@contextmanager
def _entering(decoder: Any, layer: int, states: Tensor) -> Iterator[None]:
    """Let `states` [1, tokens, hidden] enter a layer, or after the last one the final norm, while the block runs."""

    def replace(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states}

    module = decoder.layers[layer] if layer < len(decoder.layers) else decoder.norm
    handle = module.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
