"""Refusal of options and prompts that make no sense."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from draft.errors import UserError
from draft.target import Target


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} = {value!r}: it must be one of {', '.join(choices)}.")


def check_sizes(**sizes: int | None) -> None:
    """Refuse, by its name, what is no whole number of at least 1; `max_waiting` may be 0, and others None."""
    for name, value in sizes.items():
        least = 0 if name == "max_waiting" else 1
        if value is None and name in ("max_waiting_tokens", "kv_cache_memory", "threads"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{name} = {value!r}: it must be a whole number of at least {least}.")


def check_max_length(length: int | None, target: Target) -> int:
    if length is None:
        return target.max_length
    if not isinstance(length, int) or not 2 <= length <= target.max_length:
        raise UserError(f"max_length = {length}: it must be from 2 to {target.max_length}; {target.limit_reason}.")
    return length


def check_prompt(
    prompt_ids: Sequence[int], vocab_size: int, max_length: int, max_new_tokens: int, limit_note: str = ""
) -> None:
    if not len(prompt_ids):
        raise UserError("the prompt is empty; give at least one token.")
    if not all(isinstance(token, Integral) for token in prompt_ids):
        raise UserError(
            f"the prompt is {prompt_ids!r:.80}, not a list of token ids; encode it with target.encode_chat."
        )
    wrong = [token for token in prompt_ids if not 0 <= token < vocab_size]
    if wrong:
        raise UserError(f"the prompt has token id {wrong[0]}; the target's go from 0 to {vocab_size - 1}.")
    if len(prompt_ids) + max_new_tokens > max_length:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens and max_new_tokens is {max_new_tokens}: together they exceed the "
            f"context of {max_length}{limit_note}; shorten the prompt or ask for at most "
            f"{max(0, max_length - len(prompt_ids))} tokens."
        )
