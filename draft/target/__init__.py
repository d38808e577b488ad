"""The target: the model whose output is reproduced."""

from draft.target.devices import DTYPES, fastest_cpu_dtype, wait_for
from draft.target.target import Target, TargetOutput, load_target, load_tokenizer, render_chat

__all__ = [
    "DTYPES",
    "Target",
    "TargetOutput",
    "fastest_cpu_dtype",
    "load_target",
    "load_tokenizer",
    "render_chat",
    "wait_for",
]
