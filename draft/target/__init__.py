"""The target: the model whose output is reproduced."""

from draft.target.target import (
    DTYPES,
    Target,
    TargetOutput,
    fastest_cpu_dtype,
    load_target,
    load_tokenizer,
    render_chat,
    wait_for,
)

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
