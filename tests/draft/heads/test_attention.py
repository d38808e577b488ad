"""The ways to attend in training agree, and the long ones keep no scores."""

import pytest
import torch

from draft.heads.unroll import CHUNK, DENSE_TOKENS, attend_unrolled

BATCH, HEADS, DIM = 2, 2, 16


def random_step(tokens, generator, dtype=torch.float64):
    shape = 3, BATCH, HEADS, tokens, DIM
    return torch.randn(shape, generator=generator, dtype=dtype).unbind()


def segments_of(tokens, kind):
    """Packed: conversations of different lengths, then padding, not where blocks end; padded: one a row."""
    if kind is None:
        return None
    if kind == "padded":
        return (torch.arange(tokens) < torch.tensor([[tokens - 5], [tokens // 2]])).long()
    ends = torch.tensor([[7, tokens // 3, tokens - 9], [tokens // 2, tokens // 2 + 1, tokens - 1]])
    numbers = 1 + (torch.arange(tokens) >= ends[:, :, None]).sum(1)
    return numbers.masked_fill(numbers == 4, 0)


def by_hand(query, steps, segments):
    """Each entry's softmax over the keys that it sees, one at a time: [batch, heads, tokens, dim]."""
    mixed = torch.zeros_like(query)
    for row in range(BATCH):
        for entry in range(query.shape[2]):
            number = None if segments is None else segments[row, entry]
            seen = [j for j in range(entry + 1) if segments is None or segments[row, j] == number]
            keys = torch.cat([steps[0][0][row][:, seen], *[key[row][:, entry, None] for key, _ in steps[1:]]], dim=1)
            values = torch.cat([steps[0][1][row][:, seen], *[value[row][:, entry, None] for _, value in steps[1:]]], 1)
            scores = (keys @ query[row, :, entry, :, None])[..., 0] * DIM**-0.5
            mixed[row, :, entry] = (scores.softmax(-1)[..., None] * values).sum(1)
    return mixed


@pytest.mark.parametrize("chunk", [None, 64])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", [None, "padded", "packed"])
def test_dense_and_chunked_attention_are_the_formula(kind, steps, chunk):
    generator = torch.Generator().manual_seed(1)
    drawn = [random_step(150, generator) for _ in range(steps)]
    query, (base, *own) = drawn[-1][0], [(key, value) for _, key, value in drawn]
    segments = segments_of(150, kind)
    mixed = attend_unrolled(query, base, own, segments, chunk=chunk)
    expected = by_hand(query, [base, *own], segments)
    torch.testing.assert_close(mixed, expected, atol=1e-12, rtol=0)
    places = torch.stack([torch.randperm(150, generator=generator)[:90].sort().values for _ in range(BATCH)])
    at = places[:, None, :, None]
    wanted = [[torch.take_along_dim(each, at, 2) for each in pair] for pair in own]
    some = attend_unrolled(torch.take_along_dim(query, at, 2), base, wanted, segments, places, chunk)
    torch.testing.assert_close(some, torch.take_along_dim(expected, at, 2), atol=1e-12, rtol=0)


def test_chunks_have_the_same_gradients():
    gradients = []
    for chunk in (None, 40):
        generator = torch.Generator().manual_seed(2)
        drawn = [tensor.requires_grad_() for step in range(2) for tensor in random_step(150, generator)]
        segments = segments_of(150, "packed")
        mixed = attend_unrolled(drawn[3], (drawn[1], drawn[2]), [(drawn[4], drawn[5])], segments, chunk=chunk)
        mixed.square().sum().backward()
        gradients.append([tensor.grad for tensor in drawn if tensor.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_long_texts_keep_no_scores():
    """The memory of autograd grows with the tokens, not with their square."""
    tokens = DENSE_TOKENS + CHUNK + 3
    saved = []

    def note(tensor):
        saved.append(tensor.numel())
        return tensor

    drawn = [torch.randn(1, 1, tokens, DIM, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attend_unrolled(drawn[0], (drawn[1], drawn[2]), [], None).sum().backward()
    assert saved and max(saved) < tokens * CHUNK * 1.01 < tokens**2 / 2
