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
from draft.target.template import read_chat_template

__all__ = [
    "DTYPES",
    "Target",
    "TargetOutput",
    "fastest_cpu_dtype",
    "load_target",
    "load_tokenizer",
    "read_chat_template",
    "render_chat",
    "wait_for",
]
