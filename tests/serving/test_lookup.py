"""Drafts that are copied: the automaton against a search of everything, and answers that must not change by them."""

import itertools
import sys
from typing import Any

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from exactness import ALL, PROCESSING, PROMPTS, params, plainly, sampled_case
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import COPIES, Case, Fickle, Oracle, all_free, engine_of, serve
from tiny_targets import texts_of, tiny

from draft.heads.registry import ARCHITECTURES
from serving import cli
from serving.engine import Engine, SamplingParams, Speculation
from serving.engine.estimates import HEAD, DraftPlan
from serving.engine.lookup import _REFRESHED, LOOKUP_LENGTH, LookupProposer, Match, SuffixAutomaton
from serving.engine.planner import Fixed
from serving.engine.verification import DraftTree

TARGET = tiny("llama")


def searched(tokens: list[int], before: int) -> tuple[int, int]:
    """The longest suffix that has occurred within the first `before` tokens, and where its latest occurrence ends."""
    for length in range(len(tokens) - 1, 0, -1):
        for end in range(min(before, len(tokens) - 1), length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                return length, end
    return 0, 0


def going_on(tokens: list[int], end: int, count: int) -> list[int]:
    """Copy token by token, the copied ones included."""
    grown = list(tokens)
    for place in range(end, end + count):
        grown.append(grown[place])
    return grown[len(tokens) :]


def texts(longest: int) -> st.SearchStrategy[list[int]]:
    return st.integers(1, 6).flatmap(lambda vocab: st.lists(st.integers(0, vocab), max_size=longest))


@given(tokens=texts(60), following=texts(5), count=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_the_longest_suffix_and_its_latest_occurrence_are_found_after_every_token(tokens, following, count):
    automaton = SuffixAutomaton()
    for place, token in enumerate(tokens):
        automaton.append(token)
        length, end = searched(tokens[: place + 1], place)
        assert automaton.match.length == length
        if length:
            found = automaton.match.end  # the latest, but in runs that are longer than what is brought up to date
            assert found == end or place > _REFRESHED
            assert tokens[found - length : found] == tokens[place + 1 - length : place + 1] and found <= place
            assert automaton.copy(automaton.match, count) == going_on(tokens[: place + 1], found, count)
    states, match = len(automaton._length), automaton.match
    after = automaton.match_after(following)
    if following:
        whole = tokens + following
        assert after.length == searched(whole, len(tokens))[0]
        if after.length:
            assert whole[after.end - after.length : after.end] == whole[-after.length :]
            assert automaton.copy(after, count, following) == going_on(whole, after.end, count)
    else:
        assert after == match
    # looking changes nothing, and memory grows with the tokens
    assert (len(automaton._length), automaton.match) == (states, match) and states <= 2 * len(tokens) + 1


def test_a_proposer_copies_behind_the_head_and_knows_what_it_would_have_copied():
    proposer = LookupProposer()
    assert proposer.match == Match(0, 0) and proposer.continues([5, 6]) == 0
    proposer.observe([1, 2, 3, 4, 5, 9, 1, 2])
    assert proposer.match == Match(2, 2)
    assert proposer.propose(3) == DraftTree.chain([3, 4, 5], copied=3)
    assert [proposer.continues(ids) for ids in ([3, 4, 9], [3], [4, 3], [3, 4, 5, 9, 1, 2, 3])] == [2, 1, 0, 7]
    chain = DraftTree.chain([3, 4], confidences=[0.9, 0.8])
    match = proposer.match_after(chain)
    tree = proposer.extend(chain, match, 2)
    assert match == Match(4, 4) and tree.tokens == [3, 4, 5, 9] and (tree.copied, tree.drawn) == (2, 2)
    assert tree.confidences == [0.9, 0.8]
    assert proposer.match_after(DraftTree.chain([7])).length == 0


def test_nothing_is_copied_behind_a_token_that_ends_the_answer():
    proposer = LookupProposer({5, 9})
    proposer.observe([1, 2, 3, 4, 5, 6, 9, 1, 2])
    assert proposer.propose(2) == DraftTree.chain([3, 4], copied=2)
    assert proposer.propose(6) == DraftTree.chain([3, 4, 5], copied=3)
    for chain, whole in (([3], [3, 4, 5]), ([3, 4], [3, 4, 5]), ([3, 4, 5], [3, 4, 5]), ([6], [6, 9]), ([9], [9])):
        tree = DraftTree.chain(chain)
        assert proposer.extend(tree, proposer.match_after(tree), 4) == DraftTree.chain(
            whole, copied=len(whole) - len(chain)
        )


def test_looking_behind_a_run_of_one_token_takes_no_longer_the_longer_it_is(monkeypatch):
    automaton = SuffixAutomaton()
    for _ in range(2000):
        automaton.append(7)
    calls, inner = [], automaton._follow
    monkeypatch.setattr(automaton, "_follow", lambda *edge: calls.append(edge) or inner(*edge))
    assert automaton.match_after([8]).length == 0 and len(calls) < 100
    assert automaton.match_after([7, 7]).length == 2000


# engines


def counted(completions: Any) -> tuple[int, int]:
    """Copied tokens, drafted and accepted."""
    sources = [completion.stats.by_source["lookup"] for completion in completions]
    return sum(each["drafted"] for each in sources), sum(each["accepted"] for each in sources)


@pytest.mark.parametrize("family", ALL)
def test_greedy_answers_with_copies_are_those_of_transformers(family):
    """Copies alone, behind an oracle that errs, and beside requests that draft nothing."""
    target = tiny(family)
    engine = engine_of(target, Oracle(target, 0.3), Fickle(COPIES, 1), speculation="auto", max_batch=4, prefill_chunk=7)
    limits = itertools.cycle(Speculation(num_tokens=count) for count in (None, 20, 3, 0))
    cases = [
        Case.greedy(text, text.written + 3 * index, params(30), speculation=limit, arrives=index)
        for index, (text, limit) in enumerate(zip(texts_of(target), limits, strict=False))
        if text.written + 3 * index + 30 <= len(text.tokens)
    ]
    drafted, accepted = counted(serve(engine, cases))
    assert 0 < accepted < drafted
    assert all_free(engine.models.runner.cache)


@pytest.mark.parametrize("head", [None, *ARCHITECTURES])
def test_a_mix_of_requests_has_the_answers_of_plain_decoding(head):
    """Greedy and seeded, with every processing, planned as they are served."""
    drafting = None if head is None else make_tiny_head(TARGET, architecture=head)
    engine = Engine(TARGET, drafting, max_batch=5, prefill_chunk=16)
    observe = engine.controller.observe_target  # of passes whose width costs little, on any machine

    def observe_cheap(tokens: int, seconds: float, *, ignore: bool = False) -> None:
        observe(tokens, 1.0 + 0.001 * tokens, ignore=ignore)

    engine.controller.observe_target = observe_cheap
    names = list(itertools.product(PROCESSING, range(len(PROMPTS))))
    cases = [sampled_case("llama", *name, arrives=index % 5) for index, name in enumerate(names)]
    texts = [Case.greedy(text, text.written, params(40)) for text in texts_of(TARGET)[:4]]
    completions = serve(engine, [*cases, *texts])
    for name, completion in zip(names, completions, strict=False):
        assert completion.token_ids == plainly("llama", *name).token_ids
    assert engine.longest_draft == LOOKUP_LENGTH and counted(completions)[0] > 0
    for completion in completions:
        for token in completion.tokens:
            assert not token.copied or token.accepted_position is not None or token.rejected is not None


@pytest.mark.parametrize("rule", ["shared-noise", "rejection"])
def test_without_lookup_nothing_is_copied_and_fixed_modes_are_the_heads_alone(rule):
    head = make_tiny_head(TARGET)
    prompt, options = [5, 6, 7, 8] * 6, SamplingParams(24, temperature=0.7, seed=1, ignore_eos=True)
    kinds: list[dict[str, Any]] = [{"lookup": False}, {"speculation": "chain"}, {"speculation": "tree"}]
    for kind in kinds:
        engine = Engine(TARGET, head, rule=rule, **kind)
        assert not engine.lookup and engine.longest_draft == 5
        assert counted(engine.generate([prompt] * 2, options)) == (0, 0)
    assert Engine(TARGET, lookup=False).generate([prompt], options)[0].stats.drafted == 0
    assert Engine(TARGET, speculation="off").longest_draft == Engine(TARGET, lookup=False).longest_draft == 0


def test_compiled_answers_with_copies_are_those_of_plain_decoding():
    """In float32: our kernels make a row independent of those beside it."""
    target = make_tiny_target(dtype=torch.float32, max_length=128)
    plain = Engine(target, mode="compiled", speculation="off", max_batch=1)
    copying = Engine(target, make_tiny_head(target), mode="compiled", max_batch=4)
    copying.controller = copying._decoder.controller = Fickle(COPIES, 2)
    prompts = [[5, 6, 7, 8] * 5, list(range(40, 60)) * 2, [9] * 12]
    options = [SamplingParams(30, ignore_eos=True, temperature=t, seed=s) for t, s in ((0.0, None), (1.0, 4), (0.7, 5))]
    expected = [plain.generate([prompt], each)[0].token_ids for prompt, each in zip(prompts, options, strict=True)]
    answers = copying.generate(prompts, options)
    assert [answer.token_ids for answer in answers] == expected and counted(answers)[1] > 0


def test_copies_behind_a_chain_are_part_of_the_plan_that_is_shown():
    target = make_tiny_target(max_length=256)
    head = make_tiny_head(target)
    engine = Engine(target, head, speculation="chain", max_batch=2)
    engine.lookup = True
    everything = head.vocabulary.tolist()  # so that whatever is drafted has occurred before
    engine.controller.tail = lambda row, chain, match, *, samples: min(4, row.room - len(chain)) * (match > 0)
    answers = engine.generate([everything, everything[::-1]], SamplingParams(30, ignore_eos=True))
    steps = [step for answer in answers for step in answer.stats.steps]
    shown = engine.controller.stats()["steps"]
    longer = {name: count for name, count in shown.items() if name.endswith(" + lookup")}
    assert sum(longer.values()) == sum(step.copied > 0 for step in steps) > 0
    assert sum(shown.values()) == len(steps) and set(longer) <= {f"chain {length} + lookup" for length in range(1, 6)}


@pytest.mark.parametrize("ends", ["eos", "stop", None])
def test_copies_of_an_engine_end_with_the_answer(ends):
    target = make_tiny_target(max_length=128)
    target.eos_token_ids = frozenset({7} if ends == "eos" else {})
    engine = Engine(target, max_batch=1)
    engine.controller = engine._decoder.controller = Fixed(DraftPlan.lookup(9))
    proposed: list[list[int]] = []

    def verify(parts: Any, logits: torch.Tensor, verify: Any = engine._decoder._verify) -> Any:
        proposed.extend(part.tree.tokens for part in parts)
        return verify(parts, logits)

    engine._decoder._verify = verify  # type: ignore[method-assign]
    always_6: dict[str, Any] = {"logit_bias": {6: 100.0}}
    options = SamplingParams(40, ignore_eos=ends is None, stop_ids=(7,) if ends == "stop" else (), **always_6)
    engine.generate([[5, 6, 7, 8] * 6 + [5]], options)
    assert proposed[1] == ([7] if ends else [7, 8, 5, 6, 7, 8, 5, 6, 7])  # after the prompt's step


def test_what_is_learned_of_copies_says_nothing_of_the_head():
    """Also where nothing matches: the prompt and the first tokens of the answer are new."""
    engine = Engine(TARGET, max_batch=2)
    before = engine.controller.acceptance.rate(HEAD, 0)
    engine.generate([[index] for index in range(40, 52)], SamplingParams(20, ignore_eos=True))
    rates = [engine.controller.acceptance.rate(match, 0) for match in range(1, 9)]
    assert engine.controller.acceptance.rate(HEAD, 0) == before
    assert rates != [match / (match + 2) for match in range(1, 9)]


def test_the_servers_option(folders, monkeypatch):
    """Without a head the server speculates all the same, unless it is told not to."""
    monkeypatch.setattr(cli, "serve_until_stopped", lambda app, load, *_: loaded.append(load()))
    loaded: list[Engine] = []
    for words in ([], ["--no-lookup"]):
        options = ["--port", "0", "--no-warm-up", "--target", str(folders / "my-target"), "--dtype", "float64"]
        monkeypatch.setattr(sys, "argv", ["draft-serve", *options, *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    assert [engine.lookup for engine in loaded] == [True, False]
    answers = [engine.generate([[5, 6, 7, 8] * 6], SamplingParams(40, ignore_eos=True))[0] for engine in loaded]
    assert answers[0].stats.drafted > 0 == answers[1].stats.drafted
    assert answers[0].token_ids == answers[1].token_ids
