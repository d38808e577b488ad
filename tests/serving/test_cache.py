"""Slots, ragged batches and attention over them: against the definitions, token by token."""

from __future__ import annotations

import math
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serving.engine.kv_cache import LayerShape, RaggedBatch, Segment, SlotCache, SlotLayer, View, torch_attention

CPU = torch.device("cpu")


def shape(heads: int = 2, key_width: int = 4, value_width: int = 3) -> LayerShape:
    return LayerShape(heads, key_width, value_width, torch.float64, CPU)


def filled(cache: SlotCache) -> SlotCache:
    """Entry i of a slot holds i, in each layer, key and value."""
    for keys, values in cache.layers:
        for store in (keys, values):
            store.copy_(torch.arange(cache.capacity, dtype=store.dtype)[:, None].expand(store.shape))
    return cache


# slots


def test_slots_are_handed_out_empty_and_come_back() -> None:
    cache = SlotCache([shape()], slots=3, capacity=8)
    slots = [cache.acquire() for _ in range(3)]
    assert sorted(slots) == [0, 1, 2] and cache.free_slots == 0
    cache.extend(slots[1], 5)
    cache.extend(slots[2], 2)
    assert cache.used_tokens == 7
    cache.release(slots[1])
    assert (cache.free_slots, cache.used_tokens) == (1, 2)
    assert cache.acquire() == slots[1] and cache.lengths[slots[1]] == 0


def test_a_chain_is_kept_where_it_lies_and_a_path_is_moved_together() -> None:
    cache = filled(SlotCache([shape(), shape(1, 2, 2), shape()], slots=2, capacity=12))
    slot = cache.acquire()
    other = 1 - slot
    cache.extend(slot, 10)
    cache.keep(slot, 4, [0, 1, 2])
    assert cache.lengths[slot] == 7
    assert all(keys[slot, 0, :, 0].tolist() == list(range(12)) for keys, _ in cache.layers)
    cache.keep(slot, 4, [0, 3, 5])
    assert cache.lengths[slot] == 7
    for keys, values in cache.layers:
        for store in (keys, values):
            assert store[slot, :, :, 0].tolist() == [[0, 1, 2, 3, 4, 7, 9, 7, 8, 9, 10, 11]] * store.shape[1]
            assert store[other, 0, :, 0].tolist() == list(range(12))
    cache.keep(slot, 4, [])
    assert cache.lengths[slot] == 4


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
    keys, values = noise(slots, kv_heads, 24, width), noise(slots, kv_heads, 24, value_width)
    before = keys.clone()
    view = View.empty([window] if 0 < window < 32 else [])
    view.show(batch)
    layer = SlotLayer(keys, values, view, torch_attention)
    mixed = layer.kernel(query, key, value, layer, scale, window, softcap)
    assert mixed.shape == (1, count, kv_heads * groups, value_width)
    row = 0
    touched = set()
    for segment in segments:
        for index in range(len(segment.ids)):
            touched.add((segment.slot, segment.past + index))
            assert torch.equal(keys[segment.slot, :, segment.past + index], key[0, :, row])
            places = seen(segment, index, window)
            for head in range(kv_heads * groups):
                scores = keys[segment.slot, head // groups, places] @ query[0, head, row] * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                expected = scores.softmax(0) @ values[segment.slot, head // groups, places]
                torch.testing.assert_close(mixed[0, row, head], expected, rtol=1e-9, atol=1e-9)
            row += 1
    for slot, place in {(s, p) for s in range(slots) for p in range(24)} - touched:
        assert torch.equal(keys[slot, :, place], before[slot, :, place])


def test_stale_entries_are_never_looked_at() -> None:
    keys = torch.full((1, 1, 8, 4), math.nan, dtype=torch.float64)
    view, values = View.empty(), keys.clone()
    layer = SlotLayer(keys, values, view, torch_attention)
    for segment in (Segment(0, 0, 0, [1, 2, 3]), Segment(0, 2, 2, [4, 5, 6], [-1, 0, 0])):
        view.show(RaggedBatch.of([segment], CPU))
        new = torch.ones(1, 1, 3, 4, dtype=torch.float64)
        assert layer.kernel(new, new, new, layer, 1.0, 0, 0.0).isfinite().all()
