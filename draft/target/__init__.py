"""The target: the model whose output is reproduced."""

from draft.target.target import (
    DTYPES,
    Target,
    TargetOutput,
    fastest_cpu_dtype,
    load_target,
    load_text_target,
    load_tokenizer,
    render_chat,
    wait_for,
)
from draft.target.template import TemplateRefusal, read_chat_template, template_faults
from draft.target.text import TextTarget

__all__ = [
    "DTYPES",
    "Target",
    "TargetOutput",
    "TemplateRefusal",
    "TextTarget",
    "fastest_cpu_dtype",
    "load_target",
    "load_text_target",
    "load_tokenizer",
    "read_chat_template",
    "render_chat",
    "template_faults",
    "wait_for",
]
