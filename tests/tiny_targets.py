"""Tiny targets of several families, and texts that transformers wrote with them."""

from dataclasses import dataclass, field
from functools import cache

import torch
from conftest import make_tiny_target
from families import FAMILIES, target_of
from torch import Tensor

from draft.target import Target

CONTEXT = 72


@dataclass(frozen=True)
class Text:
    """A prompt with its greedy continuation, and what the target thinks at each token."""

    tokens: list[int]
    written: int  # where the continuation begins
    auxiliary: Tensor = field(repr=False)  # [tokens, 3 * hidden], the true states
    log_p: Tensor = field(repr=False)  # [tokens, vocab], of the token after each


@cache
def tiny(family: str) -> Target:
    """The target of a family; its EOS is a token that its greedy texts contain now and then."""
    if family == "llama":
        target = make_tiny_target(max_length=CONTEXT)
    else:
        kind, own = FAMILIES[family]
        target = target_of(kind, **own, max_position_embeddings=CONTEXT)
    written = [token for text in texts_of(target) for token in text.tokens[text.written :]]
    rare = sorted((written.count(token), token) for token in set(written))
    target.__dict__["eos_token_ids"] = frozenset(token for _, token in rare[:: max(1, len(rare) // 3)])
    return target


@cache
@torch.inference_mode()
def texts_of(target: Target) -> list[Text]:
    """Ten texts as long as the context, by transformers' own greedy decoding from short and long prompts."""
    generator = torch.Generator().manual_seed(5)
    return [text for length in (1, 30) for text in texts_from(target, 5, length, CONTEXT - length, generator)]


def texts_from(target: Target, rows: int, length: int, count: int, generator: torch.Generator) -> list[Text]:
    """Texts of `count` tokens after random prompts of this length."""
    prompts = torch.randint(3, 259, (rows, length), generator=generator)
    ids = greedy_by_transformers(target, prompts, count)
    output = target.forward(ids, layers=target.default_auxiliary_layers)
    assert output.auxiliary is not None
    log_p = target.logits(output.last_hidden).log_softmax(dim=-1)
    return [Text(ids[row].tolist(), length, output.auxiliary[row], log_p[row]) for row in range(rows)]


def greedy_by_transformers(target: Target, prompts: Tensor, count: int) -> Tensor:
    """[rows, tokens] -> [rows, tokens + count], EOS ignored."""
    return target.model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=2,
    )
