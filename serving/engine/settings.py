"""What an engine can be told, and what makes no sense."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from draft.errors import UserError
from draft.target import Target
from serving.engine.acceptance import OFF, Plan
from serving.engine.controller import Controller, Fixed

SPECULATIONS = ("auto", "chain", "tree", "off")


def make_controller(speculation: str, length: int, tree_size: int) -> Controller:
    sizes = [size for size in sorted({8, 16, 32, tree_size}) if 0 < length < size <= tree_size]
    trees = list(dict.fromkeys(Plan.tree(length, size) for size in sizes))
    if speculation == "auto":
        return Controller([*(Plan.chain(k) for k in range(1, length + 1)), *trees])
    if speculation == "tree" and length and not trees:
        raise UserError(
            f"tree_size = {tree_size}: a tree has more nodes than its depth, {length}; choose a larger one."
        )
    return Fixed({"off": OFF, "chain": Plan.chain(length), "tree": trees[-1] if trees else OFF}[speculation])


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UserError(f"{name} = {value!r}: it must be one of {', '.join(choices)}.")
    return value


def check_whole(name: str, value: int, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} = {value!r}: it must be a whole number of at least {least}.")
    return value


def check_max_length(length: int | None, target: Target) -> int:
    if length is None:
        return target.max_length
    if not isinstance(length, int) or not 2 <= length <= target.max_length:
        raise UserError(f"max_length = {length}: it must be from 2 to {target.max_length}; {target.limit_reason}.")
    return length


def check_prompt(prompt_ids: Sequence[int], vocab_size: int, max_length: int, max_new_tokens: int) -> None:
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
            f"context of {max_length}; shorten the prompt or ask for at most {max(0, max_length - len(prompt_ids))} "
            "tokens."
        )
