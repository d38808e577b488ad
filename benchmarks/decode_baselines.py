"""What users would run instead: transformers' generate, and any server that speaks OpenAI's completions."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draft.errors import UserError
from draft.target import Target, wait_for


@dataclass(frozen=True)
class Timing:
    """One timed pass over some prompts at once."""

    tokens: int  # after each prompt's first one
    seconds: float
    outputs: tuple[tuple[int, ...], ...] = ()
    verifications: int = 0  # 0: not known
    emitted: int = 0  # by these verifications
    parts: tuple[tuple[str, float], ...] = ()  # where the seconds went

    @property
    def rate(self) -> float:
        """Tokens per second, of all prompts together."""
        return self.tokens / self.seconds


class _Clock:
    """A logits processor that changes nothing: its first call tells when the prompt has been read."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.first:
            wait_for(scores.device)
            self.first = time.perf_counter()
        return scores


# name -> what generate is told
GENERATE: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},  # one prompt at a time only
}


@torch.inference_mode()
def generate(
    target: Target, prompts: list[list[int]], new_tokens: int, options: dict[str, Any], threads: int
) -> Timing:
    """transformers' greedy generate over left-padded prompts, EOS ignored; timed from when the prompts are read."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=target.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=target.device)
    clock = _Clock()
    try:
        output = target.model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            logits_processor=[clock],
            **options,
        )
    finally:
        torch.set_num_threads(before)
    seconds = time.perf_counter() - clock.first
    outputs = tuple(tuple(row[width:].tolist()) for row in output)
    return Timing(sum(len(row) - 1 for row in outputs), seconds, outputs)


@contextmanager
def served(command: str, url: str, patience: float = 600.0) -> Iterator[None]:
    """Start a server, wait until it lists its models, and end it, with all that it started, afterwards."""
    process = subprocess.Popen(
        shlex.split(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + patience
        while not _answers(url):
            if process.poll() is not None:
                raise UserError(f"--vs: {command!r} ended with status {process.returncode} before it served {url}.")
            if time.monotonic() > deadline:
                raise UserError(f"--vs: {command!r} did not serve {url} within {patience:.0f} s.")
            time.sleep(0.5)
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def complete(url: str, texts: list[str], new_tokens: int) -> Timing:
    """Greedy completions of the texts, at once; the time of their first tokens, asked for alone, is taken off."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
        model = json.load(response)["data"][0]["id"]

    def ask(text: str, count: int) -> int:
        body = {"model": model, "prompt": text, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return int(json.load(response)["usage"]["completion_tokens"])

    def timed(count: int) -> tuple[int, float]:
        began = time.perf_counter()
        with ThreadPoolExecutor(len(texts)) as pool:
            tokens = sum(pool.map(lambda text: ask(text, count), texts))
        return tokens, time.perf_counter() - began

    first, prefill = timed(1)
    tokens, whole = timed(new_tokens)
    return Timing(tokens - first, max(whole - prefill, 1e-9))
