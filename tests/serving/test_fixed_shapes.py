"""Padded passes of fixed shapes, which CUDA graphs need: the same tokens, few shapes, and nothing that asks the host.

Without a card they run as they are; what a graph would refuse to record is looked for among the operations.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from exactness import ALL, MODES, build, heads_for, params
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, check, serve
from tiny_targets import texts_of, tiny

from draft.errors import UserError
from serving.engine import Engine, Speculation
from serving.engine.fixed_shapes import FixedShapes, Recordable
from serving.engine.kv_cache import Batch, LayerShape, Segment, SlotCache, View, _visible
from serving.engine.padding import WIDEST, Padded, Shape
from serving.engine.setup import _choose_mode

CPU = torch.device("cpu")


def fix(engine: Engine) -> list[FixedShapes]:
    """What warm-up does on CUDA."""
    assert engine.models.runner.fix_shapes()
    runners: list[Any] = [engine.models.runner]
    if hasattr(engine.models.proposer, "runner"):
        runners.append(engine.models.proposer.runner)
        runners[1].fix_shapes()
    return [runner.fixed for runner in runners]


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("mode", ["chain", "tree of 16", "auto"])
def test_greedy_tokens_are_those_of_transformers(family: str, mode: str) -> None:
    """With windows narrower than a block, bounded scores, rows that accept differently, come and go."""
    engine = build(family, mode, max_batch=5)
    engine.models.runner.fix_shapes()
    cases = [
        Case.greedy(text, text.written + 2 * k, params(12), speculation=Speculation(num_tokens=k))
        for k, text in zip(range(9), itertools.cycle(texts_of(engine.target)), strict=False)
    ]
    for case, completion in zip(cases, serve(engine, cases), strict=True):
        check(engine.target, case, completion)
    for head in heads_for(family)[:1]:
        with_head = Engine(engine.target, head, max_batch=5, **{"speculation_length": 8, **MODES[mode]})
        fixed = fix(with_head)
        for case, completion in zip(cases, serve(with_head, cases), strict=True):
            check(engine.target, case, completion)
        assert all(one.steps for one in fixed) or mode == "auto"  # which need not draft


def test_a_long_run_needs_few_shapes() -> None:
    target = tiny("llama")
    engine = Engine(target, make_tiny_head(target), speculation="chain", speculation_length=3, max_batch=4)
    fixed = fix(engine)
    prompts = [text.tokens[:length] for text in texts_of(target) for length in (3, 9, 17, 30)]
    engine.generate(prompts, params(24))
    assert [0 < len(one.steps) < 20 for one in fixed] == [True, True]


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Chains, parts of prompts, trees with and without nodes in the cache."""
    segments = []
    for slot in range(draw(st.integers(1, 5))):
        base, count = draw(st.integers(0, 70)), draw(st.integers(1, 9))
        before = draw(st.integers(0, 4))
        parents = None
        if draw(st.booleans()):
            parents = [-1, *(draw(st.integers(0, index)) for index in range(before + count - 1))]
        segments.append(Segment(slot, base, base + before, draw(st.lists(st.integers(0, 99), min_size=count,
                                                                            max_size=count)), parents))  # fmt: skip
    return Batch.of(segments, CPU)


