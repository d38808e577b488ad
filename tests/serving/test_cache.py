"""Slots and their blocks, ragged batches and attention over them: against the definitions, token by token."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import all_free
from torch import Tensor

from serving.engine.kv_cache import LayerShape, RaggedBatch, Segment, SlotCache, SlotLayer, View, torch_attention

CPU = torch.device("cpu")


def shape(heads: int = 2, key_width: int = 4, value_width: int = 3) -> LayerShape:
    return LayerShape(heads, key_width, value_width, torch.float64, CPU)


def entries(cache: SlotCache, slot: int, count: int) -> list[list[float]]:
    """The first feature of a slot's first entries: of each layer's keys and values, in each head."""
    places = cache.places(slot, range(count))
    return [head for layer in cache.layers for store in layer for head in store[:, places, 0].tolist()]


def fill(cache: SlotCache, slot: int, count: int) -> None:
    """Entry i of the slot holds i, in each layer, key and value."""
    for layer in cache.layers:
        for store in layer:
            store[:, cache.places(slot, range(count))] = torch.arange(count, dtype=store.dtype)[:, None]


# slots and blocks


def test_slots_are_handed_out_empty_with_blocks_of_their_own_and_come_back() -> None:
    cache = SlotCache([shape()], slots=3, capacity=100, blocks=9)
    first, second = cache.acquire(33), cache.acquire(64)
    held = cache.table[[first, second]].flatten().tolist()
    assert sorted(held) == [-1] * 7 + list(range(7)) and cache.free_blocks == 2
    assert cache.has_room(32) and not cache.has_room(33)
    with pytest.raises(AssertionError):
        cache.acquire(33)
    cache.extend(first, 48)
    with pytest.raises(AssertionError, match="49 tokens do not fit in 48 places"):
        cache.extend(first, 1)
    cache.release(first)
    third = cache.acquire(80)  # the blocks that came back, and those that nobody had
    assert cache.table[third, :5].tolist() == [0, 1, 2, 7, 8] and cache.lengths[third] == 0
    fourth = SlotCache([shape()], slots=1, capacity=20)
    assert fourth.acquire() == 0 and not fourth.has_room(1) and fourth.free_blocks == 0
    for slot in (second, third):
        cache.release(slot)
    assert all_free(cache)


def test_a_chain_is_kept_where_it_lies_and_a_path_is_moved_together() -> None:
    cache = SlotCache([shape(), shape(1, 2, 2), shape()], slots=2, capacity=40)
    first, other = cache.acquire(16), cache.acquire(16)
    cache.release(first)
    slot = cache.acquire(40)
    assert cache.table[slot].tolist() == [0, 2, 3]
    fill(cache, slot, 40)
    fill(cache, other, 16)
    cache.extend(slot, 32)
    cache.keep(slot, 14, [0, 1, 2])
    assert cache.lengths[slot] == 17 and entries(cache, slot, 40) == [list(range(40))] * 10
    cache.keep(slot, 14, [0, 3, 5])  # across the end of a block
    assert cache.lengths[slot] == 17
    assert entries(cache, slot, 20) == [[*range(15), 17, 19, 17, 18, 19]] * 10
    assert entries(cache, other, 16) == [list(range(16))] * 10
    cache.keep(slot, 14, [])
    assert cache.lengths[slot] == 14


# batches


def test_a_ragged_batch_by_hand() -> None:
    tree = Segment(slot=4, base=7, past=9, ids=[30, 31, 32], parents=[-1, 0, 0, 1, 3])
    batch = RaggedBatch.of([Segment(2, 5, 5, [10, 11]), tree, Segment(0, 0, 0, [20])], CPU)
    assert batch.ids.tolist() == [[10, 11, 30, 31, 32, 20]]
    assert batch.positions.tolist() == [[5, 6, 8, 9, 10, 0]]
    assert batch.table.tolist() == [[2, 5, 5, 0, 2], [4, 7, 9, 2, 3], [0, 0, 0, 5, 1]]
    assert [list(batch.rows(index)) for index in range(3)] == [[0, 1], [2, 3, 4], [5]]
    assert batch.mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],  # sees the root and itself, not its sibling
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
        [1, 0, 0, 0, 0],
    ]


def test_chains_need_no_mask_and_ids_may_be_on_the_device_already() -> None:
    batch = RaggedBatch.of([Segment(0, 3, 4, [0]), Segment(1, 5, 5, [0])], CPU, torch.tensor([8, 9]))
    assert batch.mask.numel() == 0 and batch.ids.tolist() == [[8, 9]] and batch.positions.tolist() == [[4, 5]]


# attention


def random_segments(rng: random.Random, slots: int) -> list[Segment]:
    """Prompts, chains, whole trees and parts of trees, each in a slot of its own."""
    segments = []
    for slot in rng.sample(range(slots), rng.randrange(1, slots + 1)):
        base, count = rng.randrange(9), rng.randrange(1, 7)
        kind = rng.choice(["chain", "part of a chain", "tree", "part of a tree"])
        read = rng.randrange(4) if kind.startswith("part") else 0
        parents = None
        if kind.endswith("tree"):
            parents = [rng.randrange(-1, node) for node in range(read + count)]
        segments.append(Segment(slot, base, base + read, [0] * count, parents))
    return segments


def seen(segment: Segment, index: int, window: int) -> list[int]:
    """The places that a token sees, by the definition."""
    parents = segment.parents or range(-1, segment.past - segment.base + len(segment.ids) - 1)
    position: dict[int, int] = {}
    for node, parent in enumerate(parents):
        position[node] = segment.base if parent < 0 else position[parent] + 1
    node = segment.past - segment.base + index
    path = []
    at = node
    while at >= 0:
        path.append(at)
        at = parents[at]
    places = {place: place for place in range(segment.base)} | {segment.base + n: position[n] for n in path}
    return [place for place, where in places.items() if not window or where > position[node] - window]


@given(
    seed=st.integers(0, 10_000),
    groups=st.sampled_from([1, 3]),
    window=st.sampled_from([0, 0, 1, 4, 100]),
    softcap=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=50)
def test_attention_is_what_it_is_by_definition(seed: int, groups: int, window: int, softcap: float) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kv_heads, width, value_width, slots, scale = 2, 4, 6, 4, 0.37
    segments = random_segments(rng, slots)
    batch = RaggedBatch.of(segments, CPU)
    count = batch.ids.shape[1]

    def noise(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    query = noise(1, kv_heads * groups, count, width) * 2
    key, value = noise(1, kv_heads, count, width), noise(1, kv_heads, count, value_width)
    cache = SlotCache([LayerShape(kv_heads, width, value_width, torch.float64, CPU)], slots, 24)
    for _ in range(slots):
        slot = cache.acquire()
        cache.table[slot] = cache.table[slot].flip(0)  # out of order
    ((keys, values),) = cache.layers
    keys.copy_(noise(*keys.shape))
    values.copy_(noise(*values.shape))
    before = keys.clone()
    view = View.empty(cache, [window] if 0 < window < 32 else [])
    view.show(batch)
    layer = SlotLayer(keys, values, view, torch_attention)
    mixed = layer.kernel(query, key, value, layer, scale, window, softcap)
    assert mixed.shape == (1, count, kv_heads * groups, value_width)
    row = 0
    touched = set()
    for segment in segments:
        for index in range(len(segment.ids)):
            own = cache.places(segment.slot, range(24))
            touched.add(int(own[segment.past + index]))
            assert torch.equal(keys[:, own[segment.past + index]], key[0, :, row])
            places = own[seen(segment, index, window)]
            for head in range(kv_heads * groups):
                scores = keys[head // groups, places] @ query[0, head, row] * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                expected = scores.softmax(0) @ values[head // groups, places]
                torch.testing.assert_close(mixed[0, row, head], expected, rtol=1e-9, atol=1e-9)
            row += 1
    rest = sorted({*range(keys.shape[1])} - touched)
    assert torch.equal(keys[:, rest], before[:, rest])


def test_stale_entries_are_never_looked_at() -> None:
    cache = SlotCache([shape(1, 4, 4)], slots=1, capacity=8)
    for store in cache.layers[0]:
        store.fill_(math.nan)
    view, slot = View.empty(cache), cache.acquire()
    layer = SlotLayer(*cache.layers[0], view, torch_attention)
    for segment in (Segment(slot, 0, 0, [1, 2, 3]), Segment(slot, 2, 2, [4, 5, 6], [-1, 0, 0])):
        view.show(RaggedBatch.of([segment], CPU))
        new = torch.ones(1, 1, 3, 4, dtype=torch.float64)
        assert layer.kernel(new, new, new, layer, 1.0, 0, 0.0).isfinite().all()
