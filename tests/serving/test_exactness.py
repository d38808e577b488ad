"""What comes out is the target's own, whatever is drafted: against transformers, in float64.

Random heads are rarely right, so most tests draft with an oracle that knows the continuation and errs at random places:
blocks are then accepted in part, in whole and not at all.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from conftest import byte_tokenizer, make_tiny_head, make_tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from draft.heads import Eagle3Head
from draft.target import Target
from serving.engine import Completion, Engine, SamplingParams
from serving.engine.proposers import ChainProposer
from serving.engine.sampling import warp
from serving.engine.verification import RULES, Proposal, Rule

CONTEXT = 64


class Oracle:
    """Proposes a known continuation, with mistakes. Drafts nothing of its own: for the engine any proposer is alike."""

    layers = (0,)

    def __init__(self, tokens: list[int], vocab: int, error_rate: float, seed: int) -> None:
        self.tokens, self.vocab, self.error_rate = tokens, vocab, error_rate
        self.rng = random.Random(seed)
        self.known = 0  # tokens of the sequence that were observed to follow another

    def start(self, capacity: int) -> None:
        self.known = 1

    def observe(self, following: Tensor, auxiliary: Tensor) -> None:
        assert following.shape[1] == auxiliary.shape[1]
        known = self.tokens[self.known : self.known + following.shape[1]]
        assert following[0].tolist() == known[: len(self.tokens)], "the engine left the continuation"
        self.known += following.shape[1]

    def propose(self, count: int, rule: Rule) -> Proposal:
        right = (self.tokens[self.known : self.known + count] + [3] * count)[:count]
        drafted = [self.rng.randrange(self.vocab) if self.rng.random() < self.error_rate else token for token in right]
        chain = torch.tensor([drafted])
        q = torch.nn.functional.one_hot(chain, self.vocab).double()  # a deterministic draft is drawn from a point
        return Proposal(chain, q)


def tiny_qwen() -> Target:
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=9,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    return Target("tiny qwen3", Qwen3ForCausalLM(config).to(torch.float64), byte_tokenizer())


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def engine(request: pytest.FixtureRequest) -> Engine:
    target = make_tiny_target(max_length=CONTEXT) if request.param == "llama" else tiny_qwen()
    return Engine(target, make_tiny_head(target))


@pytest.fixture
def llama() -> Iterator[Engine]:
    target = make_tiny_target(max_length=CONTEXT)
    yield Engine(target, make_tiny_head(target))


def with_oracle(engine: Engine, whole: list[int], error_rate: float, seed: int) -> Engine:
    """The same target beside an oracle for the sequence `whole`."""
    other = Engine(engine.target)
    other.proposer = Oracle(whole, engine.target.vocab_size, error_rate, seed)
    return other


def transformers_greedy(target: Target, prompt: list[int], count: int, eos: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = target.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=eos,
        pad_token_id=2,
    )
    return output[0, len(prompt) :].tolist()


PROMPTS = [[1], [50, 60, 70], list(range(3, 40))]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_tokens_are_those_of_transformers(engine: Engine, prompt: list[int]) -> None:
    params = SamplingParams(max_new_tokens=12)
    expected = transformers_greedy(engine.target, prompt, 12, [2])
    assert engine.generate(prompt, params, speculative=False).token_ids == expected
    for k in range(9):
        if len(prompt) == 3 or k == 5:
            assert engine.generate(prompt, params, speculation_length=k).token_ids == expected, k
        oracle = with_oracle(engine, prompt + expected, 0.3, seed=k)
        completion = oracle.generate(prompt, params, speculation_length=k)
        assert completion.token_ids == expected, k
        if k > 1:
            assert 0 < completion.stats.accepted < completion.stats.drafted


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_speculation_any_mistakes_any_stop(data: st.DataObject) -> None:
    base = _shared()
    prompt = data.draw(st.lists(st.integers(3, 258), min_size=1, max_size=8), label="prompt")
    count = data.draw(st.sampled_from([1, 2, 3, 4, 7, 12]), label="max_new_tokens")
    temperature = data.draw(st.sampled_from([0.0, 0.9]), label="temperature")
    rule = data.draw(st.sampled_from(sorted(RULES)), label="rule") if temperature == 0 else "shared-noise"
    free = SamplingParams(max_new_tokens=count, temperature=temperature, seed=5, ignore_eos=True)
    unbounded = base.generate(prompt, free, speculative=False)
    # a stop string or an EOS token that occurs somewhere inside
    where = data.draw(st.integers(0, count - 1), label="where")
    stop = tuple(filter(None, [unbounded.text[where : where + data.draw(st.sampled_from([1, 3]), label="width")]]))
    params = SamplingParams(max_new_tokens=count, temperature=temperature, seed=5, stop=stop)
    plain = base.generate(prompt, params, speculative=False)
    oracle = with_oracle(base, prompt + unbounded.token_ids, data.draw(st.sampled_from([0.0, 0.2, 1.0])), seed=where)
    k = data.draw(st.integers(1, 8), label="K")
    for speculative in (oracle, base):
        same(speculative.generate(prompt, params, speculation_length=k, rule=rule), plain)


def same(ours: Completion, plain: Completion) -> None:
    assert ours.token_ids == plain.token_ids
    assert (ours.text, ours.finish_reason, ours.seed) == (plain.text, plain.finish_reason, plain.seed)
    assert [token.text for token in ours.tokens] == [token.text for token in plain.tokens]
    for one, other in zip(ours.tokens, plain.tokens, strict=True):
        assert math.isclose(one.logprob, other.logprob, abs_tol=1e-9)
    stats = ours.stats
    assert stats.emitted == len(ours.token_ids) - 1
    assert stats.accepted == sum(token.accepted_position is not None for token in ours.tokens)


_SHARED: list[Engine] = []


def _shared() -> Engine:
    if not _SHARED:  # hypothesis doesn't take function-scoped fixtures
        target = make_tiny_target(max_length=CONTEXT)
        _SHARED.append(Engine(target, make_tiny_head(target)))
    return _SHARED[0]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_an_eos_token_in_mid_block_ends_the_answer_there(llama: Engine, k: int) -> None:
    prompt = [50, 60, 70]
    whole = llama.generate(prompt, SamplingParams(max_new_tokens=14, ignore_eos=True), speculative=False).token_ids
    for token in dict.fromkeys(whole):
        llama.target.__dict__["eos_token_ids"] = frozenset([token])
        oracle = with_oracle(llama, prompt + whole, 0.0, seed=0)
        completion = oracle.generate(prompt, SamplingParams(max_new_tokens=14), speculation_length=k)
        assert completion.token_ids == whole[: whole.index(token) + 1]
        assert completion.token_ids == transformers_greedy(llama.target, prompt, 14, [token])
        assert completion.finish_reason == "eos_token"
        assert completion.text == llama.target.decode([t for t in completion.token_ids[:-1]])
        ignoring = oracle.generate(prompt, SamplingParams(max_new_tokens=14, ignore_eos=True), speculation_length=k)
        assert ignoring.token_ids == whole and ignoring.finish_reason == "length"


@pytest.mark.parametrize("new", [1, 2, 3, 6])
def test_the_last_positions_of_the_context(engine: Engine, new: int) -> None:
    prompt = [3 + i % 200 for i in range(CONTEXT - new)]
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    expected = transformers_greedy(engine.target, prompt, new, [])
    for k in (0, 1, 5, 8):
        assert engine.generate(prompt, params, speculation_length=k).token_ids == expected
        oracle = with_oracle(engine, prompt + expected, 0.0, seed=0)
        completion = oracle.generate(prompt, params, speculation_length=k)
        assert completion.token_ids == expected
        if k >= new - 1 > 0:
            assert completion.stats.verifications == 1 and completion.stats.drafted == new - 2


def test_a_seed_gives_the_same_text_whatever_is_drafted(engine: Engine) -> None:
    accepted = 0
    for seed in (0, 2**63 - 1):
        params = SamplingParams(max_new_tokens=12, temperature=2.0, top_p=0.95, top_k=100, seed=seed, ignore_eos=True)
        plain = engine.generate([50, 60], params, speculative=False)
        for k in (1, 3, 8):
            completion = engine.generate([50, 60], params, speculation_length=k)
            same(completion, plain)
            accepted += completion.stats.accepted
    assert accepted > 0  # the shared noise makes even a random head agree now and then
    other = SamplingParams(max_new_tokens=12, temperature=2.0, seed=1, ignore_eos=True)
    assert engine.generate([50, 60], other).token_ids != plain.token_ids


def test_a_drawn_seed_is_reported_and_repeats_the_answer(llama: Engine) -> None:
    params = SamplingParams(max_new_tokens=10, temperature=1.5, ignore_eos=True)
    for rule in RULES:
        first, second = (llama.generate([50], params, rule=rule) for _ in range(2))
        assert first.seed is not None and second.seed is not None and first.seed != second.seed
        assert first.token_ids != second.token_ids
        again = SamplingParams(max_new_tokens=10, temperature=1.5, seed=first.seed, ignore_eos=True)
        assert llama.generate([50], again, rule=rule).token_ids == first.token_ids


class Recorder:
    """A rule that drafts the tokens it is told to, and keeps the logits that it was shown."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.logits, self.positions = list(tokens), list[Tensor](), list[int]()

    def draft(self, logits: Tensor, vocabulary: Tensor, position: int) -> tuple[Tensor, Tensor | None]:
        self.logits.append(logits)
        self.positions.append(position)
        return torch.tensor([self.tokens[len(self.logits) - 1]]), None

    def verify(self, logits: Tensor, proposal: Proposal, position: int) -> object:
        raise AssertionError("a proposer does not verify")


