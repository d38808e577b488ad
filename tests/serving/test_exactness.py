"""What comes out is the target's own, whatever is drafted: against transformers, in float64, for several families.

Most tests draft with an oracle that knows the continuation and errs at random places (tests/oracle.py), so that blocks
are accepted in part, in whole and not at all. The law of sampled answers is in test_sampled_answers.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CONTEXT, FAMILIES, PLANS, Case, Fickle, Oracle, check, engine_of, serve, submit, texts_of, tiny

from draft.heads import DraftHead
from draft.heads.registry import ARCHITECTURES
from draft.target import Target
from serving.engine import Completion, Engine, SamplingParams, Speculation
from serving.engine.acceptance import Plan
from serving.engine.noise import choose
from serving.engine.proposers import HeadProposer, HeadState
from serving.engine.runner import HeadRunner
from serving.engine.sampling import Processor

ALL = ["llama", *FAMILIES]
CHUNKS = [1, 3, 16, 128]
LONGEST = {1: 6, 3: 17}  # prompt for the small chunks: each is a pass
# name -> what is drafted: the engine's options, and for automatic mode a controller that changes its mind at every step
MODES: dict[str, dict[str, Any]] = {
    "off": {"speculation": "off"},
    "chain": {"speculation": "chain"},
    "tree of 4": {"speculation": "tree", "tree_size": 4, "speculation_length": 3},
    "tree of 16": {"speculation": "tree", "tree_size": 16, "speculation_length": 5},
    "tree of 32": {"speculation": "tree", "tree_size": 32},
    "auto": {"speculation": "auto"},
}


def build(family: str, mode: str, *, errors: float = 0.3, seed: int = 0, **options: Any) -> Engine:
    """An engine beside an oracle, which `off` leaves out."""
    if mode == "off":
        return Engine(tiny(family), **MODES[mode], **options)
    fickle = Fickle(PLANS, seed) if mode == "auto" else None
    return engine_of(tiny(family), Oracle(tiny(family), errors, seed), fickle, **MODES[mode], **options)


# greedy answers


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_are_those_of_transformers(family: str, mode: str) -> None:
    """K from 0 to 8, or a tree, for requests of many lengths at once: with an oracle and with a head."""
    engine = build(family, mode, max_batch=5)
    texts = texts_of(engine.target)
    cases = [
        Case.greedy(text, text.written + 2 * k, params(12), speculation=Speculation(num_tokens=k))
        for k, text in zip(range(9), itertools.cycle(texts), strict=False)
    ]
    completions = serve(engine, cases)
    for case, completion in zip(cases, completions, strict=True):
        check(engine.target, case, completion)
    accepted, drafted = (sum(getattr(c.stats, name) for c in completions) for name in ("accepted", "drafted"))
    assert (0 < accepted < drafted) == (mode != "off") and (drafted > 0) == (mode != "off")
    for head in heads_for(family):
        with_head = Engine(engine.target, head, max_batch=5, **{"speculation_length": 8, **MODES[mode]})
        for case, completion in zip(cases, serve(with_head, cases), strict=True):
            check(engine.target, case, completion)


def heads_for(family: str) -> list[DraftHead]:
    """Heads of all architectures, or of one where there are many other families."""
    return [
        make_tiny_head(tiny(family), architecture=name)
        for name in (ARCHITECTURES if family in (ALL[0], ALL[-1]) else ["eagle3"])
    ]


def params(count: int, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": count, "ignore_eos": True, "logprobs": 2, **fields})


@pytest.mark.parametrize("family", ALL)
def test_an_eos_token_in_mid_block_ends_the_answer_there(family: str) -> None:
    engine = build(family, "chain", errors=0.0, max_batch=4)
    ends = engine.target.eos_token_ids
    cases, inside = list[Case](), 0
    for text in texts_of(engine.target):
        for start in range(text.written, CONTEXT - 8):
            if text.tokens[start] not in ends and ends & set(text.tokens[start : start + 8]) and len(cases) < 40:
                cases.append(Case.greedy(text, start, params(8, ignore_eos=False)))
    for case, completion in zip(cases, serve(engine, cases), strict=True):
        check(engine.target, case, completion)
        assert completion.finish_reason == "eos_token"
        inside += completion.tokens[-1].accepted_position not in (None, 7)
    assert inside > 2  # it was drafted, and others behind it


def test_a_stop_string_across_accepted_tokens_ends_the_answer_there() -> None:
    engine = build("llama", "chain", errors=0.0, max_batch=4)
    cases = []
    for text, start, keep in itertools.product(texts_of(engine.target), range(30, 50, 4), (True, False)):
        answer = engine.target.decode(text.tokens[start : start + 9])
        for where in (2, 5):
            stop = answer[where : where + 3]
            if len(stop) == 3 and "\N{REPLACEMENT CHARACTER}" not in stop:
                cases.append(Case.greedy(text, start, params(9, stop=(stop,), keep_stop=keep)))
    across = 0
    for case, completion in zip(cases, serve(engine, cases), strict=True):
        check(engine.target, case, completion)
        assert completion.finish_reason == "stop_sequence"
        assert completion.text.endswith(case.params.stop) == case.params.keep_stop
        drafted = [token.accepted_position is not None for token in completion.tokens]
        across += case.params.keep_stop and len(drafted) > 2 and all(drafted[-2:])
    assert len(cases) > 30 and across > 10


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("mode", ["chain", "tree of 32", "auto"])
def test_the_last_positions_of_the_context(family: str, mode: str) -> None:
    engine = build(family, mode, errors=0.1, max_batch=3)
    text, other = texts_of(engine.target)[:2]
    cases = [Case.greedy(each, CONTEXT - new, params(new)) for new in (1, 2, 3, 9, 20) for each in (text, other)]
    for case, completion in zip(cases, serve(engine, cases), strict=True):
        check(engine.target, case, completion)
        assert len(completion.token_ids) == case.params.max_new_tokens
    for head in heads_for(family):
        with_head = Engine(engine.target, head, max_batch=3, **{"speculation_length": 8, **MODES[mode]})
        for case, completion in zip(cases, serve(with_head, cases), strict=True):
            check(engine.target, case, completion)


def test_a_drafted_token_beyond_the_limit_is_never_verified() -> None:
    engine = build("llama", "chain", errors=0.0)
    text = texts_of(engine.target)[0]
    cases = [Case.greedy(text, 10, params(new)) for new in (1, 2, 3, 8)]
    for case, completion in zip(cases, serve(engine, cases), strict=True):
        new = case.params.max_new_tokens
        assert completion.stats.drafted == max(0, new - 2)
        assert completion.stats.verifications == min(1, new - 1)


def test_float32_differs_only_where_two_tokens_are_as_good_as_equal() -> None:
    target = make_tiny_target(dtype=torch.float32, max_length=CONTEXT)
    head = make_tiny_head(target)
    plain = Engine(target, speculation="off", max_batch=1, mode="eager")
    prompts = [text.tokens[:length] for text in texts_of(tiny("llama"))[:4] for length in (30, 37)]
    expected = plain.generate(prompts, params(20))
    different = 0
    for mode in ("chain", "tree of 16"):
        for one, other in zip(
            Engine(target, head, max_batch=8, mode="eager", **MODES[mode]).generate(prompts, params(20)),
            expected,
            strict=True,
        ):
            pairs = zip(one.token_ids, other.tokens, strict=True)
            first = next((token for token_id, token in pairs if token_id != token.id), None)
            different += first is not None
            if first is not None:
                assert first.top is not None and first.top[0][1] - first.top[1][1] < 1e-4
    assert different <= 1


# sampled answers: a seed gives the same tokens, whoever shares the batch and whatever is drafted

PROCESSING: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "hot, top-k, penalties": {
        "temperature": 1.7,
        "top_k": 20,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": -0.3,
    },
    "top-p, min-p, bias": {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02, "logit_bias": {5: 4.0, 70: -3.0, 200: 2.5}},
    "min tokens": {"temperature": 1.0, "min_new_tokens": 6, "ignore_eos": False, "stop_ids": (9, 33, 80)},
    "greedy with penalties": {
        "temperature": 0.0,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.8,
        "logit_bias": {9: 1.0},
    },
    "greedy with min tokens": {"temperature": 0.0, "min_new_tokens": 5, "ignore_eos": False},
}
PROMPTS = [[7], list(range(90, 107)), list(range(3, 40))]


@cache
def plainly(family: str, processing: str, prompt: int) -> Completion:
    """Alone, without speculation, the prompt in one piece."""
    engine = Engine(tiny(family), speculation="off", max_batch=1)
    wishes = params(14, seed=prompt + 2**40, **PROCESSING[processing])
    return engine.generate([PROMPTS[prompt]], wishes)[0]


def sampled_case(family: str, processing: str, prompt: int, **rest: Any) -> Case:
    plain = plainly(family, processing, prompt)
    wishes = params(14, seed=plain.seed or 2**40, **PROCESSING[processing])
    return Case(PROMPTS[prompt], wishes, plain.token_ids, **rest)


def same(ours: Completion, plain: Completion) -> None:
    assert ours.token_ids == plain.token_ids
    assert (ours.text, ours.finish_reason, ours.seed) == (plain.text, plain.finish_reason, plain.seed)
    assert [token.text for token in ours.tokens] == [token.text for token in plain.tokens]
    for one, other in zip(ours.tokens, plain.tokens, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
        assert [pair for each in one.top or [] for pair in each] == pytest.approx(
            [pair for each in other.top or [] for pair in each], abs=1e-6
        )


@pytest.mark.parametrize("processing", PROCESSING)
def test_plain_answers_are_the_argmax_of_log_p_and_noise(processing: str) -> None:
    """By the definition, from one pass of transformers over the whole."""
    target = tiny("llama")
    for prompt in range(len(PROMPTS)):
        plain = plainly("llama", processing, prompt)
        wishes = params(14, seed=plain.seed or 2**40, **PROCESSING[processing])
        with torch.inference_mode():
            logits = target.model(torch.tensor([plain.prompt_ids + plain.token_ids])).logits[
                0, len(plain.prompt_ids) - 1 :
            ]
        processor = Processor(wishes, plain.prompt_ids, target.vocab_size, target.eos_token_ids)
        for place, token in enumerate(plain.tokens):
            scores = processor.adjust(logits[place : place + 1], [[]])
            if wishes.temperature > 0:
                position = len(plain.prompt_ids) + place
                assert token.id == choose(processor.warp(scores), plain.seed or 0, [position]).item()
            else:
                assert token.id == scores.argmax().item()
            assert token.logprob == pytest.approx(logits[place].log_softmax(-1)[token.id].item(), abs=1e-9)
            processor.append(token.id)


@pytest.mark.parametrize(
    ("family", "mode"),
    [*(("llama", mode) for mode in MODES), (ALL[-1], "chain"), (ALL[-1], "tree of 16"), (ALL[-1], "auto")],
)
def test_a_seed_gives_the_same_answer_whatever_is_drafted(family: str, mode: str) -> None:
    names = list(itertools.product(PROCESSING, range(len(PROMPTS))))
    cases = [
        sampled_case(
            family, processing, prompt, arrives=index % 5, speculation=Speculation(num_tokens=(None, 1, 3)[index % 3])
        )
        for index, (processing, prompt) in enumerate(names)
    ]
    engine = build(family, mode, max_batch=7, prefill_chunk=16)
    options = {"speculation_length": 8, **MODES[mode]}
    with_heads = [Engine(tiny(family), head, max_batch=4, **options) for head in heads_for(family)]
    for each in (engine, *with_heads):
        completions = serve(each, cases)
        for name, completion in zip(names, completions, strict=True):
            same(completion, plainly(family, *name))
        if mode not in ("off", "auto"):
            # the shared noise makes even a random head agree now and then
            assert sum(c.stats.accepted for c in completions) > 0


def test_a_drawn_seed_is_reported_and_repeats_the_answer() -> None:
    engine = Engine(tiny("llama"), make_tiny_head(tiny("llama")), speculation="chain")
    for rule in ("shared-noise", "rejection"):
        wishes = params(10, temperature=1.5)
        first, second = engine.generate([[50]] * 2, wishes, Speculation(rule=rule))
        assert first.seed is not None and second.seed is not None and first.seed != second.seed
        assert first.token_ids != second.token_ids
        again = engine.generate([[60], [50]], replace(wishes, seed=first.seed), Speculation(rule=rule))[1]
        assert again.token_ids == first.token_ids


# everything at once


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
        text, length, params(count, **fields), speculation=draw(wishes()), arrives=draw(st.integers(0, 8))
    )


def wishes() -> st.SearchStrategy[Speculation]:
    tokens = st.none() | st.integers(0, 8)
    return st.builds(Speculation, st.sampled_from([True, True, True, False]), tokens, st.just(None))


@st.composite
def sampled_cases(draw: st.DrawFn, family: str, chunk: int) -> Case:
    short = [index for index, prompt in enumerate(PROMPTS) if len(prompt) <= LONGEST.get(chunk, CONTEXT)]
    processing, prompt = draw(st.sampled_from(list(PROCESSING))), draw(st.sampled_from(short))
    return sampled_case(family, processing, prompt, speculation=draw(wishes()), arrives=draw(st.integers(0, 8)))


@pytest.mark.parametrize("family", ALL)
@given(data=st.data())
@settings(max_examples=14, deadline=None)
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


# what the caches hold


@torch.inference_mode()
def fresh(target: Target, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [heads, tokens, width] of each layer, after reading the tokens in one piece."""
    engine = Engine(target, max_batch=1, prefill_chunk=CONTEXT, max_length=CONTEXT, speculation="off")
    engine.submit(ids, SamplingParams(CONTEXT - len(ids)))
    engine.step()
    cache = engine.models.runner.cache
    return [(keys[0, :, : len(ids)], values[0, :, : len(ids)]) for keys, values in cache.layers]


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("mode", ["chain", "tree of 4", "tree of 32", "auto"])
def test_the_cache_after_rollbacks_is_that_of_a_fresh_pass(family: str, mode: str) -> None:
    engine = build(family, mode, errors=0.2, max_batch=3, prefill_chunk=16)
    cases = [Case.greedy(text, text.written, params(40)) for text in texts_of(engine.target)[3:6]]
    for case in cases:
        submit(engine, case)
    engine.step()
    while min(len(row.sequence.tokens) for row in engine._rows) < 8:
        engine.step()
    cache = engine.models.runner.cache
    for row in engine._rows:
        ids = (row.sequence.prompt_ids + [token.id for token in row.sequence.tokens])[:-1]
        assert cache.lengths[row.slot] == len(ids)
        for (keys, values), (fresh_keys, fresh_values) in zip(cache.layers, fresh(engine.target, ids), strict=True):
            torch.testing.assert_close(keys[row.slot, :, : len(ids)], fresh_keys, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(values[row.slot, :, : len(ids)], fresh_values, rtol=1e-12, atol=1e-12)
    assert engine._rows and all(row.stats.accepted for row in engine._rows)


@pytest.mark.parametrize("family", ["llama", "gemma2, windows of 5 in half of the layers, bounded scores"])
@torch.inference_mode()
def test_the_head_catches_up_on_all_that_it_missed(family: str) -> None:
    """Plans change at every step; what the head knows is what it knows after reading all true states at once."""
    target, head = tiny(family), make_tiny_head(tiny(family))
    engine = Engine(target, head, max_batch=3, prefill_chunk=5, speculation_length=8, tree_size=32)
    engine.controller = engine._decoder.controller = Fickle([Plan.chain(2), Plan.chain(5), Plan(3, 16)], seed=1)
    prompts = [[9, 8], [50, 60, 70, 80, 90, 100], list(range(3, 20))]
    for prompt in prompts:
        engine.submit(prompt, params(40, temperature=1.5, seed=4))
    looked, pauses = 0, 0
    while engine.step():
        for row in engine._rows:
            state = row.drafting
            assert isinstance(state, HeadState) and state.slot is not None
            pauses += state.backlog > 2
            read = engine.models.proposer.runner.cache.lengths[state.slot]  # type: ignore[union-attr]
            known = row.sequence.prompt_ids[: row.read + 1] + [token.id for token in row.sequence.tokens]
            assert read + state.backlog == (row.read if row.reading else len(known) - 1)
            if read and looked < 60:
                looked += 1
                _looks_like_a_fresh_head(engine, state, known, read)
    assert looked == 60 and pauses > 5


def _looks_like_a_fresh_head(engine: Engine, state: HeadState, ids: list[int], read: int) -> None:
    target, proposer = engine.target, engine.models.proposer
    assert isinstance(proposer, HeadProposer)
    cache = proposer.runner.cache
    states = target.forward(torch.tensor([ids[:read]]), layers=proposer.layers).auxiliary
    assert states is not None
    other = HeadProposer(
        HeadRunner(target, proposer.runner.head, slots=1, capacity=CONTEXT, kernel=proposer.runner.layer.kernel),
        proposer.layers,
    )
    new = other.join()
    other.observe(new, ids[1 : read + 1], states[0])
    assert other.catch_up([new]) == read
    for (ours,), (theirs,) in zip(zip(cache.layers[0]), zip(other.runner.cache.layers[0]), strict=True):
        torch.testing.assert_close(ours[state.slot, :, :read], theirs[0, :, :read], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.hidden, new.hidden, rtol=1e-9, atol=1e-9)
