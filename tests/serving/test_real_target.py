"""The bundled target and head in bfloat16: passes of other widths round otherwise, and nothing else may differ."""

from __future__ import annotations

import torch

from draft.heads.checkpoint import load_head
from draft.target import Target, load_target
from serving.engine import Engine, SamplingParams

PROMPTS = ("Tell me a joke.", "Name three rivers in Europe.", "Write a short poem about rain.")
ROUNDINGS = 8  # of the largest logit: every layer adds some


def first_difference(one: list[int], other: list[int]) -> int | None:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def near_tie(target: Target, ids: list[int], one: int, other: int) -> bool:
    """Test that rounding may decide between two next tokens, both of them among the first."""
    logits = target.logits(target.forward(torch.tensor([ids])).last_hidden[0, -1:]).float()[0]
    rounding = ROUNDINGS * torch.finfo(torch.bfloat16).eps * float(logits.abs().max())
    return float(logits.max() - min(logits[one], logits[other])) <= rounding


@torch.inference_mode()
def test_greedy_text_with_drafts_differs_at_near_ties_only() -> None:
    target = load_target("smollm2", torch.bfloat16)
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
    print(f"identical texts: {same} of {len(PROMPTS)}")
