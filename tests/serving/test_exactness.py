"""The answers are the target's own, whatever is drafted: against transformers, in float64, for several families.

Most tests draft with an oracle that knows the continuation and errs at random places (tests/oracle.py), so that blocks
are accepted in part, in whole and not at all. The law of sampled answers is in test_sampled_answers.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from exactness import ALL, MODES, build, heads_for, params
from oracle import Case, check, serve
from tiny_targets import CONTEXT, texts_of, tiny

from serving.engine import Engine, Speculation


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
