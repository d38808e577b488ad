"""The CPU kernels against plain formulas in float64, and bit for bit against themselves in another batch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional

from draft.errors import UserError
from serving.engine.cpu import (
    PackedLinear,
    build,
    linear,
    load_kernels,
    pack,
    pack_linears,
    packed_linear,
    set_threads,
    slot_attention,
    threads,
)

FLOAT, HALF = torch.float32, torch.bfloat16
PROMPT = torch.empty(0, 0, dtype=torch.bool)  # causal


@pytest.fixture(autouse=True)
def _kernels():
    load_kernels()
    before = threads()
    yield
    set_threads(before)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


# -- packed_linear -----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 40),
    size_in=st.integers(1, 200),
    size_out=st.integers(1, 200),
    stored=st.sampled_from([FLOAT, HALF]),
    given_in=st.sampled_from([FLOAT, HALF]),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_packed_linear_is_the_matrix_product(rows, size_in, size_out, stored, given_in, biased, seed):
    torch.manual_seed(seed)
    weight = torch.randn(size_out, size_in).to(stored)
    bias = torch.randn(size_out) if biased else None
    x = torch.randn(rows, size_in).to(given_in)
    got = packed_linear(x, pack(weight), size_out, bias)
    expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.shape == expected.shape and got.dtype == given_in
    if rows:
        # beside the sums of magnitudes: what a sum leaves after its terms cancel says nothing about rounding
        size = functional.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
        error = (got.double() - expected).norm() / size.norm()
        assert error < (1e-6 if given_in == FLOAT else 1e-2)


@pytest.mark.parametrize("stored", [FLOAT, HALF])
@pytest.mark.parametrize(("size_in", "size_out"), [(576, 1100), (1700, 130)])  # 1700: several blocks of inputs
def test_a_row_has_the_same_bits_in_any_batch(stored, size_in, size_out):
    packed = pack(torch.randn(size_out, size_in).to(stored))
    x = torch.randn(230, size_in)
    whole = packed_linear(x, packed, size_out)
    assert relative(whole[:, :16], x.double() @ packed_columns(packed, size_in)) < 1e-5
    for rows in (*range(1, 27), 97, 200):
        assert torch.equal(packed_linear(x[:rows], packed, size_out), whole[:rows]), rows
    assert torch.equal(packed_linear(x[113:114], packed, size_out), whole[113:114])


def packed_columns(packed: Tensor, size_in: int) -> Tensor:
    """The first 16 features [in, 16] of a packed weight, by the product with the identity."""
    return packed_linear(torch.eye(size_in), packed, packed.shape[0] * packed.shape[2])[:, :16].double()


def test_threads_do_not_change_bits():
    packed, x = pack(torch.randn(1000, 300).to(HALF)), torch.randn(20, 300)
    case = random_case(seed=3, count=12)
    results = []
    for count in (1, 2, 5):
        set_threads(count)
        assert threads() == count
        for _ in range(20):  # workers that sleep, spin and start
            results.append((packed_linear(x, packed, 1000), attend(case)))
    for a, b in pairwise(results):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_packed_linear_takes_any_shape_and_strides():
    weight = torch.randn(33, 24)
    x = torch.randn(24, 5, 2).permute(2, 1, 0)  # [2, 5, 24], transposed in memory
    assert relative(packed_linear(x, pack(weight.T.contiguous().T), 33), x.double() @ weight.double().T) < 1e-5
    assert packed_linear(torch.randn(3, 0, 24), pack(weight), 33).shape == (3, 0, 33)
    with pytest.raises(RuntimeError, match="ends in 23 features"):
        packed_linear(torch.randn(2, 23), pack(weight), 33)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        packed_linear(torch.randn(2, 24).double(), pack(weight), 33)


def test_nan_and_infinity_stay_in_their_row():
    packed = pack(torch.randn(40, 30).to(HALF))
    x = torch.randn(4, 30)
    clean = packed_linear(x, packed, 40)
    x[1, 7], x[2, 3] = float("nan"), float("inf")
    for kind in (FLOAT, HALF):
        got = packed_linear(x.to(kind), packed, 40)
        assert got[1].isnan().all() and got[2].isinf().all()
        assert torch.equal(got[[0, 3]], packed_linear(x[[0, 3]].to(kind), packed, 40))
    assert torch.equal(packed_linear(x, packed, 40)[[0, 3]], clean[[0, 3]])


# -- slot_attention ----------------------------------------------------------------------------------------------------


def random_case(
    seed: int,
    count: int = 0,
    dtype: torch.dtype = FLOAT,
    tree: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    group: int = 3,
    width: int = 16,
    value_width: int = 16,
) -> dict:
    """Three slots of 80 entries; segments of random lengths in two of them, with random trees as masks if asked."""
    torch.manual_seed(seed)
    key_heads, slots, entries = 2, 3, 80
    pick = lambda low, high: int(torch.randint(low, high + 1, ()))  # noqa: E731
    segments, start = [], 0
    for slot in torch.randperm(slots)[:2].tolist():
        size = count or pick(0, 9)
        past = pick(0, entries - size)
        base = pick(max(0, past - 6), past) if tree else past
        segments.append((slot, base, past, start, size))
        start += size
    tokens = start + 1  # the last token belongs to nobody
    positions = torch.zeros(tokens, dtype=torch.int64)
    mask = torch.zeros(tokens, 24, dtype=torch.bool) if tree else torch.empty(tokens, 0, dtype=torch.bool)
    for _, base, past, first, size in segments:
        for j in range(size):
            positions[first + j] = past + j
            if tree:
                mask[first + j, : past + j - base] = torch.rand(past + j - base) < 0.5
                mask[first + j, past + j - base] = True

    def new(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    return dict(
        q=new(1, tokens, key_heads * group, width).transpose(1, 2),
        k=new(1, tokens, key_heads, width).transpose(1, 2),
        v=new(1, tokens, key_heads, value_width).transpose(1, 2),
        k_slots=new(slots, key_heads, entries, width),
        v_slots=new(slots, key_heads, entries, value_width),
        positions=positions,
        segments=torch.tensor(segments),
        mask=mask,
        scale=width**-0.5,
        window=window,
        softcap=softcap,
    )  # fmt: skip


def attend(case: dict) -> Tensor:
    """slot_attention on copies of the case's slots."""
    return slot_attention(**{**case, "k_slots": case["k_slots"].clone(), "v_slots": case["v_slots"].clone()})


