"""Parameters and their limits; warping and penalties against transformers' processors and a plain oracle."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from draft.errors import UserError
from serving.engine.sampling import Processor, SamplingParams, warp

# parameters


WRONG = {"max_new_tokens": 2.5, "temperature": math.nan, "top_k": True, "min_new_tokens": 129, "seed": 2**63}
WRONG |= {"logit_bias": {True: 1.0}, "stop": ("a", ""), "made_up": 1}


@pytest.mark.parametrize(("field", "value"), [*WRONG.items(), ("max_new_tokens", 0), ("stop", "abc")])
def test_a_wrong_value_is_refused_by_name_and_value(field, value):
    with pytest.raises(UserError) as error:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{field} = {value!r}: ") and str(error.value).endswith(".")


def test_parameters_are_values_and_the_limits_themselves_are_allowed():
    SamplingParams(max_new_tokens=1, temperature=0, top_p=1, top_k=0, seed=0)
    SamplingParams(min_p=1, presence_penalty=-2, frequency_penalty=2, repetition_penalty=1e-9, logprobs=20)
    SamplingParams(seed=2**63 - 1, min_new_tokens=128, logprobs=0)
    bias = {7: 1, 3: -100.0}
    params = SamplingParams(logit_bias=bias, stop_ids=[4], stop=["a", "b"])
    bias[3] = 0.0
    same = SamplingParams(logit_bias={3: -100.0, 7: 1}, stop_ids=(4,), stop=("a", "b"))
    assert params == same and hash(params) == hash(same) and params != SamplingParams(stop_ids=[4])
    assert (params.stop_ids, params.stop, dict(params.logit_bias)) == ((4,), ("a", "b"), {3: -100.0, 7: 1})


# warping


@given(
    logits=st.lists(st.integers(-40, 40), min_size=2, max_size=40, unique=True),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
@settings(max_examples=150)
def test_warping_is_that_of_transformers(logits, temperature, top_k, top_p, min_p):
    scores = torch.tensor([logits], dtype=torch.float64) / 4
    ours = warp(scores, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    theirs = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    # a nucleus whose edge is decided by rounding may legitimately differ: such a top_p is skipped
    sums = theirs.softmax(dim=-1).sort(descending=True).values.cumsum(dim=-1)
    if top_p < 1:
        if (sums - top_p).abs().min() < 1e-9:
            return
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    if min_p:
        ratio = theirs.softmax(dim=-1) / theirs.softmax(dim=-1).max()
        if ((ratio - min_p).abs() < 1e-9).any() and min_p < 1:
            return
        theirs = MinPLogitsWarper(min_p)(None, theirs)  # type: ignore[arg-type]
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours.exp(), theirs.softmax(dim=-1), rtol=1e-12, atol=1e-15)


def test_a_nucleus_larger_than_the_guess_is_found():
    torch.manual_seed(0)
    logits = torch.stack([torch.randn(12_000) * 0.1, torch.randn(12_000) * 20]).double()  # a broad one, a narrow one
    ours = warp(logits, SamplingParams(temperature=1.0, top_p=0.9))
    theirs = TopPLogitsWarper(0.9)(None, logits)
    assert torch.equal(ours.isinf(), theirs.isinf())
    assert (~ours[0].isinf()).sum() > 8192 and (~ours[1].isinf()).sum() < 256


def test_ties_at_an_edge_are_kept_together():
    # more than any guess of how many tie, and a top_k beyond every guess
    many = torch.cat([torch.tensor([3.0, 2.0]), torch.ones(100), torch.zeros(50)])
    forties = torch.arange(12_000).div(40, rounding_mode="floor").float()  # forty of each
    for scores, top_k, kept in ((many, 4, 102), (forties, 9_001, 9_040), (forties, 8_200, 8_200), (forties, 1, 40)):
        assert int(warp(scores, SamplingParams(temperature=1.0, top_k=top_k)).isfinite().sum()) == kept
    p = warp(torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]), SamplingParams(temperature=1.0, top_k=2)).exp()
    assert (p > 0).tolist() == [True, True, True, True, False] and math.isclose(p.sum().item(), 1, rel_tol=1e-6)
    p = warp(torch.tensor([0.4, 0.2, 0.2, 0.2]).log(), SamplingParams(temperature=1.0, top_p=0.5)).exp()
    assert (p > 0).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature, dtype):
    log_p = warp(torch.tensor([1.0, 30.0, 29.0], dtype=dtype), SamplingParams(temperature=temperature))
    assert log_p.exp().tolist() == [0, 1, 0]


@st.composite
def requests(draw: st.DrawFn) -> tuple[SamplingParams, list[int], list[int], list[list[int]]]:
    """Parameters, prompt, emitted tokens, and what was drafted before each row, over 12 tokens (10 and 11 are EOS)."""
    token = st.integers(0, 11)
    prefixes = draw(st.lists(st.lists(token, max_size=5), min_size=1, max_size=6))
    params = SamplingParams(
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.5, 1e-300])),
        presence_penalty=draw(st.sampled_from([0.0, 0.7, -2])),
        frequency_penalty=draw(st.sampled_from([0, 0.4, -1.5])),
        logit_bias=draw(st.dictionaries(token, st.floats(-100, 100), max_size=3)),
        min_new_tokens=draw(st.integers(0, 8)),
        stop_ids=draw(st.lists(token, max_size=2)),  # type: ignore[arg-type]
        ignore_eos=draw(st.booleans()),
    )
    ids = st.lists(token, max_size=8)
    return params, draw(ids), draw(ids), prefixes


def adjusted_plainly(row: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """One token at a time, from the definitions."""
    counts, scores = Counter(output), []
    ends = {*params.stop_ids, *(() if params.ignore_eos else (10, 11))}
    for token_id, score in enumerate(row):
        score += dict(params.logit_bias).get(token_id, 0.0)
        if token_id in prompt or token_id in output:
            strength = max(params.repetition_penalty, 1e-30)
            score = score / strength if score > 0 else score * strength
        score -= params.frequency_penalty * counts[token_id] + params.presence_penalty * (counts[token_id] > 0)
        scores.append(-math.inf if token_id in ends and len(output) < params.min_new_tokens else score)
    return scores


@given(request=requests(), seed=st.integers(0, 1000))
@settings(max_examples=120)
def test_adjusting_sees_the_tokens_before_each_row(request, seed):
    params, prompt, output, prefixes = request
    logits = torch.randn(len(prefixes), 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    before = logits.clone()
    processor = Processor(params, prompt, 12, eos_ids=[10, 11])
    for token_id in output:
        processor.append(token_id)
    ours = processor.adjust(logits, prefixes)
    for row, prefix in enumerate(prefixes):
        expected = adjusted_plainly(before[row].tolist(), params, prompt, output + prefix)
        assert ours[row].tolist() == pytest.approx(expected, rel=1e-12)
        # the row is the one that plain decoding gets when it has emitted what was drafted
        alone = Processor(params, prompt, 12, eos_ids=[10, 11])
        for token_id in output + prefix:
            alone.append(token_id)
        assert torch.equal(alone.adjust(before[row : row + 1], [[]])[0], ours[row])
    assert torch.equal(logits, before)


def test_logits_that_need_nothing_are_passed_on():
    logits = torch.randn(2, 12)
    assert Processor(SamplingParams(), [1], 12, [2]).adjust(logits, [[], [3]]) is logits
    short = Processor(SamplingParams(min_new_tokens=1), [1], 12, [2])
    assert short.adjust(logits, [[], [3]]).isinf().nonzero().tolist() == [[0, 2]]
    short.append(5)
    assert short.adjust(logits, [[], [3]]) is logits
    half = Processor(SamplingParams(frequency_penalty=0.001), [], 2)  # half precision is adjusted in float32
    half.append(0)
    adjusted = half.adjust(torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16), [[]])
    assert adjusted[0, 0].item() == pytest.approx(2.999, rel=1e-6)