@torch.inference_mode()
def test_drafts_read_what_training_time_test_read(engine: Engine) -> None:
    """After blocks of any size the head's cache and drafts equal one causal pass over the target's true states."""
    target, head = engine.target, engine.head
    assert isinstance(head, Eagle3Head)
    ids = torch.randint(3, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    true = target.forward(ids, layers=target.default_auxiliary_layers)
    assert true.auxiliary is not None
    proposer = ChainProposer(target, head)
    proposer.start(40)
    drafts = [9, 20, 4, 100]
    done = 0
    for size in (7, 1, 4, 3):
        proposer.observe(ids[:, done + 1 : done + size + 1], true.auxiliary[:, done : done + size])
        done += size
        recorder = Recorder(drafts)
        proposal = proposer.propose(4, recorder)  # type: ignore[arg-type]
        assert proposal.tokens.tolist() == [drafts] and proposer.cache.length == done
        # token `done` is the last one known; the first draft is of token done + 1
        assert recorder.positions == [done + 1, done + 2, done + 3, done + 4]
        hidden = head.fuse(true.auxiliary[:, :done])
        following = torch.cat([ids[:, 1 : done + 1], torch.tensor([drafts])], dim=1)
        for step in range(4):
            positions = torch.arange(done + step)[None]
            output = head(target.embedding(following[:, : done + step]), hidden, positions)
            torch.testing.assert_close(recorder.logits[step], head.logits(output)[:, -1], rtol=1e-9, atol=1e-9)
            hidden = torch.cat([hidden, output[:, -1:]], dim=1)  # a draft step reads the head's own output


@torch.inference_mode()
def test_caches_after_an_answer_equal_a_forward_from_scratch(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=24, temperature=2.0, seed=3, ignore_eos=True)
    completion = engine.generate([50, 60, 70], params, speculation_length=3)
    assert 0 < completion.stats.accepted < completion.stats.drafted
    proposer = engine.proposer
    assert isinstance(proposer, ChainProposer)
    ids = torch.tensor([completion.prompt_ids + completion.token_ids])
    states = engine.target.forward(ids, layers=proposer.layers)
    assert states.auxiliary is not None
    read, observed = engine.cache.length, proposer.cache.length
    assert read == 26 and 20 <= observed < 26
    fresh = ChainProposer(engine.target, proposer.head)
    fresh.start(40)
    fresh.observe(ids[:, 1 : observed + 1], states.auxiliary[:, :observed])
    assert fresh.cache.keys is not None and proposer.cache.keys is not None and fresh.cache.values is not None
    torch.testing.assert_close(proposer.cache.keys[:, :, :observed], fresh.cache.keys, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(proposer._hidden, fresh._hidden, rtol=1e-9, atol=1e-9)
    # the target goes on from its cache as from scratch
    more = torch.cat([ids[:, :read], torch.tensor([[9, 8, 7]])], dim=1)
    positions = torch.arange(read, read + 3)[None]
    continued = engine.target.forward(more[:, read:], position_ids=positions, past_key_values=engine.cache)
    scratch = engine.target.forward(more)
    torch.testing.assert_close(continued.last_hidden, scratch.last_hidden[:, read:], rtol=1e-9, atol=1e-9)


# the law of sampled answers of a real, very small model

VOCAB, LENGTH = 5, 4


@pytest.fixture(scope="module")
def small() -> Engine:
    """One layer, five tokens: all answers can be enumerated, and thousands drawn in seconds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.8,
        eos_token_id=None,
        pad_token_id=None,
    )
    target = Target("small", LlamaForCausalLM(config).to(torch.float64), byte_tokenizer())
    engine = Engine(target)
    proposer = ChainProposer(target, make_tiny_head(target, draft_vocab_size=4))
    proposer.layers = (0, 1, 1)  # as far as one layer goes
    engine.proposer = proposer
    return engine


@torch.inference_mode()
def exact_law(target: Target, prompt: list[int], params: SamplingParams) -> dict[tuple[int, ...], float]:
    cells = list(itertools.product(range(VOCAB), repeat=LENGTH))
    ids = torch.tensor([prompt + list(cell) for cell in cells])
    log_p = warp(target.logits(target.forward(ids).last_hidden), params)[:, len(prompt) - 1 : -1]
    chosen = log_p.gather(-1, ids[:, len(prompt) :, None])[..., 0]  # [cells, LENGTH]
    return dict(zip(cells, chosen.sum(dim=1).exp().tolist(), strict=True))


def deviations(samples: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Chi-square in standard deviations above its mean; cells that expect fewer than 5 are taken together."""
    total = sum(samples.values())
    cells = {cell: p * total for cell, p in law.items() if p * total >= 5}
    pairs = [(samples[cell], expected) for cell, expected in cells.items()]
    pairs.append((total - sum(seen for seen, _ in pairs), total - sum(expected for _, expected in pairs)))
    statistic = sum((seen - expected) ** 2 / max(expected, 1e-9) for seen, expected in pairs)
    return (statistic - len(cells)) / math.sqrt(2 * len(cells))


@pytest.mark.parametrize("rule", list(RULES))
def test_sampled_answers_follow_the_law_of_the_target(small: Engine, rule: str) -> None:
    prompt, total = [1, 2], 600
    settings = {"max_new_tokens": LENGTH, "temperature": 1.3, "top_p": 0.9, "ignore_eos": True}
    samples: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for seed in range(total):
        completion = small.generate(prompt, SamplingParams(**settings, seed=seed), speculation_length=2, rule=rule)
        samples[tuple(completion.token_ids)] += 1
        accepted += completion.stats.accepted
    assert accepted > total / 10  # speculation took part
    law = exact_law(small.target, prompt, SamplingParams(**settings))
    assert abs(sum(law.values()) - 1) < 1e-12
    assert deviations(samples, law) < 4
    # controls: without the truncation, and at another temperature
    assert deviations(samples, exact_law(small.target, prompt, SamplingParams(temperature=1.3))) > 5
    assert deviations(samples, exact_law(small.target, prompt, SamplingParams(temperature=0.9, top_p=0.9))) > 5
