"""Requests whose answers are known, and engines beside oracles, heads and changing plans, to decode them with."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from conftest import make_tiny_head
from oracle import PLANS, Case, Fickle, Oracle, engine_of
from tiny_targets import tiny

from draft.heads.registry import ARCHITECTURES
from serving.engine import Completion, Engine, SamplingParams

ALL = ["llama", "qwen3", "mistral, windows", "gemma2, windows, bounded scores", "gemma3, windows, two ropes"]

# name -> what is drafted: the engine's options, and for automatic mode a controller that changes its mind at every step
MODES: dict[str, dict[str, Any]] = {
    "off": {"speculation": "off"},
    "chain": {"speculation": "chain"},
    "tree of 4": {"speculation": "tree", "tree_size": 4, "speculation_length": 3},
    "tree of 16": {"speculation": "tree", "tree_size": 16, "speculation_length": 5},
    "tree of 32": {"speculation": "tree", "tree_size": 32},
    "auto": {"speculation": "auto"},
}
PROMPTS = [[7], list(range(90, 107)), list(range(3, 40))]
GREEDY, PENALTIES = {"temperature": 0.0}, {"presence_penalty": 0.4, "frequency_penalty": -0.3}
PROCESSING: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "hot, top-k, penalties": {"temperature": 1.7, "top_k": 20, "repetition_penalty": 1.3, **PENALTIES},
    "top-p, min-p, bias": {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02, "logit_bias": {5: 4.0, 70: -3.0, 200: 2.5}},
    "min tokens": {"temperature": 1.0, "min_new_tokens": 6, "ignore_eos": False, "stop_ids": (9, 33, 80)},
    "greedy with penalties": {**GREEDY, "repetition_penalty": 1.5, "frequency_penalty": 0.8, "logit_bias": {9: 1.0}},
    "greedy with min tokens": {**GREEDY, "min_new_tokens": 5, "ignore_eos": False},
}


def build(family: str, mode: str, *, errors: float = 0.3, seed: int = 0, **options: Any) -> Engine:
    """An engine beside an oracle, which `off` leaves out."""
    if mode == "off":
        return Engine(tiny(family), **MODES[mode], **options)
    fickle = Fickle(PLANS, seed) if mode == "auto" else None
    return engine_of(tiny(family), Oracle(tiny(family), errors, seed), fickle, **MODES[mode], **options)


def engines(family: str, mode: str, *, errors: float = 0.3, max_batch: int, **options: Any) -> list[Engine]:
    """Build an engine beside an oracle, and one with a head: of each architecture for one family, of one for others."""
    target = tiny(family)
    names = [] if mode == "off" else ARCHITECTURES if family == ALL[0] else ["eagle3"]
    heads = [make_tiny_head(target, architecture=name) for name in names]
    drafting = {"speculation_length": 8, "max_batch": max_batch, **MODES[mode]}
    beside_oracle = build(family, mode, errors=errors, max_batch=max_batch, **options)
    return [beside_oracle, *(Engine(target, head, **drafting) for head in heads)]


def params(count: int, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": count, "ignore_eos": True, "logprobs": 2, **fields})


def margins(ours: Sequence[Completion], theirs: Sequence[Completion]) -> list[float]:
    """Differences of the two best logprobs where the tokens of answers begin to differ."""
    found = []
    for one, other in zip(ours, theirs, strict=True):
        pairs = zip(one.token_ids, other.tokens, strict=True)
        tops = [token.top or [] for token_id, token in pairs if token_id != token.id][:1]
        found += [top[0][1] - top[1][1] for top in tops]
    return found


@cache
def plainly(family: str, processing: str, prompt: int) -> Completion:
    """Alone, without speculation, the prompt in one piece."""
    engine = Engine(tiny(family), speculation="off", max_batch=1)
    options = params(14, seed=prompt + 2**40, **PROCESSING[processing])
    return engine.generate([PROMPTS[prompt]], options)[0]


def sampled_case(family: str, processing: str, prompt: int, **rest: Any) -> Case:
    plain = plainly(family, processing, prompt)
    options = params(14, seed=plain.seed or 2**40, **PROCESSING[processing])
    return Case(PROMPTS[prompt], options, plain.token_ids, **rest)
