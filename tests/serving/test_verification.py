"""The verification rules: their output law, enumerated exactly, and by drawing; each with controls that must fail."""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serving.engine.sampling import warp
from serving.engine.sequence import SamplingParams
from serving.engine.verification import (
    RULES,
    Greedy,
    Proposal,
    Rule,
    acceptance_probability,
    make_rule,
    residual,
    verify_rejection,
    verify_shared_noise,
)

VOCAB = 4
Tables = dict[tuple[int, ...], Tensor]  # prefix -> logits [VOCAB] of what follows


def random_tables(depth: int, seed: int, spread: float = 1.5) -> Tables:
    generator = torch.Generator().manual_seed(seed)
    return {
        prefix: torch.randn(VOCAB, dtype=torch.float64, generator=generator) * spread
        for length in range(depth + 1)
        for prefix in itertools.product(range(VOCAB), repeat=length)
    }


def probabilities(tables: Tables, temperature: float, top_k: int = 0) -> Tables:
    params = SamplingParams(temperature=temperature, top_k=top_k)
    return {prefix: warp(logits, params).exp() for prefix, logits in tables.items()}


def joint(p: Tables, prefix: tuple[int, ...]) -> float:
    return math.prod(p[prefix[:i]][token].item() for i, token in enumerate(prefix))


def law_of_chain(
    p: Tables,
    q: Tables,
    k: int,
    used_p: Tables,
    used_q: Tables,
    leftover: Callable[[Tensor, Tensor], Tensor] = residual,
) -> dict[tuple[int, ...], float]:
    """The joint law of the first K+1 tokens: one verification of a chain drawn from q, then draws from p.

    The rule is given used_p and used_q, which equal p and q unless it is broken on purpose.
    """
    law: dict[tuple[int, ...], float] = Counter()

    def finish(prefix: tuple[int, ...], weight: float) -> None:
        for rest in itertools.product(range(VOCAB), repeat=k + 1 - len(prefix)):
            whole = prefix + rest
            law[whole] += weight * joint({key: p[key] for key in p}, whole) / max(joint(p, prefix), 1e-300)

    for drafted in itertools.product(range(VOCAB), repeat=k):
        drawn = joint(q, drafted)
        if drawn == 0:
            continue
        p_rows = torch.stack([used_p[drafted[:i]] for i in range(k + 1)])[None]  # [1, K+1, vocab]
        q_rows = torch.stack([used_q[drafted[:i]] for i in range(k)])[None]  # [1, K, vocab]
        accept = acceptance_probability(p_rows[:, :-1], q_rows, torch.tensor([drafted]))[0].tolist()
        reach = drawn
        for i in range(k + 1):
            # the i-th draft is where the chain ends, or the bonus token for i = K
            stopped = reach * (1 - accept[i] if i < k else 1)
            supplied = leftover(p_rows[0, i], q_rows[0, i] if i < k else torch.zeros(VOCAB, dtype=torch.float64))
            for token, share in enumerate(supplied.tolist()):
                if stopped * share > 0:
                    finish((*drafted[:i], token), stopped * share)
            reach *= accept[i] if i < k else 0
    return law


def total_variation(law: dict[tuple[int, ...], float], p: Tables, k: int) -> float:
    cells = itertools.product(range(VOCAB), repeat=k + 1)
    return sum(abs(law.get(cell, 0.0) - joint(p, cell)) for cell in cells) / 2


def models(seed: int, k: int, top_k: int = 0) -> tuple[Tables, Tables, Tables, Tables]:
    """Logits of target and head, and the p (perhaps truncated) and q (a reduced vocabulary) made of them."""
    target, head = random_tables(k, seed), random_tables(k, seed + 1000)
    for logits in head.values():
        logits[seed % VOCAB] = -torch.inf  # not in the draft vocabulary
    return target, head, probabilities(target, 0.8, top_k), probabilities(head, 0.8)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rejection_reproduces_the_target_exactly(k: int, top_k: int, seed: int) -> None:
    _, _, p, q = models(seed, k, top_k)
    assert total_variation(law_of_chain(p, q, k, p, q), p, k) < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3])
