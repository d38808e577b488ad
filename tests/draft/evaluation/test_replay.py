"""Replay says what the engine would have done with the same text."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from trained_heads import make_row, responses_of, train_briefly

from draft.errors import UserError
from draft.evaluation.replay import Acceptance, ReplayResult, Span, generations, replay, replay_acceptance_length
from draft.heads import Eagle3Head
from serving.engine import Engine, SamplingParams, Speculation

EOS = frozenset({23, 83})  # bytes that the tiny target's greedy text does contain, in the place of its <|im_end|>
PROMPTS = [[5, 9, 200], [70, 71, 72, 73, 74, 75, 76], [33, 250, 12, 99, 180], [1, 120, 45, 7]]
# (prompt, tokens at most, whether EOS is ignored): the prefill alone, a single verification, longer ones, two with EOS
REQUESTS = [(0, 1, True), (1, 2, True), (2, 15, True), (3, 20, True), (0, 40, False), (1, 40, False)]
MAX_STEPS = 8
LENGTHS = (1, 2, 3, 5, 8)


@pytest.fixture(scope="module")
def target():
    target = make_tiny_target()
    target.__dict__["eos_token_ids"] = EOS  # the cached property's own place
    return target


# architecture -> (learning rate, steps) of a moment's training
TRAINED = {"eagle3": (5e-3, 50), "eagle": (2e-2, 60), "medusa": (5e-3, 50)}


@pytest.fixture(scope="module", params=TRAINED)
def head(target, request):
    """A head that is often right and often wrong: trained for a moment on the greedy text below."""
    head = make_tiny_head(target, draft_vocab_size=240, architecture=request.param)
    responses = responses_of(target, PROMPTS, max_new_tokens=24)
    texts = [torch.tensor(prompt + response) for prompt, response in zip(PROMPTS, responses, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    rate, steps = TRAINED[request.param]
    return train_briefly(head, target, ids, draft_steps=3, rate=rate, steps=steps)


@pytest.fixture(scope="module")
def eagle3(head):
    if not isinstance(head, Eagle3Head):
        pytest.skip("about the names of one architecture")
    return head


@pytest.fixture(scope="module")
def completions(target, head):
    """Greedy answers of the engine for each speculation length, prompt by prompt."""
    engine = Engine(target, head, speculation="chain", speculation_length=MAX_STEPS)
    prompts = [PROMPTS[index] for index, _, _ in REQUESTS]
    params = [SamplingParams(limit, ignore_eos=ignore) for _, limit, ignore in REQUESTS]
    return {length: engine.generate(prompts, params, Speculation(num_tokens=length)) for length in LENGTHS}


@pytest.fixture(scope="module")
def rows(completions):
    return [make_row(c.prompt_ids, c.token_ids, id=str(i)) for i, c in enumerate(completions[1])]


@pytest.mark.parametrize("length", LENGTHS)
def test_replay_equals_the_engine(target, head, rows, completions, length):
    result = replay(target, {"head": head}, rows, MAX_STEPS)["head"]
    stats = [c.stats for c in completions[length]]
    assert result.emitted[:, length - 1].tolist() == [s.emitted for s in stats]
    assert result.verifications[:, length - 1].tolist() == [s.verifications for s in stats]
    drafted, accepted = ([0] * length for _ in range(2))
    for s in stats:
        for position, (d, a) in enumerate(zip(s.drafted_per_position, s.accepted_per_position, strict=True)):
            drafted[position] += d
            accepted[position] += a
    assert result.drafted(length) == drafted
    assert result.accepted(length) == accepted


def test_the_cases_that_matter_occur_in_these_texts(target, head, rows, completions):
    assert [c.finish_reason for c in completions[1]] == ["length"] * 4 + ["eos_token"] * 2
    assert all([c.token_ids for c in each] == [c.token_ids for c in completions[1]] for each in completions.values())
    blocks = replay(target, {"head": head}, rows, MAX_STEPS)["head"].blocks[4]  # [drafted, accepted] at K = 5
    assert (blocks.sum(axis=0)[:3] > 0).all() and blocks[:, 3:].sum() > 0  # accepted prefixes of many lengths
    assert (blocks.sum(axis=1)[[0, 1, 5]] > 0).all()  # drafting cut short by the length limit, to nothing as well
    ends = {c.tokens[-1].accepted_position is None for each in completions.values() for c in each[4:]}
    assert ends == {True, False}  # an EOS that the target supplied, and one that was drafted
    responses = [token for c in completions[1] for token in c.token_ids]
    assert head.config.full_vocabulary or any(not head.t2d[token] for token in responses)


def test_each_response_of_a_conversation_is_a_generation_of_its_own(target, head, completions):
    first = completions[1][2]
    prompt = [*first.prompt_ids, *first.token_ids, 10, 11, 12]
    engine = Engine(target, head, speculation="chain", speculation_length=3)
    (second,) = engine.generate([prompt], SamplingParams(12, ignore_eos=True))
    mask = [False] * len(first.prompt_ids) + [True] * 15 + [False] * 3 + [True] * 12
    both = replace(make_row(first.prompt_ids, []), ids=[*prompt, *second.token_ids], mask=mask)
    result = replay(target, {"head": head}, [both], 3)["head"]
    assert result.emitted[0].tolist() == [14 + 11] * 3
    assert result.verifications[0, 2] == completions[3][2].stats.verifications + second.stats.verifications


def test_batches_and_company_change_nothing(target, head, rows, monkeypatch):
    passes = []
    forward = target.forward
    monkeypatch.setattr(target, "forward", lambda ids, **kwargs: passes.append(ids.shape) or forward(ids, **kwargs))
    alone = replay(target, {"head": head}, rows, 4, tokens_per_batch=1)["head"]
    assert len(passes) == len(rows)
    passes.clear()
    other = make_tiny_head(target, seed=7)
    both = replay(target, {"head": head, "other": other}, rows, 4)
    assert len(passes) == 1  # one pass of the target serves both heads
    for name in ("emitted", "verifications", "blocks"):
        assert (getattr(alone, name) == getattr(both["head"], name)).all()
    assert both["other"].tau(4) < alone.tau(4)
    assert alone.row_ids == [r.id for r in rows]


def test_tokens_outside_the_draft_vocabulary_are_misses(target, eagle3, rows):
    """The tokens that the head is right about are taken out of its vocabulary, and nothing else is changed."""
    head = eagle3
    response = [token for row in rows for token in row.ids[row.prompt_length :]]
    kept = [place for place, token in enumerate(head.vocabulary.tolist()) if token not in response]
    config = type(head.config)(**{**head.config.__dict__, "draft_vocab_size": len(kept)})
    blind = Eagle3Head(config).to(target.dtype)
    weights = {name: value for name, value in head.state_dict().items() if name not in ("d2t", "t2d")}
    blind.load_state_dict({**weights, "lm_head.weight": head.lm_head.weight[kept]}, strict=False)
    blind.set_vocabulary(head.vocabulary[kept])
    results = replay(target, {"whole": head, "blind": blind}, rows, 3)
    assert results["whole"].tau(3) > 1.4
    assert results["blind"].tau(3) == 1.0
    assert results["blind"].accepted(3) == [0, 0, 0]


def test_generations():
    eos = frozenset({2})
    ids, mask = [9, 9, 5, 6, 2, 8, 8, 5, 2, 8, 7], [c == "x" for c in "..xxx..xxxx"]
    conversation = replace(make_row([9, 9], []), ids=ids, mask=mask)
    assert generations(conversation, eos) == [Span(2, 5, True), Span(7, 9, True)]
    assert generations(make_row([9], [5, 6]), eos) == [Span(1, 3, False)]
    earlier = replace(conversation, prompt_length=7)  # responses inside the prompt are not the target's
    assert generations(earlier, eos) == [Span(7, 9, True)]


def test_only_greedy_rows_are_replayed(target, head, rows):
    others = [replace(rows[3], temperature=1.0), replace(rows[3], temperature=None)]
    result = replay(target, {"head": head}, [*others, rows[2]], 2)["head"]
    assert result.emitted[:, 0].tolist() == [14]
    for unusable in (others, [], [rows[0]]):  # rows[0] has nothing but the prefill's token
        with pytest.raises(UserError, match="temperature 0"):
            replay(target, {"head": head}, unusable)


def test_acceptance_per_position_by_hand(target, head, rows):
    blocks = np.zeros((2, 3, 3), dtype=np.int64)
    blocks[1, 2] = [5, 3, 2]  # two drafted: 5 blocks kept none, 3 kept one, 2 kept both
    blocks[1, 1] = [1, 4, 0]  # one drafted
    blocks[1, 0, 0] = 6
    result = ReplayResult([], np.zeros((0, 2)), np.zeros((0, 2)), blocks)
    assert result.drafted(2) == [15, 10]
    assert result.accepted(2) == [9, 2]
    assert result.acceptance_per_position(2) == [9 / 15, 2 / 10]
    assert result.conditional_acceptance_per_position(2) == [9 / 15, 2 / 5]


def test_rows_of_one_id_are_one_unit():
    emitted, verifications = np.array([[4], [6], [0], [1]]), np.array([[2], [3], [0], [1]])
    result = Acceptance(["b", "a", "c", "b"], emitted, verifications)
    assert result.units(1).tolist() == [[6, 3], [5, 3]]
    assert result.tau(1) == 11 / 6


def test_the_trainers_figure(target, head, rows):
    head.train()
    tau = replay_acceptance_length(target, head, rows, 5)
    assert head.training
    head.eval()
    assert tau == replay(target, {"head": head}, rows)["head"].tau(5) > 1.4
