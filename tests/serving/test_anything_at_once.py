"""Drawn at random: greedy and sampled requests of all lengths, ends and options, together in one batch."""

from __future__ import annotations

from typing import Any

import pytest
from exactness import ALL, MODES, PROCESSING, PROMPTS, build, params, sampled_case
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, check, serve
from tiny_targets import CONTEXT, texts_of, tiny

from serving.engine import Speculation

CHUNKS = [1, 3, 16, 128]
LONGEST = {1: 6, 3: 17}  # prompt for the small chunks: each is a pass


@st.composite
def greedy_cases(draw: st.DrawFn, family: str, chunk: int) -> Case:
    longest = LONGEST.get(chunk, CONTEXT - 1)
    text = draw(st.sampled_from([text for text in texts_of(tiny(family)) if text.written <= longest]))
    edges = [chunk - 1, chunk, chunk + 1, 2 * chunk, CONTEXT - 1, CONTEXT - 3]
    lengths = [length for length in edges if text.written <= length <= longest]
    anywhere = st.integers(text.written, longest)
    length = draw(st.one_of(st.sampled_from(lengths), anywhere) if lengths else anywhere)
    count = min(draw(st.sampled_from([1, 2, 3, 5, 9, 14])), CONTEXT - length)
    fields: dict[str, Any] = {"ignore_eos": draw(st.booleans())}
    if draw(st.booleans()):
        where, width = draw(st.integers(0, count - 1)), draw(st.integers(1, 3))
        stop = tiny(family).decode(text.tokens[length : length + count])[where : where + width]
        fields |= {"stop": (stop,) if stop else (), "keep_stop": draw(st.booleans())}
    if draw(st.integers(0, 3)) == 0:
        fields |= {
            "stop_ids": (draw(st.sampled_from(text.tokens[length : length + count])),),
            "keep_stop": draw(st.booleans()),
        }
    return Case.greedy(
        text, length, params(count, **fields), speculation=draw(options()), arrives=draw(st.integers(0, 8))
    )


def options() -> st.SearchStrategy[Speculation]:
    tokens = st.none() | st.integers(0, 8)
    return st.builds(Speculation, st.sampled_from([True, True, True, False]), tokens, st.just(None))


@st.composite
def sampled_cases(draw: st.DrawFn, family: str, chunk: int) -> Case:
    short = [index for index, prompt in enumerate(PROMPTS) if len(prompt) <= LONGEST.get(chunk, CONTEXT)]
    processing, prompt = draw(st.sampled_from(list(PROCESSING))), draw(st.sampled_from(short))
    return sampled_case(family, processing, prompt, speculation=draw(options()), arrives=draw(st.integers(0, 8)))


@pytest.mark.parametrize("family", ALL)
@given(data=st.data())
@settings(max_examples=14)
def test_anything_at_once(family: str, data: st.DataObject) -> None:
    """Up to 24 requests an example: greedy and sampled, with all kinds of ends, in batches of 1 to 8."""
    chunk = data.draw(st.sampled_from(CHUNKS), label="prefill chunk")
    mode = data.draw(st.sampled_from(list(MODES)), label="mode")
    each = st.one_of(greedy_cases(family, chunk), greedy_cases(family, chunk), sampled_cases(family, chunk))
    cases = data.draw(st.lists(each, min_size=4, max_size=24), label="requests")
    engine = build(
        family,
        mode,
        errors=data.draw(st.sampled_from([0.0, 0.2, 1.0]), label="errors"),
        seed=data.draw(st.integers(0, 99), label="seed"),
        max_batch=data.draw(st.integers(1, 8), label="batch"),
        prefill_chunk=chunk,
    )
    for case, completion in zip(cases, serve(engine, cases), strict=True):
        check(engine.target, case, completion)
    cache = engine.models.runner.cache
    assert cache.free_slots == len(cache.lengths) and cache.used_tokens == 0
    assert not getattr(engine.models.proposer, "present", [])
