"""Slots, ragged batches and stale entries; exactness of attention over them is the subject of test_exactness.py."""

from __future__ import annotations

import math

import torch

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


def test_stale_entries_are_never_looked_at() -> None:
    keys = torch.full((1, 1, 8, 4), math.nan, dtype=torch.float64)
    view, values = View.empty(), keys.clone()
    layer = SlotLayer(keys, values, view, torch_attention)
    for segment in (Segment(0, 0, 0, [1, 2, 3]), Segment(0, 2, 2, [4, 5, 6], [-1, 0, 0])):
        view.show(RaggedBatch.of([segment], CPU))
        new = torch.ones(1, 1, 3, 4, dtype=torch.float64)
        assert layer.kernel(new, new, new, layer, 1.0, 0, 0.0).isfinite().all()
