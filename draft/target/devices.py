"""The device that a model is computed on, and the dtype."""

from __future__ import annotations

import os
import time
from functools import lru_cache

import torch

from draft.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} is not there on this machine; use auto, cpu or cuda.") from error
    return place


def wait_for(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_of_process(device: str) -> str:
    """`auto` under a launcher of several processes: each its own GPU, where there are as many."""
    rank = os.environ.get("LOCAL_RANK", "")
    if device == "auto" and rank.isdecimal() and int(rank) < torch.cuda.device_count():
        return f"cuda:{rank}"
    return device


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return fastest_cpu_dtype() if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


@lru_cache
def fastest_cpu_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, else float32: without AVX-512 or AMX it is ten times slower."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        timings = []
        for _ in range(4):
            start = time.perf_counter()
            a @ b
            timings.append(time.perf_counter() - start)
        return min(timings)

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32
