"""The engine's contract: what it refuses, what it reports, where it stops."""

import math

import pytest
import torch
from conftest import byte_tokenizer, make_tiny_head, make_tiny_target
from transformers import AddedToken

from draft.errors import UserError
from serving.engine import Engine, SamplingParams, SpeculationStats, Token
from serving.engine.sequence import Sequence, special_ids


@pytest.fixture(scope="module")
def engine() -> Engine:
    target = make_tiny_target(max_length=64)
    return Engine(target, make_tiny_head(target))


def encode(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False).input_ids


def sequence(params: SamplingParams, prompt: str = "x") -> Sequence:
    tokenizer, eos_ids = byte_tokenizer(), frozenset([2])
    return Sequence(encode(prompt), params, tokenizer, eos_ids, special_ids(tokenizer, eos_ids))


def feed(state: Sequence, ids: list[int]) -> list[str]:
    """Append until the sequence ends; the texts of its tokens."""
    texts = []
    for token_id in ids:
        texts.append(state.append(token_id, -1.0, None).text)
        if state.finish_reason:
            break
    return texts


def test_a_stop_string_across_tokens_ends_the_text_after_it() -> None:
    state = sequence(SamplingParams(stop=("zzz", "END")))
    assert feed(state, encode("the END of")) == list("the END")
    assert state.text == "the END" and state.finish_reason == "stop_sequence"


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    state = sequence(SamplingParams(stop=("END",), max_new_tokens=4), prompt="EN")
    feed(state, encode("Done"))
    assert state.text == "Done" and state.finish_reason == "length"


def test_the_order_of_stopping_is_eos_stop_string_length() -> None:
    state = sequence(SamplingParams(stop=("b",), max_new_tokens=2))
    feed(state, encode("ab"))
    assert state.finish_reason == "stop_sequence"
    state = sequence(SamplingParams(max_new_tokens=2))
    feed(state, [*encode("a"), 2])
    assert state.finish_reason == "eos_token" and state.text == "a"
    assert [(token.special, token.text) for token in state.tokens] == [(False, "a"), (True, "<|im_end|>")]


def test_characters_of_several_tokens_appear_when_they_are_whole() -> None:
    state = sequence(SamplingParams())
    assert feed(state, encode("é日!")) == ["", "é", "", "", "日", "!"]
    assert state.text == "é日!"
    # cut inside a character: the rest is shown as the tokenizer shows it
    state = sequence(SamplingParams(max_new_tokens=3))
    assert "".join(feed(state, encode("é日!"))) == state.text == byte_tokenizer().decode(encode("é日!")[:3])


def test_special_tokens_that_are_only_added_are_not_in_the_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True)])
    assert 259 not in tokenizer.all_special_ids and 259 in special_ids(tokenizer, frozenset())
    state = Sequence([5], SamplingParams(max_new_tokens=9), tokenizer, frozenset(), special_ids(tokenizer, frozenset()))
    feed(state, [*encode("a"), 259, *encode("b")])
    assert state.text == "ab" == tokenizer.decode([*encode("a"), 259, *encode("b")], skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(3))
def test_the_text_is_that_of_the_tokens(engine: Engine, seed: int) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=3.0, seed=seed, ignore_eos=True)
    streamed: list[Token] = []
    completion = engine.generate(encode("Hello"), params, on_token=streamed.append)
    assert streamed == completion.tokens and [token.id for token in streamed] == completion.token_ids
    assert completion.text == engine.target.decode(completion.token_ids)
    assert completion.text == "".join(token.text for token in streamed if not token.special)


def test_logprobs_are_the_targets_before_warping(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=8, temperature=0.5, top_k=3, seed=1, ignore_eos=True)
    completion = engine.generate([50, 60], params)
    ids = torch.tensor([completion.prompt_ids + completion.token_ids])
    with torch.inference_mode():
        expected = engine.target.model(ids).logits.log_softmax(dim=-1)[0, 1:-1]
    for token, row in zip(completion.tokens, expected, strict=True):
        assert math.isclose(token.logprob, row[token.id].item(), abs_tol=1e-9)


