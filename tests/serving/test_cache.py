"""Slots against forward passes from scratch, in float64, through several families of decoders."""

import random

import pytest
import torch
from conftest import byte_tokenizer, make_tiny_head, make_tiny_target
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig, PretrainedConfig, Qwen3Config

from draft.target import Target
from serving.engine.cache import SlotCache, SlotLayer, causal_mask

SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SMALL),
    "mistral with a window of 5": MistralConfig(**SMALL, sliding_window=5),
    "gemma3, windows of 5 and full layers": Gemma3TextConfig(**SMALL, sliding_window=5, query_pre_attn_scalar=8),
}


@pytest.fixture(scope="module", params=["llama", *FAMILIES])
def target(request: pytest.FixtureRequest) -> Target:
    if request.param == "llama":
        return make_tiny_target(max_length=128)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param]).to(torch.float64)
    return Target(request.param, model, byte_tokenizer())


def read(target: Target, cache: SlotCache, ids: Tensor) -> Tensor:
    """The target over [1, n] tokens after the cached ones -> last hidden [1, n, hidden]."""
    positions = torch.arange(cache.length, cache.length + ids.shape[1])[None]
    return target.forward(ids, position_ids=positions, past_key_values=cache).last_hidden


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(4))
def test_blocks_and_rollbacks_equal_a_forward_from_scratch(target: Target, seed: int) -> None:
    rng = random.Random(seed)
    ids = torch.tensor([[rng.randrange(3, 259) for _ in range(30)]])
    expected = target.forward(ids).last_hidden
    cache = SlotCache(target.num_layers)
    cache.clear(48)
    while cache.length < 30:
        start = cache.length
        size = min(rng.choice([1, 2, 3, 6, 12]), 30 - start)
        # a block whose tail is wrong, as drafted tokens are: only its head is kept
        kept = rng.randrange(1, size + 1)
        block = ids[:, start : start + size].clone()
        block[:, kept:] = 3 + (block[:, kept:] + 7) % 256
        hidden = read(target, cache, block)
        assert cache.length == start + size
        torch.testing.assert_close(hidden[:, :kept], expected[:, start : start + kept], rtol=1e-9, atol=1e-9)
        cache.rollback(start + kept)
    whole = SlotCache(target.num_layers)
    whole.clear(48)
    read(target, whole, ids)
    for ours, scratch in zip(cache.slot_layers, whole.slot_layers, strict=True):
        assert ours.keys is not None and scratch.keys is not None
        # the slices were taken before the last rollback
        torch.testing.assert_close(ours.keys[:, :, :30], scratch.keys, rtol=1e-9, atol=1e-9)


@torch.inference_mode()
def test_a_cleared_cache_serves_longer_and_shorter_sequences(target: Target) -> None:
    cache = SlotCache(target.num_layers)
    for length in (5, 20, 8, 100):  # the last one does not fit in what was allocated
        ids = torch.randint(3, 259, (1, length), generator=torch.Generator().manual_seed(length))
        cache.clear(length)
        hidden = read(target, cache, ids)
        torch.testing.assert_close(hidden, target.forward(ids).last_hidden, rtol=1e-9, atol=1e-9)


@torch.inference_mode()
def test_a_heads_cache_equals_its_full_pass() -> None:
    head = make_tiny_head(make_tiny_target())
    torch.manual_seed(0)
    embeds, hidden = torch.randn(2, 1, 20, 32, dtype=torch.float64)
    positions = torch.arange(20)[None]
    expected = head(embeds, hidden, positions)
    cache = SlotLayer()
    cache.clear(20)
    for start, end in ((0, 9), (9, 10), (10, 14), (14, 20)):
        part = slice(start, end)
        mask = causal_mask(start, end - start, embeds.device)
        output = head(embeds[:, part], hidden[:, part], positions[:, part], cache, mask)
        torch.testing.assert_close(output, expected[:, part], rtol=1e-12, atol=1e-12)
        # what was drafted after it leaves no trace
        head(-embeds[:, :1], hidden[:, :1], positions[:, :1] + end, cache) if end < 20 else None
        cache.rollback(end)


def test_slots_refuse_what_does_not_fit() -> None:
    layer = SlotLayer(capacity=4)
    keys = torch.zeros(1, 1, 3, 2)
    layer.update(keys, keys)
    with pytest.raises(AssertionError, match="6 tokens do not fit in 4 slots"):
        layer.update(keys, keys)
    with pytest.raises(AssertionError, match="cannot roll back from 3 to 4"):
        layer.rollback(4)


def test_slots_are_allocated_once() -> None:
    layer = SlotLayer(capacity=8)
    first, _ = layer.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    layer.rollback(2)
    second, _ = layer.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    assert first.data_ptr() == second.data_ptr()
    assert second[0, 0, :, 0].tolist() == [1, 1, 0, 0, 0, 0]
    layer.clear(5)
    third, _ = layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    assert third.data_ptr() == first.data_ptr()


def test_the_causal_mask() -> None:
    assert causal_mask(0, 5, torch.device("cpu")) is None and causal_mask(7, 1, torch.device("cpu")) is None
    mask = causal_mask(2, 3, torch.device("cpu"))
    assert mask is not None and mask.shape == (1, 1, 3, 5)
    assert mask[0, 0].long().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
