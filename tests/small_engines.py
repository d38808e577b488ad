"""Models of the engine's tests: a tiny target, its head, options and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from conftest import make_tiny_head
from tiny_targets import tiny

from serving.engine import Engine, Request, SamplingParams
from serving.engine.kv_cache import SlotCache

TARGET = tiny("llama")
HEAD = make_tiny_head(TARGET)
CHAIN: dict[str, Any] = {"speculation": "chain", "speculation_length": 4}


def params(count: int = 8, **fields: Any) -> SamplingParams:
    return SamplingParams(count, **{"ignore_eos": True, **fields})


def all_free(cache: SlotCache) -> bool:
    return cache.free_blocks == cache.blocks and not any(cache.lengths) and bool((cache.table == -1).all())


def finish(engine: Engine) -> None:
    while engine.step():
        pass


def answers(requests: Iterable[Request]) -> list[list[int]]:
    return [request.result(timeout=120).token_ids for request in requests]


def alone(prompts: Sequence[list[int]], each: Any) -> list[list[int]]:
    """The answers of an engine without speculation, one prompt after the other."""
    return [answer.token_ids for answer in Engine(TARGET, max_batch=1).generate(prompts, each)]
