"""The alternatives of a user: transformers' generate, and another server with OpenAI's API."""

from __future__ import annotations

import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch
from torch import Tensor

from benchmarks.timing import Key, Timing, Variant
from draft.target import Target, load_target, wait_for

# of transformers' generate; prompt lookup takes one prompt at a time only
BASELINES: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
}


def baselines(arguments: Namespace, dtype: torch.dtype, threads: int) -> list[Variant]:
    """Return transformers in the engine's dtype, and on a CPU in float32 too: some have nothing faster."""
    chosen = [name for name in arguments.baseline if name != "none"]
    kinds = [dtype] if torch.cuda.is_available() else [dtype, torch.float32]
    found = []
    for kind in dict.fromkeys(kinds) if chosen else []:
        target = load_target(arguments.target, kind, adapter=arguments.target_adapter)
        for batch in arguments.batch:
            for name in chosen:
                if batch > 1 and name == "prompt lookup":
                    continue

                def run(
                    prompts: list[list[int]], target: Target = target, options: dict[str, Any] = BASELINES[name]
                ) -> Timing:
                    return generate(target, prompts, arguments.baseline_tokens, options, threads)

                label = f"transformers {str(kind).removeprefix('torch.')}, {name}"
                found.append(Variant(Key(batch, 0.0, None, label), run))
    return found


@torch.inference_mode()
def generate(
    target: Target, prompts: list[list[int]], new_tokens: int, options: dict[str, Any], threads: int
) -> Timing:
    """Run transformers' greedy generate over left-padded prompts, EOS ignored; timed from when the prompts are read."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=target.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=target.device)
    began: list[float] = []

    def clock(input_ids: Tensor, scores: Tensor) -> Tensor:
        """Change nothing: a logits processor is first called when the prompt has been read."""
        if not began:
            wait_for(scores.device)
            began.append(time.perf_counter())
        return scores

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
    seconds = time.perf_counter() - began[0]
    outputs = tuple(tuple(row[width:].tolist()) for row in output)
    return Timing(sum(len(row) - 1 for row in outputs), seconds, outputs)


def external(target: Target, arguments: Namespace) -> list[Variant]:
    """Return the server of --server: the time of first tokens, requested alone, is subtracted."""
    url, new_tokens = arguments.server_url, arguments.max_new_tokens

    def run(prompts: list[list[int]]) -> Timing:
        texts = [target.tokenizer.decode(prompt) for prompt in prompts]

        def timed(count: int) -> tuple[int, float]:
            began = time.perf_counter()
            with ThreadPoolExecutor(len(texts)) as pool:
                tokens = sum(pool.map(lambda text: complete(url, text, count), texts))
            return tokens, time.perf_counter() - began

        first, prefill = timed(1)
        tokens, whole = timed(new_tokens)
        return Timing(tokens - first, max(whole - prefill, 1e-9))

    return [Variant(Key(batch, 0.0, None, "external server"), run) for batch in arguments.batch]


def complete(url: str, text: str, new_tokens: int) -> int:
    """Return the number of tokens of a greedy completion by a server with OpenAI's API."""
    with httpx.Client(base_url=url, timeout=600, trust_env=False) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        body = {"model": model, "prompt": text, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        return int(client.post("/v1/completions", json=body).raise_for_status().json()["usage"]["completion_tokens"])