def test_enumeration_notices_a_broken_rule(k: int) -> None:
    target, head, p, q = models(0, k, top_k=2)
    broken = {
        "p before truncation": law_of_chain(p, q, k, probabilities(target, 0.8), q),
        "p of another temperature": law_of_chain(p, q, k, probabilities(target, 1.2, 2), q),
        "q of another temperature": law_of_chain(p, q, k, p, probabilities(head, 0.5)),
        "p instead of the residual": law_of_chain(p, q, k, p, q, lambda p, q: p),
        "residual not normalised": law_of_chain(p, q, k, p, q, lambda p, q: (p - q).clamp(min=0)),
    }
    for name, law in broken.items():
        assert total_variation(law, p, k) > 1e-3, name


@given(seed=st.integers(0, 10_000), k=st.integers(1, 4), batch=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_verify_rejection_does_what_was_enumerated(seed: int, k: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    p = (draw(batch, k + 1, VOCAB) * 4).softmax(dim=-1)
    q = (draw(batch, k, VOCAB) * 4).softmax(dim=-1)
    drafted = torch.randint(VOCAB, (batch, k), generator=generator)
    uniforms, noise = draw(batch, k), -(-draw(batch, k + 1, VOCAB).log()).log()
    verdict = verify_rejection(p, q, drafted, uniforms, noise)
    for row in range(batch):
        count = 0
        for i in range(k):
            token = drafted[row, i]
            if uniforms[row, i] >= min(1.0, (p[row, i, token] / q[row, i, token]).item()):
                break
            count += 1
        left = (p[row, count] - q[row, count]).clamp(min=0) if count < k else p[row, count]
        supplied = ((left / left.sum()).log() + noise[row, count]).argmax()
        assert verdict.accepted[row] == count
        assert verdict.tokens[row, : count + 1].tolist() == [*drafted[row, :count].tolist(), supplied]


def test_rejection_never_supplies_what_the_target_excludes() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0, 0.0]] * 2], dtype=torch.float64)
    q = torch.tensor([[[0.0, 0.0, 0.5, 0.5]]], dtype=torch.float64)
    noise = torch.tensor([[[0.0, 0.0, 99.0, 99.0]] * 2], dtype=torch.float64)
    verdict = verify_rejection(p, q, torch.tensor([[2]]), torch.full((1, 1), 1e-12, dtype=torch.float64), noise)
    assert verdict.accepted.item() == 0 and verdict.tokens[0, 0].item() in (0, 1)


@given(
    choices=st.lists(st.integers(0, 2), min_size=1, max_size=8),
    drafted=st.lists(st.integers(0, 2), min_size=7, max_size=7),
)
def test_shared_noise_keeps_the_longest_equal_prefix(choices: list[int], drafted: list[int]) -> None:
    drafted = drafted[: len(choices) - 1]
    verdict = verify_shared_noise(torch.tensor([choices]), torch.tensor([drafted], dtype=torch.int64))
    equal = 0
    while equal < len(drafted) and drafted[equal] == choices[equal]:
        equal += 1
    assert verdict.accepted.item() == equal
    assert verdict.tokens[0, : equal + 1].tolist() == [*drafted[:equal], choices[equal]]


VOCABULARY = torch.tensor([0, 2, 3])  # the draft vocabulary


def decode(rule: Rule, target: Tables, head: Tables, k: int, length: int) -> tuple[int, ...]:
    """Draft and verify with tables in the place of models, until `length` tokens are there."""
    tokens: tuple[int, ...] = ()
    while len(tokens) < length:
        count = min(k, length - len(tokens) - 1)
        drafts: list[Tensor] = []
        rows: list[Tensor] = []
        for step in range(count):
            prefix = tokens + tuple(int(draft) for draft in drafts)
            token, q = rule.draft(head[prefix][VOCABULARY][None], VOCABULARY, len(tokens) + step)
            drafts.append(token)
            if q is not None:
                rows.append(torch.zeros(1, VOCAB, dtype=torch.float64).index_copy(1, VOCABULARY, q))
        chain = torch.stack(drafts, dim=1) if drafts else torch.empty(1, 0, dtype=torch.int64)
        prefixes = [tokens + tuple(chain[0, :i].tolist()) for i in range(count + 1)]
        logits = torch.stack([target[prefix] for prefix in prefixes])[None]
        verdict = rule.verify(logits, Proposal(chain, torch.stack(rows, dim=1) if rows else None), len(tokens))
        tokens += tuple(verdict.tokens[0, : int(verdict.accepted) + 1].tolist())
    return tokens


