"""Warping against transformers' own processors, and the random numbers against what is known of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from draft.errors import UserError
from serving.engine.sampling import Purpose, _stream, _stream_tensor, gumbel, uniform, warp
from serving.engine.sequence import SamplingParams


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The chi-square statistic in standard deviations above its mean."""
    counts, expected = counts.double(), expected.double()
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_the_stream_is_splitmix64() -> None:
    # the first outputs of the published generator for the seed 0
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [_stream(0, counter) for counter in range(3)] == expected
    assert [bits % 2**64 for bits in _stream_tensor(0, torch.arange(3)).tolist()] == expected


@given(key=st.integers(0, 2**64 - 1), counter=st.integers(0, 2**40))
def test_the_stream_of_tensors_is_that_of_integers(key: int, counter: int) -> None:
    assert _stream_tensor(key, torch.tensor([counter])).item() % 2**64 == _stream(key, counter)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("purpose", list(Purpose))
def test_uniform_numbers_fill_the_interval_evenly(seed: int, purpose: Purpose) -> None:
    numbers = uniform(seed, purpose, range(100), torch.arange(400))  # [100, 400]
    assert numbers.min() > 0 and numbers.max() < 1
    counts = torch.histc(numbers.flatten(), bins=100, min=0, max=1)
    assert abs(chi_square(counts, torch.full((100,), 400.0))) < 5
    # and so does each position over candidates, and each candidate over positions
    assert (numbers.mean(dim=1) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / 400)
    assert (numbers.mean(dim=0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / 100)


def test_numbers_of_different_keys_are_uncorrelated() -> None:
    positions, candidates = range(200), torch.arange(200)
    base = uniform(5, Purpose.CHOICE, positions, candidates)
    others = {
        "seed": uniform(6, Purpose.CHOICE, positions, candidates),
        "purpose": uniform(5, Purpose.DRAFT, positions, candidates),
        "position": uniform(5, Purpose.CHOICE, range(1, 201), candidates),
        "candidate": uniform(5, Purpose.CHOICE, positions, candidates + 1),
        "transposed": base.T,
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1].item()
        assert abs(correlation) < 5 / 200, name
        # (the transposed matrix shares its diagonal)
        assert (base == other).sum() <= (200 if name == "transposed" else 0), name


@given(
    seed=st.integers(0, 2**63 - 1),
    positions=st.lists(st.integers(0, 2**31), min_size=1, max_size=5),
    candidates=st.lists(st.integers(0, 300_000), min_size=1, max_size=5),
)
@settings(max_examples=50, deadline=None)
def test_a_number_depends_on_its_key_only(seed: int, positions: list[int], candidates: list[int]) -> None:
    together = gumbel(seed, Purpose.CHOICE, positions, torch.tensor(candidates))
    for row, position in enumerate(positions):
        for column, candidate in enumerate(candidates):
            alone = gumbel(seed, Purpose.CHOICE, [position], torch.tensor([candidate]))
            assert alone.item() == together[row, column].item()
    assert together.isfinite().all()


def test_argmax_with_gumbel_noise_draws_from_the_distribution() -> None:
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    draws = (p.log() + gumbel(11, Purpose.CHOICE, range(6000), torch.arange(6))).argmax(dim=1)
    counts = torch.bincount(draws, minlength=6)
    assert chi_square(counts, p * 6000) < 4
    assert chi_square(counts, p.sqrt() / p.sqrt().sum() * 6000) > 50  # the test tells distributions apart


@given(
    logits=st.lists(st.integers(-40, 40), min_size=2, max_size=40, unique=True),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
)
@settings(max_examples=200, deadline=None)
def test_warping_is_that_of_transformers(logits: list[int], temperature: float, top_k: int, top_p: float) -> None:
    scores = torch.tensor([logits], dtype=torch.float64) / 4
    ours = warp(scores, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
    theirs = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    # a nucleus whose edge is decided by rounding may legitimately differ: such a top_p is skipped
    sums = theirs.softmax(dim=-1).sort(descending=True).values.cumsum(dim=-1)
    if top_p < 1:
        if (sums - top_p).abs().min() < 1e-9:
            return
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours.exp(), theirs.softmax(dim=-1), rtol=1e-12, atol=1e-15)


def test_a_nucleus_larger_than_the_guess_is_found() -> None:
    torch.manual_seed(0)
    logits = torch.stack([torch.randn(2000) * 0.1, torch.randn(2000) * 20]).double()  # a broad one, a narrow one
    ours = warp(logits, SamplingParams(temperature=1.0, top_p=0.9))
    theirs = TopPLogitsWarper(0.9)(None, logits)
    assert torch.equal(ours.isinf(), theirs.isinf())
    assert (~ours[0].isinf()).sum() > 1000 and (~ours[1].isinf()).sum() < 256


def test_ties_at_an_edge_are_kept_together() -> None:
    p = warp(torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]), SamplingParams(temperature=1.0, top_k=2)).exp()
    assert (p > 0).tolist() == [True, True, True, True, False] and math.isclose(p.sum().item(), 1, rel_tol=1e-6)
    p = warp(torch.tensor([0.4, 0.2, 0.2, 0.2]).log(), SamplingParams(temperature=1.0, top_p=0.5)).exp()
    assert (p > 0).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature: float, dtype: torch.dtype) -> None:
    log_p = warp(torch.tensor([1.0, 30.0, 29.0], dtype=dtype), SamplingParams(temperature=temperature))
    assert log_p.exp().tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("top_k", True),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("a", "")),
        ("stop", "abc"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert field in str(error.value) and repr(value) in str(error.value)


def test_the_limits_themselves_are_allowed() -> None:
    SamplingParams(max_new_tokens=1, temperature=0, top_p=1, top_k=0, seed=0)
    params = SamplingParams(seed=2**63 - 1, stop=["a", "b"])  # type: ignore[arg-type]
    assert params.stop == ("a", "b")
