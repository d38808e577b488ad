"""Attention over cache slots against the formula in float64, and bit for bit against itself in another batch."""

import pytest
import torch
from cpu_cases import FLOAT, HALF, PROMPT, attend, places, random_case, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpu_kernels import slot_attention
from cpu_kernels.ops import BLOCK


def reference(case: dict) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, in float64: output [1, tokens, heads, value width], and both caches after writing."""
    q, k, v = case["q"].double(), case["k"].double(), case["v"].double()
    k_cache, v_cache = case["k_cache"].double(), case["v_cache"].double()
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(1, q.shape[2], q.shape[1], v.shape[3], dtype=torch.float64)
    for slot, base, past, start, count in case["segments"].tolist():
        where = places(case["blocks"], slot, past + count)
        k_cache[:, where[past:]] = k[0, :, start : start + count]
        v_cache[:, where[past:]] = v[0, :, start : start + count]
        for j in range(count):
            key = torch.arange(past + count)
            in_window = key > case["positions"][start + j] - case["window"] if case["window"] else key >= 0
            if case["mask"].numel():
                allowed = case["mask"][start + j, (key - base).clamp_min(0)]
                seen = torch.where(key < base, in_window, allowed)
            else:
                seen = (key <= past + j) & in_window
            keys = k_cache[:, where].repeat_interleave(group, 0)  # [heads, keys, width]
            values = v_cache[:, where].repeat_interleave(group, 0)
            scores = (keys @ q[0, :, start + j, :, None])[..., 0] * case["scale"]
            if case["softcap"]:
                scores = case["softcap"] * torch.tanh(scores / case["softcap"])
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[0, start + j] = (weights[:, None] @ values)[:, 0]
    return out, k_cache, v_cache


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([FLOAT, HALF]),
    tree=st.booleans(),
    window=st.sampled_from([0, 1, 5, 40]),
    softcap=st.sampled_from([0.0, 2.0]),
    group=st.sampled_from([1, 3, 4]),
    width=st.sampled_from([8, 20, 64]),
    value_width=st.sampled_from([4, 16, 40, 64]),
)
def test_slot_attention_is_the_formula(seed, dtype, tree, window, softcap, group, width, value_width):
    case = random_case(seed, 0, dtype, tree, window, softcap, group, width, value_width)
    expected, k_cache, v_cache = reference(case)
    got = slot_attention(**case)
    assert got.dtype == dtype and got.shape == expected.shape and got.is_contiguous()
    assert torch.equal(case["k_cache"].double(), k_cache) and torch.equal(case["v_cache"].double(), v_cache)
    assert relative(got, expected) < (1e-5 if dtype == FLOAT else 1e-2)


def test_a_long_prompt_in_chunks_is_the_formula():
    torch.manual_seed(0)
    case = random_case(seed=1, count=1, width=64, value_width=64)
    case |= {name: torch.randn(2, 150 * BLOCK, 64) for name in ("k_cache", "v_cache")}
    case |= {"blocks": torch.randperm(150)[:132].view(3, 44)}
    case |= {name: torch.randn(1, heads, 90, 64) for name, heads in (("q", 6), ("k", 2), ("v", 2))}
    case |= dict(positions=torch.arange(600, 690), segments=torch.tensor([[1, 600, 600, 0, 90]]), mask=PROMPT)
    assert relative(attend(case), reference(case)[0]) < 1e-5


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("window", [0, 20])
def test_a_token_has_the_same_bits_alone_in_a_batch_in_a_tree_and_from_any_base(dtype, window):
    torch.manual_seed(2)
    past, path = 37, [0, 2, 3, 6]  # the chain's tokens are these nodes of a block of 8
    caches = [torch.randn(2, 20 * BLOCK, 64).to(dtype) for _ in range(2)]
    blocks = torch.randperm(20)[:15].view(3, 5)
    q, k, v = (torch.randn(1, heads, 8, 64).to(dtype) for heads in (6, 2, 2))

    def run(nodes, segment, mask, caches):
        pick = torch.tensor(nodes)
        positions = torch.tensor([past + path.index(n) if n in path else past for n in nodes])
        q_, k_, v_ = (part[:, :, pick] for part in (q, k, v))
        segments = torch.tensor([segment])
        return slot_attention(q_, k_, v_, *caches, blocks, positions, segments, mask, 0.125, window)

    alone = [cache.clone() for cache in caches]
    one_by_one = [run([n], [1, past + i, past + i, 0, 1], PROMPT, alone) for i, n in enumerate(path)]
    chain = run(path, [1, past, past, 0, 4], PROMPT, caches)
    mask = torch.zeros(8, past + 8, dtype=torch.bool)  # the tree as a mask over all keys, base 0
    for depth, n in enumerate(path):
        low = max(0, past + depth - window + 1) if window else 0
        mask[n, low:past] = True
        mask[n, [past + m for i, m in enumerate(path[: depth + 1]) if past + i >= low]] = True
    for n in set(range(8)) - set(path):
        mask[n, past + n] = True
    everything = run(list(range(8)), [1, 0, past, 0, 8], mask, caches)
    from_base = run(list(range(8)), [1, past, past, 0, 8], mask[:, past:], caches)
    for i, n in enumerate(path):
        assert torch.equal(one_by_one[i][0, 0], chain[0, i])
        assert torch.equal(everything[0, n], chain[0, i])
        assert torch.equal(from_base[0, n], chain[0, i])


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize(("tree", "window"), [(False, 0), (True, 0), (False, 21)])
@pytest.mark.parametrize("width", [20, 64])
def test_bits_do_not_depend_on_where_the_blocks_lie(dtype, tree, window, width):
    case = random_case(seed=4, count=7, dtype=dtype, tree=tree, window=window, width=width, value_width=width)
    together = torch.arange(15).view(3, 5)
    lying = case | {"blocks": together}
    for name in ("k_cache", "v_cache"):
        lying[name] = case[name].clone()
        for slot in range(3):
            lying[name][:, places(together, slot, 80)] = case[name][:, places(case["blocks"], slot, 80)]
    assert not torch.equal(together, case["blocks"]) and torch.equal(attend(lying), attend(case))


def test_tokens_without_a_segment_are_zero_and_nan_stays_in_its_slot():
    case = random_case(seed=5, count=4)
    before = case["k_cache"].clone()
    case["segments"] = torch.tensor([[0, 10, 10, 0, 4], [1, 3, 3, 4, 0]])
    got = slot_attention(**case)
    assert not got[:, 4:].any() and got[:, :4].all()
    changed = (case["k_cache"] != before).any(-1).any(0)  # [places]
    assert changed.nonzero()[:, 0].tolist() == places(case["blocks"], 0, 14)[10:].tolist()
    case = random_case(seed=6, count=3)
    slot = int(case["segments"][0, 0])
    case["segments"][0, 1:3] = 20
    case["k_cache"][:, places(case["blocks"], slot, 1)] = float("nan")
    got = attend(case)
    assert got[0, :3].isnan().all() and got[0, 3:].isfinite().all()


def test_what_does_not_fit_is_refused():
    case = random_case(seed=7, count=4)
    for segment in ([0, 0, 78, 0, 4], [3, 0, 0, 0, 4], [0, 9, 8, 0, 4], [0, 0, 0, 6, 4]):
        with pytest.raises(RuntimeError, match="does not fit"):
            attend(case | dict(segments=torch.tensor([segment])))
    with pytest.raises(RuntimeError, match="slot 1 has no block for entry 48"):
        case["blocks"][1, 3:] = -1
        attend(case | dict(segments=torch.tensor([[1, 45, 45, 0, 4]])))
    with pytest.raises(RuntimeError, match="narrower"):
        mask = torch.ones(9, 3, dtype=torch.bool)
        attend(case | dict(segments=torch.tensor([[0, 5, 5, 0, 4]]), mask=mask))


def test_both_languages_know_one_size_of_blocks():
    assert torch.ops.draftsmith.block_size() == BLOCK
