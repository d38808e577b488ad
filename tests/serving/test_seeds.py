"""A seed gives the same tokens, whoever shares the batch and whatever is drafted: those that its noise defines."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import make_tiny_head
from exactness import ALL, MODES, PROCESSING, PROMPTS, engines, params, plainly, sampled_case
from oracle import serve
from tiny_targets import tiny

from serving.engine import Completion, Engine, Speculation
from serving.engine.noise import choose
from serving.engine.sampling import Processor


def same(ours: Completion, plain: Completion) -> None:
    assert ours.seed == plain.seed
    for one, other in zip(ours.tokens, plain.tokens, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-9)
        assert dict(one.top or []) == pytest.approx(dict(other.top or []), abs=1e-6)


@pytest.mark.parametrize("processing", PROCESSING)
def test_plain_answers_are_the_argmax_of_log_p_and_noise(processing: str) -> None:
    """By the definition, from one pass of transformers over the whole."""
    target = tiny("llama")
    for prompt in range(len(PROMPTS)):
        plain = plainly("llama", processing, prompt)
        options = params(14, seed=plain.seed or 2**40, **PROCESSING[processing])
        with torch.inference_mode():
            rows = target.model(torch.tensor([plain.prompt_ids + plain.token_ids])).logits[0]
            logits = rows[len(plain.prompt_ids) - 1 :]
        processor = Processor(options, plain.prompt_ids, target.vocab_size, target.eos_token_ids)
        for place, token in enumerate(plain.tokens):
            scores = processor.adjust(logits[place : place + 1], [[]])
            if options.temperature > 0:
                position = len(plain.prompt_ids) + place
                assert token.id == choose(processor.warp(scores), plain.seed or 0, [position]).item()
            else:
                assert token.id == scores.argmax().item()
            assert token.logprob == pytest.approx(logits[place].log_softmax(-1)[token.id].item(), abs=1e-9)
            processor.append(token.id)


@pytest.mark.parametrize(
    ("family", "mode"),
    [*(("llama", mode) for mode in MODES), (ALL[-1], "chain"), (ALL[-1], "tree of 16"), (ALL[-1], "auto")],
)
def test_a_seed_gives_the_same_answer_whatever_is_drafted(family: str, mode: str) -> None:
    names = list(itertools.product(PROCESSING, range(len(PROMPTS))))
    lengths = itertools.cycle(Speculation(num_tokens=count) for count in (None, 1, 3))
    cases = [
        sampled_case(family, *name, arrives=index % 5, speculation=speculation)
        for index, (name, speculation) in enumerate(zip(names, lengths, strict=False))
    ]
    for engine in engines(family, mode, max_batch=7, prefill_chunk=16):
        completions = serve(engine, cases)
        for name, completion in zip(names, completions, strict=True):
            same(completion, plainly(family, *name))
        if mode not in ("off", "auto"):
            # the shared noise makes even a random head agree now and then
            assert sum(c.stats.accepted for c in completions) > 0


def test_a_drawn_seed_is_reported_and_repeats_the_answer() -> None:
    engine = Engine(tiny("llama"), make_tiny_head(tiny("llama")), speculation="chain")
    for rule in ("shared-noise", "rejection"):
        options = params(10, temperature=1.5)
        first, second = engine.generate([[50]] * 2, options, Speculation(rule=rule))
        assert first.seed is not None and second.seed is not None and first.seed != second.seed
        assert first.token_ids != second.token_ids
        seeded = options.model_copy(update={"seed": first.seed})
        again = engine.generate([[60], [50]], seeded, Speculation(rule=rule))[1]
        assert again.token_ids == first.token_ids
