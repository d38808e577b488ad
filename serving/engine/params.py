"""What a request asks for, and the limits of each field."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from draft.errors import UserError

SEED_LIMIT = 2**63
MAX_LOGPROBS = 20  # alternatives a token


@dataclass(frozen=True)
class SamplingParams:
    """How a request is decoded; sampling.py says in which order the fields act on the logits, sequence.py when it ends.

    Raises:
        UserError: when a value is out of its range, naming the field, the value and the limit.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy, and top_p, top_k, min_p and the seed have no effect
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # relative to the most probable token; 0 is off
    seed: int | None = None  # None: the engine draws one and reports it
    repetition_penalty: float = 1.0  # of tokens in the prompt or the answer
    presence_penalty: float = 0.0  # of tokens in the answer
    frequency_penalty: float = 0.0  # of tokens in the answer, for each time
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()  # token id -> addend; kept as sorted pairs
    min_new_tokens: int = 0  # what would end the answer earlier is banned or, being a stop string, not looked for
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    keep_stop: bool = True  # the stop string or id stays in the answer (TGI) or not (OpenAI)
    ignore_eos: bool = False
    logprobs: int | None = None  # None: not computed; 0: of the tokens themselves; n: and of the n most probable

    def __post_init__(self) -> None:
        for name, (kind, holds, limit) in _LIMITS.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL) and not (_is_number(value, kind) and holds(value)):
                raise _refusal(name, value, limit)
        for name in ("keep_stop", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, getattr(self, name), "true or false")
        if self.min_new_tokens > self.max_new_tokens:
            limit = f"at most max_new_tokens, which is {self.max_new_tokens}"
            raise _refusal("min_new_tokens", self.min_new_tokens, limit)
        object.__setattr__(self, "stop", _each("stop", self.stop, _is_text, "a list of non-empty strings"))
        object.__setattr__(self, "stop_ids", _each("stop_ids", self.stop_ids, _is_id, "a list of token ids"))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises UserError when stop_ids or logit_bias name a token that the target does not have."""
        for name, ids in (("stop_ids", self.stop_ids), ("logit_bias", dict(self.logit_bias))):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise UserError(f"{name} has token id {token_id}: the target's go from 0 to {vocab_size - 1}.")


# field -> (type, test, the limit in words)
_LIMITS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "max_new_tokens": (int, lambda v: v >= 1, "a whole number of at least 1"),
    "min_new_tokens": (int, lambda v: v >= 0, "a whole number of at least 0"),
    "temperature": (float, lambda v: v >= 0, "a finite number of at least 0"),
    "top_p": (float, lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    "top_k": (int, lambda v: v >= 0, "a whole number of at least 0 (0 is off)"),
    "min_p": (float, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": (float, lambda v: v > 0, "a finite number above 0"),
    "presence_penalty": (float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "frequency_penalty": (float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "seed": (int, lambda v: 0 <= v < SEED_LIMIT, "a whole number from 0 to 2**63 - 1"),
    "logprobs": (int, lambda v: 0 <= v <= MAX_LOGPROBS, f"a whole number from 0 to {MAX_LOGPROBS}"),
}
_OPTIONAL = ("seed", "logprobs")


def _refusal(name: str, value: Any, limit: str) -> UserError:
    return UserError(f"{name} = {value!r}: it must be {limit}.")


def _is_number(value: Any, kind: type) -> bool:
    """A finite number that is no bool; whole numbers are floats, too."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return False
    return kind is int or abs(value) <= sys.float_info.max  # of NaN, infinity and 10**400 none is


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_id(value: Any) -> bool:
    return _is_number(value, int) and value >= 0


def _each(name: str, values: Any, holds: Callable[[Any], bool], limit: str) -> tuple[Any, ...]:
    try:
        found = None if isinstance(values, str) else tuple(values)
    except TypeError:
        found = None
    if found is None or not all(map(holds, found)):
        raise _refusal(name, values, limit)
    return found


def _bias(bias: Any) -> tuple[tuple[int, float], ...]:
    limit = "a mapping of token ids to numbers from -100 to 100"
    try:
        pairs = dict(bias)
    except (TypeError, ValueError):
        raise _refusal("logit_bias", bias, limit) from None
    for token_id, value in pairs.items():
        if not _is_id(token_id) or not _is_number(value, float) or not -100 <= value <= 100:
            raise _refusal("logit_bias", {token_id: value}, limit)
    return tuple(sorted(pairs.items()))
