"""The estimate at temperature 1: against full enumeration, and against the engine's rejection rule."""

import itertools
from functools import cache, partial

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, make_tiny_head, make_tiny_target
from trained_heads import make_row
from transformers import LlamaConfig, LlamaForCausalLM

from draft.errors import UserError
from draft.evaluation.replay import rejection_terms, sampled_acceptance, target_passes
from draft.heads.registry import ARCHITECTURES
from draft.target import Target
from serving.engine import Engine, SamplingParams
from serving.engine.drafting import Job
from serving.engine.kv_cache import torch_attention
from serving.engine.setup import make_proposer

PROMPT = [3, 1]
NEW_TOKENS = 4
MAX_STEPS = 2


row = partial(make_row, temperature=1.0)


def make_four_token_target(eos):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=8, num_attention_heads=2, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    target = Target("four tokens", LlamaForCausalLM(config).to(torch.float64), byte_tokenizer())
    target.__dict__["eos_token_ids"] = frozenset(eos)  # the cached property's own place
    return target


def make_three_token_head(target, architecture="eagle3"):
    """A head that does not know token 3 (an EAGLE-1 head knows all)."""
    torch.manual_seed(4)
    head = make_tiny_head(target, draft_vocab_size=3, architecture=architecture)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    return head


def texts(eos):
    """All responses of at most NEW_TOKENS tokens."""
    unfinished = [()]
    for _ in range(NEW_TOKENS):
        longer = [(*text, token) for text in unfinished for token in range(4)]
        yield from (text for text in longer if text[-1] in eos)
        unfinished = [text for text in longer if text[-1] not in eos]
    yield from unfinished


class Forced:
    """A rule that drafts given tokens and keeps the head's distributions."""

    def __init__(self, tokens):
        self.tokens, self.q = list(tokens), []

    def draft(self, logits, vocabulary, positions):
        drafted = self.tokens[len(self.q) : len(self.q) + len(logits)]
        for row in logits:
            self.q.append(torch.zeros(4, dtype=torch.float64).index_copy(0, vocabulary, row.softmax(-1)))
        return torch.tensor(drafted), None


class Oracle:
    """The mean result of decoding by the rejection rule, by walking through everything that can happen."""

    def __init__(self, target, head, length):
        self.target, self.head, self.length = target, head, length
        self.p, self.q, self.expected = cache(self.p), cache(self.q), cache(self.expected)

    def p(self, text):
        """The target's distribution after PROMPT and text."""
        hidden = self.target.forward(torch.tensor([[*PROMPT, *text]])).last_hidden[:, -1]
        return self.target.logits(hidden)[0].softmax(-1)

    def q(self, text, drafts):
        """The engine's own drafting distributions after PROMPT and text, for each of `drafts`."""
        ids = torch.tensor([[*PROMPT, *text]])
        layers, rule = self.head.auxiliary_layers(self.target), Forced(drafts)
        auxiliary = self.target.forward(ids, layers=layers).auxiliary
        proposer = make_proposer(self.target, self.head, layers, 1, 32, torch_attention)
        state = proposer.join()
        proposer.observe(state, ids[0, 1:].tolist(), auxiliary[0, :-1])
        proposer.propose([Job(state, len(drafts), 0, rule)])
        return rule.q

    def expected(self, text):
        """(emitted, verifications) from here on, by verifications, when `text` was emitted."""
        if not len(text) < NEW_TOKENS or text[-1] in self.target.eos_token_ids:
            return np.zeros(2)
        total = np.zeros(2)
        count = min(self.length, NEW_TOKENS - len(text) - 1)
        for drafts in itertools.product(range(self.head.config.draft_vocab_size), repeat=count):
            q = self.q(text, drafts) if count else []
            reached = 1.0  # probability of drafting exactly these and of accepting those before
            for place, draft in enumerate(drafts):
                rest = torch.stack([q[later][drafts[later]] for later in range(place, count)]).prod()
                p = self.p((*text, *drafts[:place]))
                stands = min(1.0, float(p[draft] / q[place][draft]))
                left = (p - q[place]).clamp_min(0)
                total += reached * float(rest) * (1 - stands) * self.after(text, drafts[:place], left / left.sum())
                reached *= float(q[place][draft]) * stands
                if draft in self.target.eos_token_ids:  # emitted, and nothing behind it
                    rest = torch.stack(
                        [q[later][drafts[later]] for later in range(place + 1, count)] or [torch.tensor(1.0)]
                    )
                    total += reached * float(rest.prod()) * np.array([place + 1, 1])
                    break
            else:
                total += reached * self.after(text, drafts, self.p((*text, *drafts)))
        return total

    def after(self, text, accepted, supplied):
        """Expected (emitted, verifications) of a block that ends with a token of the target's, and of all after it."""
        emitted = np.array([len(accepted) + 1, 1])
        return emitted + sum(float(supplied[t]) * self.expected((*text, *accepted, t)) for t in range(4))

    def probability(self, text):
        return float(torch.stack([self.p(text[:place])[token] for place, token in enumerate(text)]).prod())


