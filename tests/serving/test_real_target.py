"""The bundled target and head in bfloat16, where the width of a pass could decide how a sum is rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import byte_tokenizer
from families import model_of
from torch import Tensor

from draft.heads.checkpoint import load_head
from draft.target import Target, load_target
from serving.engine import Engine, SamplingParams
from serving.engine.kv_cache import RaggedBatch, Segment

PROMPTS = ("Tell me a joke.", "Name three rivers in Europe.", "Write a short poem about rain.")
ROUNDINGS = 8  # of the largest logit: every layer adds some


def bundled() -> Target:
    return load_target("smollm2", torch.bfloat16)


def first_difference(one: list[int], other: list[int]) -> int | None:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def near_tie(target: Target, ids: list[int], one: int, other: int) -> bool:
    """Test that rounding may decide between two next tokens, both of them among the first."""
    logits = target.logits(target.forward(torch.tensor([ids])).last_hidden[0, -1:]).float()[0]
    rounding = ROUNDINGS * torch.finfo(torch.bfloat16).eps * float(logits.abs().max())
    return float(logits.max() - min(logits[one], logits[other])) <= rounding


@torch.inference_mode()
def test_greedy_text_with_drafts_differs_at_near_ties_only() -> None:
    target = bundled()
    head = load_head("smollm2-eagle3", dtype=torch.bfloat16)[0]
    prompts = [target.encode_chat([{"role": "user", "content": text}], add_generation_prompt=True) for text in PROMPTS]
    same = {}
    for mode in ("eager", "compiled"):  # compiled last: it packs the target's weights
        texts = []
        for speculation in ("off", "tree"):
            engine = Engine(target, head, mode=mode, speculation=speculation, tree_size=6, speculation_length=4)
            answers = engine.generate(prompts, SamplingParams(max_new_tokens=24, ignore_eos=True))
            texts.append([answer.token_ids for answer in answers])
        assert sum(answer.stats.accepted for answer in answers) > 0
        places = [first_difference(*pair) for pair in zip(*texts, strict=True)]
        for prompt, plain, drafted, place in zip(prompts, *texts, places, strict=True):
            if place is not None:
                assert near_tie(target, prompt + plain[:place], plain[place], drafted[place]), (mode, place)
        same[mode] = places.count(None)
    assert same["compiled"] == len(PROMPTS)  # its kernels do not depend on a pass's width


def qwen3() -> Target:
    """A tiny one, whose queries and keys have norms."""
    widths = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 700}
    return Target("qwen3", model_of("qwen3", **widths).to(torch.bfloat16), byte_tokenizer())


@pytest.mark.parametrize("make", [bundled, qwen3])
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_passes_of_any_width(make: Callable[[], Target]) -> None:
    """Passes of 1 to 600 tokens of several requests: prompts read at once and in pieces, beside others that decode."""
    target = make()
    runner = Engine(target, None, mode="compiled", max_batch=8, max_length=700).models.runner
    assert runner.fused is not None
    texts = torch.randint(3, target.vocab_size, (4, 600), generator=torch.Generator().manual_seed(5)).tolist()

    def states(pieces: list[list[tuple[int, int]]]) -> list[Tensor]:
        """Read `texts` in passes, each of (text, tokens) pieces -> the states of each text [tokens, hidden]."""
        slots = [runner.cache.acquire() for _ in texts]
        read: list[list[Tensor]] = [[] for _ in texts]
        for piece in pieces:
            segments = []
            for text, tokens in piece:
                past = sum(map(len, read[text]))
                segments.append(Segment(slots[text], past, past, texts[text][past : past + tokens]))
            hidden = runner.forward(RaggedBatch.of(segments, target.device))[0]
            for (text, _), part in zip(piece, hidden.split([tokens for _, tokens in piece]), strict=True):
                read[text].append(part)
        for slot in slots:
            runner.cache.release(slot)
        return [torch.cat(parts) for parts in read]

    alone = states([[(0, 64)], *[[(0, 1)]] * 6, [(1, 30)], [(2, 190)], [(3, 310)]])
    together = states([[(1, 30), (2, 190), (3, 310), (0, 70)]])
    mixed = states([[(3, 64), (0, 1)], [(0, 63), (1, 2), (2, 65)], [(0, 6), (3, 246), (2, 125)], [(1, 28)]])
    for text, expected in enumerate(alone):
        assert torch.equal(expected, together[text]) and torch.equal(expected, mixed[text]), text
