"""The generator against transformers' own, one prompt at a time."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import byte_tokenizer, make_tiny_target
from transformers import MistralConfig, MistralForCausalLM

from draft.data.responses import draw, generate_responses, row_noise
from draft.errors import UserError
from draft.target import Target


def some_prompts(count: int, longest: int = 40) -> list[list[int]]:
    pick = random.Random(0)
    return [[1] + [pick.randrange(3, 259) for _ in range(pick.randrange(1, longest))] for _ in range(count)]


@pytest.fixture(scope="module")
def ending_target() -> Target:
    """A target with many ends of turn, so that responses differ in length."""
    target = make_tiny_target(seed=1)
    target.eos_token_ids = frozenset(range(2, 12))  # type: ignore[misc]
    return target


def reference(target: Target, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    ends = sorted(target.eos_token_ids)
    output = target.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=ends
    )
    return output[0, len(prompt) :].tolist()


def test_greedy_rows_equal_those_of_generate(ending_target: Target) -> None:
    prompts = some_prompts(14)
    written = dict(generate_responses(ending_target, prompts, max_new_tokens=24, batch_size=4))
    expected = [reference(ending_target, prompt, 24) for prompt in prompts]
    assert [written[index] for index in range(len(prompts))] == expected
    assert len({len(ids) for ids in expected}) > 3  # rows did end at different times
    assert ending_target.model.config._attn_implementation == "sdpa"  # put back


def test_sliding_windows() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, sliding_window=6, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    target = Target("windows", MistralForCausalLM(config).double(), byte_tokenizer())
    prompts = some_prompts(5, longest=20)
    written = dict(generate_responses(target, prompts, max_new_tokens=12, batch_size=3))
    assert [written[index] for index in range(5)] == [reference(target, prompt, 12) for prompt in prompts]


def test_sampled_text_depends_on_seed_and_key_only(ending_target: Target) -> None:
    prompts = some_prompts(8)

    def write(order: list[int], batch_size: int, seed: int) -> list[list[int]]:
        written = dict(
            generate_responses(
                ending_target,
                [prompts[index] for index in order],
                max_new_tokens=16,
                temperature=1.0,
                batch_size=batch_size,
                seed=seed,
                keys=[f"row {index}" for index in order],
            )  # fmt: skip
        )
        return [written[order.index(index)] for index in range(len(order))]

    first = write(list(range(8)), 3, seed=5)
    assert write([3, 1, 7, 0, 2, 6, 5, 4], 8, seed=5) == first
    assert write(list(range(8)), 3, seed=6) != first


def test_greedy_and_sampled_rows_share_a_batch(ending_target: Target) -> None:
    prompts = some_prompts(6)
    heats = [0.0, 1.0] * 3
    mixed = dict(generate_responses(ending_target, prompts, max_new_tokens=12, temperature=heats, batch_size=6))
    greedy = dict(generate_responses(ending_target, prompts, max_new_tokens=12))
    sampled = dict(generate_responses(ending_target, prompts, max_new_tokens=12, temperature=1.0))
    assert mixed == {index: (sampled if heats[index] else greedy)[index] for index in range(6)}
    assert greedy != sampled


def test_drawn_tokens_follow_the_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, dtype=torch.float64)
    count = 20_000
    noise = row_noise(0, "draws", count)
    many, heats = logits.expand(count, -1), torch.full((count,), 0.7, dtype=torch.float64)
    p = (logits / 0.7).softmax(-1)
    observed = torch.bincount(draw(many, heats, 1.0, noise), minlength=12)
    statistic = ((observed - count * p) ** 2 / (count * p)).sum()
    assert statistic < 31.3  # chi-square, 11 degrees of freedom, p = 0.001
    wrong = torch.bincount(draw(many, heats * 1.3, 1.0, noise), minlength=12)
    assert ((wrong - count * p) ** 2 / (count * p)).sum() > 100  # the test can fail

    order = p.argsort(descending=True)
    nucleus = order[: int((p[order].cumsum(0) < 0.6).sum()) + 1]
    kept = torch.bincount(draw(many, heats, 0.6, noise), minlength=12)
    assert set(kept.nonzero()[:, 0].tolist()) == set(nucleus.tolist())
    expected = count * p[nucleus] / p[nucleus].sum()
    assert ((kept[nucleus] - expected) ** 2 / expected).sum() < 31.3


def test_a_row_stops_at_the_maximal_length_and_progress_counts_tokens(tiny_target: Target) -> None:
    prompts = [[1, 5, 6], [1] * 10]
    steps: list[int] = []
    written = dict(generate_responses(tiny_target, prompts, max_new_tokens=9, max_length=12, progress=steps.append))
    assert [len(written[0]), len(written[1])] == [9, 2]
    assert sum(steps) == 11


def test_a_prompt_without_room_is_refused(tiny_target: Target) -> None:
    with pytest.raises(UserError, match="prompt 1 has 12 tokens.*within 12"):
        list(generate_responses(tiny_target, [[1], [1] * 12], max_new_tokens=4, max_length=12))
    assert list(generate_responses(tiny_target, [], max_new_tokens=4)) == []
