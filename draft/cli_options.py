"""Options that several commands of draft-train have."""

from __future__ import annotations

from typing import Annotated

import typer


def examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"`{line}`" for line in lines)


Target = Annotated[str, typer.Option(help="Target: hub id, folder, .gguf file, or smollm2 (bundled).")]
TargetAdapter = Annotated[
    str | None, typer.Option(help="PEFT LoRA adapter of the target, merged in memory: a folder.", show_default=False)
]
Dtype = Annotated[str, typer.Option(help="Compute dtype: auto, bfloat16, float16, float32 or float64.")]
