"""Models of the engine's tests: a tiny target, its head, options and parameters."""

from __future__ import annotations

from typing import Any

from conftest import make_tiny_head
from tiny_targets import tiny

from serving.engine import Engine, SamplingParams

TARGET = tiny("llama")
HEAD = make_tiny_head(TARGET)
CHAIN: dict[str, Any] = {"speculation": "chain", "speculation_length": 4}


def params(count: int = 8, **fields: Any) -> SamplingParams:
    return SamplingParams(count, **{"ignore_eos": True, **fields})


def finish(engine: Engine) -> None:
    while engine.step():
        pass
