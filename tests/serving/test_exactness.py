"""The answers are the target's own, whatever is drafted: against transformers, in float64, for several families.

Most tests draft with an oracle that knows the continuation and errs at random places (tests/oracle.py), so that blocks
are accepted in part, in whole and not at all. The law of sampled answers is in test_sampled_answers.py.
"""

import itertools
from typing import Any

import pytest
import torch
from conftest import make_tiny_head
from exactness import ALL, MODES, PROCESSING, PROMPTS, build, engines, params, plainly, sampled_case
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, all_free, serve, submit
from tiny_targets import CONTEXT, texts_of, tiny

from draft.target import Target
from serving.engine import Completion, Engine, SamplingParams, Speculation
from serving.engine.noise import choose
from serving.engine.sampling import Processor


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_are_those_of_transformers(family, mode):
    """K from 0 to 8, or a tree, for requests of many lengths at once: with an oracle and with a head."""
    beside_oracle, *with_heads = engines(family, mode, max_batch=5)
    texts = itertools.cycle(texts_of(beside_oracle.target))
    cases = [
        Case.greedy(text, text.written + 2 * k, params(12), speculation=Speculation(num_tokens=k))
        for k, text in zip(range(9), texts, strict=False)
    ]
    completions = serve(beside_oracle, cases)
    accepted, drafted = (sum(getattr(c.stats, name) for c in completions) for name in ("accepted", "drafted"))
    assert (0 < accepted < drafted) == (mode != "off") and (drafted > 0) == (mode != "off")
    for engine in with_heads:
        serve(engine, cases)


@pytest.mark.parametrize("family", ALL)
def test_an_eos_token_in_mid_block_ends_the_answer_there(family):
    engine = build(family, "chain", errors=0.0, max_batch=4)
    ends = engine.target.eos_token_ids
    cases, inside = list[Case](), 0
    for text in texts_of(engine.target):
        for start in range(text.written, CONTEXT - 8):
            if text.tokens[start] not in ends and ends & set(text.tokens[start : start + 8]) and len(cases) < 40:
                cases.append(Case.greedy(text, start, params(8, ignore_eos=False)))
    for completion in serve(engine, cases):
        assert completion.finish_reason == "eos_token"
        inside += completion.tokens[-1].accepted_position not in (None, 7)
    assert inside > 2  # it was drafted, and others behind it


def test_a_stop_string_across_accepted_tokens_ends_the_answer_there():
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
        assert completion.finish_reason == "stop_sequence"
        assert completion.text.endswith(case.params.stop) == case.params.keep_stop
        drafted = [token.accepted_position is not None for token in completion.tokens]
        across += case.params.keep_stop and len(drafted) > 2 and all(drafted[-2:])
    assert len(cases) > 30 and across > 10


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("mode", ["chain", "tree of 32", "auto"])
def test_the_last_positions_of_the_context(family, mode):
    cases = [
        Case.greedy(text, CONTEXT - new, params(new)) for new in (1, 2, 3, 9, 20) for text in texts_of(tiny(family))[:2]
    ]
    for engine in engines(family, mode, errors=0.1, max_batch=3):
        for case, completion in zip(cases, serve(engine, cases), strict=True):
            assert len(completion.token_ids) == case.params.max_new_tokens


def test_a_drafted_token_beyond_the_limit_is_never_verified():
    engine = build("llama", "chain", errors=0.0)
    text = texts_of(engine.target)[0]
    cases = [Case.greedy(text, 10, params(new)) for new in (1, 2, 3, 8)]
    for case, completion in zip(cases, serve(engine, cases), strict=True):
        new = case.params.max_new_tokens
        assert completion.stats.drafted == max(0, new - 2)
        assert completion.stats.verifications == min(1, new - 1)


# the cache after rejected drafts and changes of plans


