"""The target: the model whose output is reproduced."""

from draft.target.devices import DTYPES, device_of_process, fastest_cpu_dtype, wait_for
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
    "device_of_process",
    "fastest_cpu_dtype",
    "load_target",
    "load_tokenizer",
    "render_chat",
    "wait_for",
]