@pytest.mark.parametrize(
    ("architecture", "eos"), [("eagle3", set()), ("eagle3", {1, 3}), ("eagle", {1}), ("medusa", {1, 3})]
)
def test_the_estimate_is_unbiased(architecture, eos):
    """Averaged over every text with its probability it is what the rejection rule gives, for each K."""
    target = make_four_token_target(eos)
    head = make_three_token_head(target, architecture)
    rows = [row(PROMPT, text, id=str(text)) for text in texts(eos)]
    result = sampled_acceptance(target, {"head": head}, rows, MAX_STEPS, tokens_per_batch=400)["head"]
    by_id = {row.id: row for row in rows}
    with torch.no_grad():
        for length in range(1, MAX_STEPS + 1):
            oracle = Oracle(target, head, length)
            weights = [oracle.probability(tuple(by_id[id].ids[len(PROMPT) :])) for id in result.row_ids]
            assert sum(weights) + sum(oracle.probability((token,)) for token in eos) == pytest.approx(1)
            emitted, verifications = sum(float(oracle.p(())[t]) * oracle.expected((t,)) for t in range(4))
            assert np.dot(weights, result.verifications[:, length - 1]) == pytest.approx(verifications, abs=1e-9)
            if not eos:
                assert np.dot(weights, result.emitted[:, length - 1]) == pytest.approx(emitted, abs=1e-9)
            assert 1.1 < emitted / verifications < length + 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_terms_by_brute_force(architecture, monkeypatch):
    """min(1, q/p) and the sum of min(p, q) without EOS, in rows of two lengths and chunks of a few positions."""
    monkeypatch.setattr("draft.evaluation.replay._POSITIONS_PER_CHUNK", 7)
    target = make_tiny_target()
    head = make_tiny_head(target, architecture=architecture)
    for lm_head in head.lm_head_modules.values():
        lm_head.weight.data[2] *= 3  # EOS: a share that would be missed
    generator = torch.Generator().manual_seed(0)
    rows = [row([5, 6], torch.randint(3, 259, (n,), generator=generator).tolist()) for n in (9, 12)]
    (_, ids, output) = next(target_passes(target, rows, 1000, None, [head]))
    wanted = torch.arange(ids.shape[1]).expand_as(ids) < ids.shape[1] - 2
    with torch.no_grad():
        ratios, overlaps = rejection_terms(target, head, ids, output, wanted, 3)
        p = target.logits(output.last_hidden).softmax(-1)
        states = ARCHITECTURES[architecture].unroll(head, target.embedding(ids), output.auxiliary, 3)
        for step, hidden in enumerate(states):
            q = torch.zeros_like(p).index_copy(-1, head.vocabulary, head.logits(hidden, step).softmax(-1))
            for b, i in itertools.product(range(len(rows)), range(ids.shape[1] - 2 - step)):
                p_there, token = p[b, i + 1 + step], ids[b, i + 2 + step]
                both = torch.minimum(p_there, q[b, i])
                assert overlaps[b, i, step] == pytest.approx(float(both.sum() - both[2]), abs=1e-12)
                assert ratios[b, i, step] == pytest.approx(
                    float((q[b, i, token] / p_there[token]).clamp_max(1)), abs=1e-12
                )


@pytest.mark.parametrize(("architecture", "length"), [("eagle3", 5), ("medusa", 7)])
def test_the_estimate_agrees_with_the_engine(architecture, length):
    """On texts that the engine wrote: verifications that they took against those that they take on average."""
    target = make_four_token_target(set())
    head = make_three_token_head(target, architecture)
    engine = Engine(target, head, rule="rejection", speculation="chain", speculation_length=length)
    completions = engine.generate(
        [[1, seed % 4, 3] for seed in range(6)], [SamplingParams(40, temperature=1.0, seed=seed) for seed in range(6)]
    )
    rows = [row(c.prompt_ids, c.token_ids, id=str(seed)) for seed, c in enumerate(completions)]
    result = sampled_acceptance(target, {"head": head}, rows, length)["head"]
    stats = [c.stats for c in completions]
    verifications = sum(s.verifications for s in stats)
    assert result.verifications[:, -1].sum() == pytest.approx(verifications, rel=0.1)
    assert result.tau(length) == pytest.approx(sum(s.emitted for s in stats) / verifications, rel=0.1)
    assert result.tau(length) > 1.2


def test_only_rows_from_the_whole_distribution_count():
    target = make_four_token_target({2})
    heads = {"head": make_three_token_head(target)}
    others = [make_row(PROMPT, [1, 0, 1], *kind) for kind in [(0.0, 1.0), (0.7, 1.0), (1.0, 0.9), (None, None)]]
    others.append(row(PROMPT, [1]))  # nothing to verify
    good = [row(PROMPT, [1, 0, 1], id="good"), row(PROMPT, [0, 0, 1, 3], id="also")]
    result = sampled_acceptance(target, heads, [*others, *good], 2)["head"]
    assert result.row_ids == ["good", "also"]
    with pytest.raises(UserError, match="temperature 1"):
        sampled_acceptance(target, heads, others)


def test_each_response_of_a_conversation_counts():
    """The text before a response is context: two responses count as much as the same two judged on their own."""
    target = make_four_token_target(set())
    heads = {"head": make_three_token_head(target)}
    first, second = [1, 0, 3, 1], [0, 1, 1, 0, 3]
    both = row(PROMPT, [*first, 3, 3, *second])
    both.mask[len(PROMPT) + 4 : len(PROMPT) + 6] = [False, False]
    alone = [row(PROMPT, first), row([*PROMPT, *first, 3, 3], second)]
    together = sampled_acceptance(target, heads, [both], 3)["head"]
    apart = sampled_acceptance(target, heads, alone, 3)["head"]
    for name in ("emitted", "verifications"):
        np.testing.assert_allclose(getattr(together, name)[0], getattr(apart, name).sum(axis=0), atol=1e-12)