@torch.inference_mode()
def fresh(target: Target, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [heads, tokens, width] of each layer, after reading the tokens in one piece."""
    engine = Engine(target, max_batch=1, prefill_chunk=CONTEXT, max_length=CONTEXT, speculation="off")
    engine.submit(ids, SamplingParams(CONTEXT - len(ids)))
    engine.step()
    cache = engine.models.runner.cache
    # the first blocks, which it may have given back already
    return [(keys[:, : len(ids)], values[:, : len(ids)]) for keys, values in cache.layers]


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("mode", ["chain", "tree of 4", "tree of 32", "auto"])
def test_the_cache_after_rollbacks_is_that_of_a_fresh_pass(family, mode):
    engine = build(family, mode, errors=0.2, max_batch=3, prefill_chunk=16)
    cases = [Case.greedy(text, text.written, params(40)) for text in texts_of(engine.target)[3:6]]
    for case in cases:
        submit(engine, case)
    engine.step()
    while min(len(row.answer.tokens) for row in engine._active) < 8:
        engine.step()
    cache = engine.models.runner.cache
    for row in engine._active:
        ids = (row.answer.prompt_ids + [token.id for token in row.answer.tokens])[:-1]
        assert cache.lengths[row.slot] == len(ids)
        places = cache.places(row.slot, range(len(ids)))
        for (keys, values), (fresh_keys, fresh_values) in zip(cache.layers, fresh(engine.target, ids), strict=True):
            torch.testing.assert_close(keys[:, places], fresh_keys, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(values[:, places], fresh_values, rtol=1e-12, atol=1e-12)
    assert engine._active and all(row.stats.accepted for row in engine._active)


# drawn at random: requests of all lengths, ends and options, together in one batch

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
        stop_id = draw(st.sampled_from(text.tokens[length : length + count]))
        fields |= {"stop_ids": (stop_id,), "keep_stop": draw(st.booleans())}
    rest = {"speculation": draw(options()), "arrives": draw(st.integers(0, 8))}
    return Case.greedy(text, length, params(count, **fields), **rest)


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
@settings(max_examples=6)
def test_anything_at_once(family, data):
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
    serve(engine, cases)
    assert all_free(engine.models.runner.cache)
    assert not getattr(engine.proposer, "present", [])


# seeds: the same tokens, whoever shares the batch and whatever is drafted


def same(ours: Completion, plain: Completion) -> None:
    assert ours.seed == plain.seed
    for one, other in zip(ours.tokens, plain.tokens, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
        assert dict(one.top or []) == pytest.approx(dict(other.top or []), abs=1e-6)


@pytest.mark.parametrize("processing", PROCESSING)
def test_plain_answers_are_the_argmax_of_log_p_and_noise(processing):
    """By the definition, from one pass of transformers over the whole."""
    target = tiny("llama")
    for prompt in range(len(PROMPTS)):
        plain = plainly("llama", processing, prompt)
        options = params(14, seed=plain.seed or 2**40, **PROCESSING[processing])
        with torch.inference_mode():
            rows = target.model(torch.tensor([plain.prompt_ids + plain.token_ids])).logits[0]
            logits = rows[len(plain.prompt_ids) - 1 :]
        processor = Processor(options, plain.prompt_ids, target.vocab_size, target.eos_token_ids)
        for place, token in enumerate(plain.tokens):
            scores = processor.adjust(logits[place : place + 1], [[]])
            if options.temperature > 0:
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
def test_a_seed_gives_the_same_answer_whatever_is_drafted(family, mode):
    names = list(itertools.product(PROCESSING, range(len(PROMPTS))))
    lengths = itertools.cycle(Speculation(num_tokens=count) for count in (None, 1, 3))
    cases = [
        sampled_case(family, *name, arrives=index % 5, speculation=speculation)
        for index, (name, speculation) in enumerate(zip(names, lengths, strict=False))
    ]
    for engine in engines(family, mode, max_batch=7, prefill_chunk=16):
        completions = serve(engine, cases)
        for name, completion in zip(names, completions, strict=True):
            same(completion, plainly(family, *name))
        if mode not in ("off", "auto"):
            # the shared noise makes even a random head agree now and then
            assert sum(c.stats.accepted for c in completions) > 0


def test_a_drawn_seed_is_reported_and_repeats_the_answer():
    engine = Engine(tiny("llama"), make_tiny_head(tiny("llama")), speculation="chain")
    for rule in ("shared-noise", "rejection"):
        options = params(10, temperature=1.5)
        first, second = engine.generate([[50]] * 2, options, Speculation(rule=rule))
        assert first.seed is not None and second.seed is not None and first.seed != second.seed
        assert first.token_ids != second.token_ids
        seeded = options.model_copy(update={"seed": first.seed})
        again = engine.generate([[60], [50]], seeded, Speculation(rule=rule))[1]
        assert again.token_ids == first.token_ids