@given(batches(), st.sampled_from([0, 1, 3, 8, 40]))
@settings(max_examples=300)
def test_each_token_sees_what_it_sees_in_the_ragged_pass(batch: Batch, window: int) -> None:
    shape = Shape.around(batch, capacity=96)
    if shape is None:
        assert batch.ids.shape[1] * 3 < 8 * 16  # the most rows and tokens, doubled up
        return
    padded = Padded(shape, CPU)
    there = padded.fill(batch)
    assert padded.ids[there].tolist() == batch.ids[0].tolist()
    assert padded.positions[there].tolist() == batch.positions[0].tolist()
    view = View.empty()
    view.masks = {window: view.mask} if window else {}
    view.show(batch)
    visible = padded.visible(window).expand(-1, 1, -1, -1).flatten(0, 2)  # [rows * tokens, reach]
    slots = padded.slots.repeat_interleave(shape.tokens)
    for index, segment in enumerate(batch.segments):
        own = batch.rows(index)
        reach = segment.past + len(segment.ids)
        expected = _visible(segment, view, slice(own.start, own.stop), reach, window)
        got = visible[there[own.start : own.stop]]
        assert not got[:, reach:].any()
        assert got[:, :reach].tolist() == ([[True] * reach] if expected is None else expected.tolist())
        assert slots[there[own.start : own.stop]].tolist() == [segment.slot] * len(own)
        assert padded.places[there[own.start : own.stop]].tolist() == list(range(segment.past, reach))
    # padding sees something, and writes nothing of its own
    assert visible.any(dim=-1).all()
    written = {(int(slot), int(place)) for slot, place in zip(slots, padded.places, strict=True)}
    assert len(written) == batch.ids.shape[1]


def test_shapes_waste_little() -> None:
    def around(*segments: Segment) -> Shape | None:
        return Shape.around(Batch.of(list(segments), CPU), capacity=1000)

    plain = [Segment(slot, 100, 100, [1]) for slot in range(5)]
    assert around(*plain) == Shape(rows=8, tokens=1, block=1, reach=128)
    assert around(Segment(0, 990, 990, [1] * 6)) == Shape(rows=1, tokens=8, block=8, reach=1000)
    assert around(Segment(0, 0, 0, [1] * WIDEST)) is not None
    assert around(Segment(0, 0, 0, [1] * (WIDEST + 1))) is None
    assert around(*plain, Segment(9, 0, 0, [1] * 40)) is None
    far = [Segment(slot, 9000, 9000, [1]) for slot in range(8)]
    assert Shape.around(Batch.of(far[:2], CPU), 20_000) == Shape(rows=2, tokens=1, block=1, reach=16384)
    assert Shape.around(Batch.of(far, CPU), 20_000) is None


@pytest.mark.parametrize("family", ALL)
def test_nothing_in_a_pass_waits_for_the_host(family: str) -> None:
    """Once a shape has been met: what is set up in its first pass comes before the recording."""
    target = tiny(family)
    engine = Engine(target, make_tiny_head(target), speculation="tree", max_batch=3, speculation_length=3)
    fixed = fix(engine)
    text = texts_of(target)[0]
    engine.generate([text.tokens[:9], text.tokens[:14]], params(8))
    for one in fixed:
        for step in one.steps.values():
            with torch.inference_mode(), Recordable():
                step.run()


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("lift_fresh", lambda x: torch.tensor([1]) + x),
        ("nonzero", lambda x: x.nonzero()),
        ("index", lambda x: x[x > 0]),
        ("index_put_", lambda x: x.index_put_((x > 0,), x[0])),
        ("_unique2", lambda x: x.unique()),
    ],
)
def test_what_would_wait_is_found(name: str, run: Any) -> None:
    with pytest.raises(RuntimeError, match=f"^{name} waits for the host"), Recordable():
        run(torch.ones(3))