def test_counts_are_consistent(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=30, temperature=2.5, seed=4, ignore_eos=True)
    completion = engine.generate([50, 60], params, speculation_length=4)
    stats = completion.stats
    assert stats.emitted == 29 and stats.emitted == stats.accepted + stats.verifications
    assert stats.acceptance_length == stats.emitted / stats.verifications
    assert sum(stats.drafted_per_position) == stats.drafted and sum(stats.accepted_per_position) == stats.accepted
    assert len(stats.drafted_per_position) == len(stats.accepted_per_position) == 4
    positions = [token.accepted_position for token in completion.tokens]
    assert positions[0] is None  # the prefill's
    for index, count in enumerate(stats.accepted_per_position):
        assert positions.count(index) == count
    assert stats.accepted > 0 and stats.prefill_seconds > 0 and stats.decode_seconds > 0


def test_counts_by_hand() -> None:
    def tokens(positions: list[int | None]) -> list[Token]:
        return [Token(5, "", -1.0, False, position) for position in positions]

    stats = SpeculationStats()
    assert math.isnan(stats.acceptance_length)
    stats.count(drafted=3, tokens=tokens([0, 1, None]))
    stats.count(drafted=3, tokens=tokens([None]))
    stats.count(drafted=1, tokens=tokens([0]))  # ended by the drafted token
    assert stats.drafted_per_position == [3, 2, 2] and stats.accepted_per_position == [2, 1, 0]
    assert (stats.verifications, stats.drafted, stats.accepted, stats.emitted) == (3, 7, 3, 5)
    assert stats.acceptance_length == 5 / 3


def test_a_plain_engine_needs_no_head(engine: Engine) -> None:
    plain = Engine(engine.target)
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    completion = plain.generate([50], params)
    assert completion.token_ids == engine.generate([50], params).token_ids
    assert completion.stats.drafted == 0 and completion.stats.acceptance_length == 1 and completion.seed is None


def test_cancelling_ends_the_request_with_what_it_has(engine: Engine) -> None:
    seen: list[Token] = []
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    completion = engine.generate([50], params, on_token=seen.append, cancelled=lambda: len(seen) >= 3)
    assert completion.finish_reason == "cancelled" and 3 <= len(completion.tokens) < 10
    # and the engine serves the next one as if nothing had been
    whole = engine.generate([50], params)
    assert whole.token_ids[: len(seen)] == completion.token_ids and whole.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "count", "numbers"),
    [([], 5, ["empty"]), ([5] * 60, 5, ["60", "5", "64", "4"]), ([5, 259], 5, ["259", "258"]), ([-1], 5, ["-1"])],
)
def test_prompts_that_cannot_be_served_are_refused(
    engine: Engine, prompt: list[int], count: int, numbers: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        engine.generate(prompt, SamplingParams(max_new_tokens=count))
    assert all(number in str(error.value) for number in numbers)


def test_options_out_of_range_are_refused(engine: Engine) -> None:
    for options, value in (
        ({"speculation_length": -1}, "-1"),
        ({"speculation_length": 33}, "33"),
        ({"rule": "typical"}, "'typical'"),
        ({"max_length": 65}, "65"),
    ):
        with pytest.raises(UserError, match=value):
            Engine(engine.target, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="33"):
        engine.generate([5], SamplingParams(max_new_tokens=2), speculation_length=33)
    with pytest.raises(UserError, match="typical"):
        engine.generate([5], SamplingParams(max_new_tokens=2), rule="typical")
    assert Engine(engine.target, max_length=32).max_length == 32


def test_a_head_of_another_shape_is_refused(engine: Engine) -> None:
    head = make_tiny_head(engine.target)
    head.config.hidden_size = 64
    with pytest.raises(UserError, match="64.*32"):
        Engine(engine.target, head)


def test_a_head_of_another_dtype_drafts(engine: Engine) -> None:
    mixed = Engine(engine.target, make_tiny_head(engine.target).to(torch.float32))
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    assert mixed.generate([50], params).token_ids == engine.generate([50], params).token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_decode(dtype: torch.dtype) -> None:
    target = make_tiny_target(dtype=dtype, max_length=64)
    engine = Engine(target, make_tiny_head(target))
    for temperature in (0.0, 1.0):
        for rule in ("shared-noise", "rejection"):
            params = SamplingParams(max_new_tokens=6, temperature=temperature, seed=0, ignore_eos=True)
            completion = engine.generate([50, 60], params, rule=rule)
            assert len(completion.token_ids) == 6 and all(math.isfinite(t.logprob) for t in completion.tokens)