def reference(case: dict) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, in float64: output [1, tokens, heads, value width], and both slots after writing."""
    q, k, v = case["q"].double(), case["k"].double(), case["v"].double()
    k_slots, v_slots = case["k_slots"].double(), case["v_slots"].double()
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(1, q.shape[2], q.shape[1], v.shape[3], dtype=torch.float64)
    for slot, base, past, start, count in case["segments"].tolist():
        k_slots[slot, :, past : past + count] = k[0, :, start : start + count]
        v_slots[slot, :, past : past + count] = v[0, :, start : start + count]
        for j in range(count):
            key = torch.arange(past + count)
            in_window = key > case["positions"][start + j] - case["window"] if case["window"] else key >= 0
            if case["mask"].numel():
                allowed = case["mask"][start + j, (key - base).clamp_min(0)]
                seen = torch.where(key < base, in_window, allowed)
            else:
                seen = (key <= past + j) & in_window
            keys = k_slots[slot, :, : past + count].repeat_interleave(group, 0)  # [heads, keys, width]
            values = v_slots[slot, :, : past + count].repeat_interleave(group, 0)
            scores = (keys @ q[0, :, start + j, :, None])[..., 0] * case["scale"]
            if case["softcap"]:
                scores = case["softcap"] * torch.tanh(scores / case["softcap"])
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[0, start + j] = (weights[:, None] @ values)[:, 0]
    return out, k_slots, v_slots


@settings(max_examples=200, deadline=None)
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
    expected, k_slots, v_slots = reference(case)
    got = slot_attention(**case)
    assert got.dtype == dtype and got.shape == expected.shape and got.is_contiguous()
    assert torch.equal(case["k_slots"].double(), k_slots) and torch.equal(case["v_slots"].double(), v_slots)
    assert relative(got, expected) < (1e-5 if dtype == FLOAT else 1e-2)


def test_a_long_prompt_in_chunks_is_the_formula():
    torch.manual_seed(0)
    case = random_case(seed=1, count=1, width=64, value_width=64)
    for name, entries in (("k_slots", 700), ("v_slots", 700)):
        case[name] = torch.randn(3, 2, entries, 64)
    for name, heads in (("q", 6), ("k", 2), ("v", 2)):
        case[name] = torch.randn(1, heads, 90, 64)
    case |= dict(positions=torch.arange(600, 690), segments=torch.tensor([[1, 600, 600, 0, 90]]), mask=PROMPT)
    assert relative(attend(case), reference(case)[0]) < 1e-5


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("window", [0, 20])
def test_a_token_has_the_same_bits_alone_in_a_batch_in_a_tree_and_from_any_base(dtype, window):
    torch.manual_seed(2)
    past, path = 37, [0, 2, 3, 6]  # the chain's tokens are these nodes of a block of 8
    slots = [torch.randn(3, 2, 80, 64).to(dtype) for _ in range(2)]
    q, k, v = (torch.randn(1, heads, 8, 64).to(dtype) for heads in (6, 2, 2))

    def run(nodes: list[int], segment: list[int], mask: Tensor, slots: list[Tensor]) -> Tensor:
        pick = torch.tensor(nodes)
        positions = torch.tensor([past + path.index(n) if n in path else past for n in nodes])
        q_, k_, v_ = (part[:, :, pick] for part in (q, k, v))
        keys, values = slots
        return slot_attention(q_, k_, v_, keys, values, positions, torch.tensor([segment]), mask, 0.125, window)

    alone = [slot.clone() for slot in slots]
    one_by_one = [run([n], [1, past + i, past + i, 0, 1], PROMPT, alone) for i, n in enumerate(path)]
    chain = run(path, [1, past, past, 0, 4], PROMPT, slots)
    mask = torch.zeros(8, past + 8, dtype=torch.bool)  # the tree as a mask over all keys, base 0
    for depth, n in enumerate(path):
        low = max(0, past + depth - window + 1) if window else 0
        mask[n, low:past] = True
        mask[n, [past + m for i, m in enumerate(path[: depth + 1]) if past + i >= low]] = True
    for n in set(range(8)) - set(path):
        mask[n, past + n] = True
    everything = run(list(range(8)), [1, 0, past, 0, 8], mask, slots)
    from_base = run(list(range(8)), [1, past, past, 0, 8], mask[:, past:], slots)
    for i, n in enumerate(path):
        assert torch.equal(one_by_one[i][0, 0], chain[0, i])
        assert torch.equal(everything[0, n], chain[0, i])
        assert torch.equal(from_base[0, n], chain[0, i])


def test_tokens_without_a_segment_are_zero_and_their_slots_stay():
    case = random_case(seed=5, count=4)
    before = case["k_slots"].clone()
    case["segments"] = torch.tensor([[0, 10, 10, 0, 4], [1, 3, 3, 4, 0]])
    got = slot_attention(**case)
    assert not got[:, 4:].any() and got[:, :4].all()
    changed = (case["k_slots"] != before).any(-1).any(1)  # [slots, entries]
    assert changed.nonzero().tolist() == [[0, 10], [0, 11], [0, 12], [0, 13]]


def test_attention_propagates_nan_to_its_own_slot_only():
    case = random_case(seed=6, count=3)
    slot = int(case["segments"][0, 0])
    case["segments"][0, 1:3] = 20
    case["k_slots"][slot, :, 0] = float("nan")
    got = attend(case)
    assert got[0, :3].isnan().all() and got[0, 3:].isfinite().all()


def test_what_does_not_fit_is_refused():
    case = random_case(seed=7, count=4)
    for segment in ([0, 0, 78, 0, 4], [3, 0, 0, 0, 4], [0, 9, 8, 0, 4], [0, 0, 0, 6, 4]):
        with pytest.raises(RuntimeError, match="does not fit"):
            attend(case | dict(segments=torch.tensor([segment])))
    with pytest.raises(RuntimeError, match="narrower"):
        mask = torch.ones(9, 3, dtype=torch.bool)
        attend(case | dict(segments=torch.tensor([[0, 5, 5, 0, 4]]), mask=mask))


# -- torch.compile -----------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Three layers of attention over slots that are views of two tensors, keys and values, as in the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(64, 128) for _ in range(3))
        # [layers, slots, heads, entries, width]; were keys and values one tensor, inductor would copy the values
        self.keys, self.values = (torch.zeros(3, 2, 2, 64, 16) for _ in range(2))
        self.slots = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))

    def forward(self, x: Tensor, positions: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        for project, slots in zip(self.linears, self.slots, strict=True):
            q, k, v = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in project(x).split([64, 32, 32], dim=-1))
            x = x + slot_attention(q, k, v, *slots, positions, segments, mask, 0.25).flatten(2)
        return x


@torch.inference_mode()
def test_compiled_in_one_graph_without_copies_of_the_slots():
    torch.manual_seed(0)
    eager, compiled = Layers(), Layers()
    compiled.load_state_dict(eager.state_dict())
    assert pack_linears(eager, HALF) == pack_linears(compiled, HALF) == 3
    step = torch.compile(compiled, fullgraph=True, dynamic=True)
    past = 0
    for count in (5, 8, 3):
        inputs = (torch.randn(1, count, 64), torch.arange(past, past + count))
        segments = torch.tensor([[1, past, past, 0, count]])
        mask = torch.empty(count, 0, dtype=torch.bool)
        got, code = run_and_get_code(step, *inputs, segments, mask)
        torch.testing.assert_close(got, eager(*inputs, segments, mask), rtol=1e-5, atol=1e-5)
        for text in code:  # what is written is an input of the graph itself, not a copy of it
            calls = re.findall(r"slot_attention\.default\(.*?, ((?:\w+, ){5})0\.25", text)
            assert len(calls) == 3 and all(re.fullmatch(r"(arg\d+_1, ){5}", call) for call in calls)
        past += count
    for got, expected in ((compiled.keys, eager.keys), (compiled.values, eager.values)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert got[:, 1, :, :past].all() and not got[:, 1, :, past:].any() and not got[:, 0].any()


def test_operators_say_truly_what_they_change_and_return():
    case = random_case(seed=8, count=3)
    load_kernels()
    torch.library.opcheck(torch.ops.draftsmith.slot_attention.default, tuple(case.values()))
    packed = pack(torch.randn(20, 10))
    torch.library.opcheck(torch.ops.draftsmith.packed_linear.default, (torch.randn(3, 10), packed, 20, torch.randn(20)))
    torch.library.opcheck(torch.ops.draftsmith.pack.default, (torch.randn(20, 10),))


# -- modules -----------------------------------------------------------------------------------------------------------


def test_pack_linears_replaces_all_and_leaves_a_tied_embedding():
    model = make_tiny_target(dtype=torch.float32).model  # its own: it is packed in place
    ids = torch.arange(1, 12)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        linears = sum(type(m) is nn.Linear for m in model.modules())
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert pack_linears(model, FLOAT) == linears == 8 * 7 + 1
        assert not any(type(m) is nn.Linear for m in model.modules())
        assert isinstance(model.get_input_embeddings().weight, nn.Parameter)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("native", [False, True])
def test_long_prompts_take_the_native_product_where_there_is_one(native, monkeypatch):
    monkeypatch.setattr(linear, "fastest_cpu_dtype", lambda: HALF if native else FLOAT)
    plain = nn.Linear(30, 20).to(HALF)
    plain.requires_grad_(False)
    layer = PackedLinear.from_linear(plain, HALF)
    assert (layer.weight is not None) == native and not layer.state_dict()
    called = []
    original = functional.linear
    monkeypatch.setattr(functional, "linear", lambda *a: called.append(a[0].shape) or original(*a))
    for rows in (64, 65):
        x = torch.randn(1, rows, 30, dtype=HALF)
        expected = original(x.double(), plain.weight.to(HALF).double(), plain.bias.to(HALF).double())
        assert relative(layer(x), expected) < 1e-2
    assert called == ([(1, 65, 30)] if native else [])


# -- threads and building ----------------------------------------------------------------------------------------------


def test_two_python_threads_may_call_at_once():
    set_threads(3)
    packed, x = pack(torch.randn(2000, 200)), torch.randn(4, 200)
    expected, wrong = packed_linear(x, packed, 2000), []

    def work() -> None:
        for _ in range(100):
            if not torch.equal(packed_linear(x, packed, 2000), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_process_ends_and_forks_while_workers_exist():
    code = """
import os, torch
from serving.engine.cpu import pack, packed_linear, set_threads
set_threads(3)
packed, x = pack(torch.randn(2000, 200)), torch.randn(4, 200)
expected = packed_linear(x, packed, 2000)
child = os.fork()
assert torch.equal(packed_linear(x, packed, 2000), expected)
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("both")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment())
    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}


def test_a_missing_or_failing_compiler_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    failing = tmp_path / "g++"
    failing.write_text("#!/bin/sh\necho 'some note' >&2; echo 'kernels.cpp:1: error: no such thing' >&2; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(UserError, match="could not compile.*error: no such thing.*set "):
        build.built_library()
    assert [path.name for path in tmp_path.iterdir()] == ["g++"]
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="install g"):
        build.built_library()
