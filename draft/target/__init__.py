"""The target: the model whose output is reproduced."""

from draft.devices import DTYPES, fastest_cpu_dtype
from draft.target.target import (
    Target,
    TargetOutput,
    capture_hidden_states,
    load_target,
    load_tokenizer,
    render_chat,
)

__all__ = [
    "DTYPES",
    "Target",
    "TargetOutput",
    "capture_hidden_states",
    "fastest_cpu_dtype",
    "load_target",
    "load_tokenizer",
    "render_chat",
]
