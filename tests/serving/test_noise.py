"""The random numbers against what is known of them, and the shortcuts against the whole computation."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from enumeration import deviations
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine import noise
from serving.engine.noise import GROUP, Purpose, _stream, choose, gumbel, uniform


def test_the_stream_is_splitmix64():
    # the first outputs of the published generator for the seed 0
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [_stream(0, counter) for counter in range(3)] == expected
    assert [bits % 2**64 for bits in noise._stream_tensor(0, torch.arange(3)).tolist()] == expected
    assert noise._stream_array(np.zeros(3, dtype=np.uint64), np.arange(3, dtype=np.uint64)).tolist() == expected


@given(key=st.integers(0, 2**64 - 1), counter=st.integers(0, 2**40))
def test_the_stream_of_tensors_and_arrays_is_that_of_integers(key, counter):
    tensor = noise._stream_tensor(key, torch.tensor([counter]))
    array = noise._stream_array(np.array([key], dtype=np.uint64), np.array([counter], dtype=np.uint64))
    assert tensor.item() % 2**64 == _stream(key, counter) == array.item()
    assert noise._unit(tensor).item() == noise._unit_array(array).item()


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("purpose", list(Purpose))
def test_uniform_numbers_fill_the_interval_evenly(seed, purpose):
    numbers = uniform(seed, purpose, range(100), torch.arange(400))  # [100, 400]
    assert numbers.min() > 0 and numbers.max() < 1
    counts = torch.histc(numbers.flatten(), bins=100, min=0, max=1)
    assert abs(deviations(counts.tolist(), [400.0] * 100)) < 5
    # and so does each position over candidates, and each candidate over positions
    assert (numbers.mean(dim=1) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / 400)
    assert (numbers.mean(dim=0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / 100)


def test_numbers_of_different_keys_are_uncorrelated():
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
@settings(max_examples=50)
def test_a_number_depends_on_its_key_only(seed, positions, candidates):
    together = gumbel(seed, Purpose.CHOICE, positions, torch.tensor(candidates))
    for row, position in enumerate(positions):
        for column, candidate in enumerate(candidates):
            alone = gumbel(seed, Purpose.CHOICE, [position], torch.tensor([candidate]))
            assert alone.item() == together[row, column].item()
    assert together.isfinite().all()


def test_noise_is_standard_gumbel_and_independent_within_and_across_groups():
    numbers = gumbel(3, Purpose.CHOICE, range(4000), torch.arange(3 * GROUP))  # [4000, 192]
    levels = torch.exp(-torch.exp(-numbers))  # uniform, if the noise is Gumbel
    largest = levels[:, :GROUP].amax(dim=1) ** GROUP
    for part in (largest, levels[:, 0], levels[:, 100], levels[:, 190], levels.flatten()):
        counts = torch.histc(part, bins=50, min=0, max=1)
        assert abs(deviations(counts.tolist(), [len(part) / 50] * 50)) < 5
    # every member of a group has its largest noise equally often
    winners = numbers[:, GROUP : 2 * GROUP].argmax(dim=1)
    assert abs(deviations(torch.bincount(winners, minlength=GROUP).tolist(), [4000 / GROUP] * GROUP)) < 5
    correlation = torch.corrcoef(levels.T) - torch.eye(3 * GROUP)
    assert correlation.abs().max() < 5.5 / math.sqrt(4000)


@pytest.mark.parametrize("purpose", [Purpose.CHOICE, Purpose.DRAFT])
def test_choosing_draws_from_the_distribution(purpose):
    log_p = torch.full((6000, 200), -torch.inf)
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    places = torch.tensor([3, 4, 63, 64, 130, 199])  # some share a group
    log_p[:, places] = p.log()
    counts = torch.bincount(choose(log_p, 7, range(6000), purpose), minlength=200)[places]
    assert counts.sum() == 6000 and deviations(counts.tolist(), (p * 6000).tolist()) < 4
    flatter = p.sqrt() / p.sqrt().sum()
    assert deviations(counts.tolist(), (flatter * 6000).tolist()) > 50  # the test tells distributions apart


def distributions(generator: torch.Generator, rows: int, vocab: int) -> torch.Tensor:
    """Log-probabilities of many kinds: flat, peaked, tied, truncated to a few; float32 or float64."""

    def draw(limit: float) -> float:
        return torch.rand((), generator=generator).item() * limit

    scale = (0.0, 1e-6, 1.0, 5.0, 60.0)[int(draw(5))]
    logits = torch.randn(rows, vocab, generator=generator, dtype=(torch.float32, torch.float64)[int(draw(2))]) * scale
    if draw(2) < 1:
        logits = logits.round()
    if draw(2) < 1:
        keep = torch.rand(rows, vocab, generator=generator) < draw(1) ** 3
        keep[torch.arange(rows), torch.randint(vocab, (rows,), generator=generator)] = True
        logits = logits.masked_fill(~keep, -torch.inf)
    return logits.log_softmax(dim=-1)


@given(
    seed=st.integers(0, 2**63 - 1), rows=st.integers(1, 8), vocab=st.integers(1, 700), data_seed=st.integers(0, 10**9)
)
@settings(max_examples=300)
def test_choosing_is_the_argmax_over_the_whole_vocabulary(seed, rows, vocab, data_seed):
    generator = torch.Generator().manual_seed(data_seed)
    log_p = distributions(generator, rows, vocab)
    positions = torch.randint(100_000, (rows,), generator=generator).tolist()
    scores = log_p + gumbel(seed, Purpose.CHOICE, positions, torch.arange(vocab))
    assert torch.equal(choose(log_p, seed, positions), scores.argmax(dim=1))


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_few_tokens_of_a_large_vocabulary_need_noise(scale):
    torch.manual_seed(0)
    log_p = (torch.randn(20, 49_152) * scale).log_softmax(dim=-1)
    with patch.object(noise, "_unit_array", side_effect=noise._unit_array) as unit:
        chosen = choose(log_p, 1, range(20))
    assert torch.equal(chosen, (log_p + gumbel(1, Purpose.CHOICE, range(20), torch.arange(49_152))).argmax(dim=1))
    assert sum(call.args[0].size for call in unit.call_args_list) < 20 * 49_152 / 20


def test_of_equals_the_first_is_chosen():
    # so large that the noise is rounded away
    log_p = torch.full((2, 300), -1e30, dtype=torch.float64)
    log_p[0, [70, 71, 200]] = log_p[1, [299, 5]] = 1e30
    assert choose(log_p, 4, [1, 2]).tolist() == [70, 5]