class OnNoCard:
    """In the place of a recorder: what runs under it is looked at, and the recording fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def record(self, run: Any) -> Any:
        with Recordable():
            run()
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("no\ncard"), "passes run without CUDA graphs: no\n"),
        (torch.OutOfMemoryError("4 GiB"), "no memory to record passes of Shape("),
    ],
)
def test_what_cannot_be_recorded_runs_ragged(error: Exception, said: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = build("llama", "chain", max_batch=2)
    engine.models.runner.fix_shapes()
    fixed = engine.models.runner.fixed
    assert fixed is not None and engine.models.runner.fixes_shapes
    fixed.steps.clear()
    fixed.recorder = OnNoCard(error)  # type: ignore[assignment]
    cases = [Case.greedy(text, 20, params(9)) for text in texts_of(engine.target)[:3]]
    for case, completion in zip(cases, serve(engine, cases), strict=True):
        check(engine.target, case, completion)
    assert not fixed.steps and said in caplog.text
    refused = not isinstance(error, torch.OutOfMemoryError)  # for memory, another shape is tried
    assert fixed.refused == refused and (fixed.recordings == 1) == refused == (caplog.text.count("graphs") == 1)
    assert refused or fixed.recordings == len(fixed.too_large) == caplog.text.count("no memory")


def test_a_step_that_records_says_nothing_about_costs() -> None:
    target = tiny("llama")
    engine = Engine(target, make_tiny_head(target), speculation="chain", speculation_length=2, max_batch=1)
    fixed = fix(engine)

    class Recorder:
        def record(self, run: Any) -> Any:
            outputs = run()
            return type("Graph", (), {"replay": lambda _: run()})(), outputs

    for one in fixed:
        one.steps.clear()
        one.recorder = Recorder()  # type: ignore[assignment]
    inner, ignored = engine.controller.observe_target, list[bool]()

    def observe(tokens: int, seconds: float, *, ignore: bool = False) -> None:
        ignored.append(ignore)
        inner(tokens, seconds, ignore=ignore)

    engine.controller.observe_target = observe  # type: ignore[method-assign]
    engine.generate([[5, 6, 7]], params(20))
    recorded = sum(one.recordings for one in fixed)
    assert recorded == sum(len(one.steps) for one in fixed) > 3
    assert sum(ignored) > 2 and sum(curve.reach for curve in engine.controller.costs.draft.values()) > 0
    ignored.clear()
    engine.generate([[5, 6, 7]], params(20))
    assert recorded == sum(one.recordings for one in fixed)
    assert ignored[0] and not any(ignored[1:])  # the prompt


def test_no_sequence_meets_what_another_left() -> None:
    """Masked keys are multiplied by 0, which an infinite or undefined one would survive."""
    cache = SlotCache([LayerShape(1, 2, 2, torch.float32, CPU)], slots=2, capacity=4)
    stores = cache.layers[0]

    def spoil() -> None:
        for store in stores:
            store.fill_(torch.nan)

    spoil()
    FixedShapes(lambda ids, positions: [ids[0]], View.empty(), cache)
    assert all(bool((store == 0).all()) for store in stores)
    spoil()
    slot = cache.acquire()
    for store in stores:
        assert bool((store[slot] == 0).all()) and bool(store[1 - slot].isnan().all())


def test_which_attention_can_be_recorded() -> None:
    target = make_tiny_target(dtype=torch.float32)

    class OnCard:  # as far as choosing looks
        device, dtype = torch.device("cuda"), target.dtype

    card: Any = OnCard()
    assert _choose_mode("auto", "auto", card) == _choose_mode("compiled", "sdpa", card) == "compiled"
    assert _choose_mode("auto", "flex", card) == _choose_mode("eager", "auto", card) == "eager"
    with pytest.raises(UserError, match="graphs attend by sdpa, and flash_attention_2 was asked for; use auto"):
        _choose_mode("compiled", "flash_attention_2", card)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("speculation", ["off", "chain", "tree"])
def test_graphs_give_the_same_tokens(speculation: str) -> None:
    target = make_tiny_target(dtype=torch.float32)
    target.model.cuda()
    head = make_tiny_head(target).to("cuda")
    engine = Engine(target, head, mode="compiled", speculation=speculation, max_batch=3)
    engine.warm_up()
    assert engine.mode == "compiled"
    for prompts in ([[5, 6, 7], list(range(30)), [9] * 12], [[8], [30, 31]], [[4] * 50]):
        eager = Engine(target, head, mode="eager", speculation=speculation).generate(prompts, params(16))
        again = engine.generate(prompts, params(16))
        assert [one.token_ids for one in again] == [one.token_ids for one in eager]
    runners: list[Any] = [engine.models.runner, *([engine.models.proposer.runner] if engine.models.proposer else [])]
    assert all(any(step.graph is not None for step in runner.fixed.steps.values()) for runner in runners)