def deviations(samples: list[tuple[int, ...]], p: Tables, length: int) -> float:
    """Chi-square of sampled continuations against their exact law, in standard deviations above its mean."""
    counts = Counter(samples)
    statistic, cells, rare_seen, rare_expected = 0.0, 0, 0, 0.0
    for cell in itertools.product(range(VOCAB), repeat=length):
        expected = joint(p, cell) * len(samples)
        if expected < 5:
            rare_seen, rare_expected = rare_seen + counts[cell], rare_expected + expected
        else:
            statistic, cells = statistic + (counts[cell] - expected) ** 2 / expected, cells + 1
    if rare_expected > 1:
        statistic, cells = statistic + (rare_seen - rare_expected) ** 2 / rare_expected, cells + 1
    elif rare_seen and rare_expected == 0:
        return math.inf
    return (statistic - (cells - 1)) / math.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("name", list(RULES))
def test_sampled_chains_follow_the_target(name: str) -> None:
    target, head = random_tables(3, 5), random_tables(3, 6)
    params = SamplingParams(temperature=0.8, top_k=3)
    samples = [decode(RULES[name](params, seed), target, head, k=2, length=3) for seed in range(1000)]
    assert deviations(samples, probabilities(target, 0.8, 3), 3) < 4
    # controls: the same samples against laws that are off
    assert deviations(samples, probabilities(target, 1.1, 3), 3) > 5
    assert deviations(samples, probabilities(target, 0.8, 2), 3) > 5


def test_what_replaces_a_rejected_draft_does_not_depend_on_it() -> None:
    # token 3 is mostly drafted and never right; were it replaced with the noise that it was drafted with, token 0, the
    # other likely draft, would come too rarely
    target = {prefix: torch.tensor([0.4, 0.2, 0.4, 0.0]).double().log() for prefix in random_tables(1, 0)}
    head = {prefix: torch.tensor([0.3, 0.0, 0.01, 0.69]).double().log() for prefix in target}
    rules = (RULES["rejection"](SamplingParams(temperature=1.0), seed) for seed in range(1200))
    samples = [decode(rule, target, head, k=1, length=2)[:1] for rule in rules]
    assert deviations(samples, probabilities(target, 1.0), 1) < 4


def test_drawing_notices_a_rule_that_drafts_and_judges_differently() -> None:
    class WrongQ(RULES["rejection"]):  # type: ignore[misc]
        def draft(self, logits: Tensor, vocabulary: Tensor, position: int) -> tuple[Tensor, Tensor | None]:
            _, q = super().draft(logits, vocabulary, position)
            return vocabulary[logits.argmax(dim=-1)], q  # argmax, judged as if it were drawn

    target, head = random_tables(3, 5), random_tables(3, 6)
    samples = [decode(WrongQ(SamplingParams(temperature=0.8), s), target, head, k=2, length=3) for s in range(400)]
    assert deviations(samples, probabilities(target, 0.8), 3) > 5


@given(seed=st.integers(0, 2**63 - 1), k=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_shared_noise_gives_the_same_text_for_any_speculation_length(seed: int, k: int) -> None:
    target, head = random_tables(3, 5), random_tables(3, 6)
    rule = RULES["shared-noise"](SamplingParams(temperature=0.8, top_p=0.9), seed)
    assert decode(rule, target, head, k, 4) == decode(rule, target, head, 0, 4)


def test_without_drafts_both_rules_choose_alike() -> None:
    target = random_tables(3, 5)
    params = SamplingParams(temperature=0.8)
    for seed in range(50):
        first, second = (decode(rule(params, seed), target, {}, 0, 4) for rule in RULES.values())
        assert first == second


def test_temperature_zero_is_greedy_under_both_rules() -> None:
    for name in RULES:
        assert isinstance(make_rule(name, SamplingParams(temperature=0.0), 0), Greedy)
