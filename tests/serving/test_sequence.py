"""The end of an answer, the part of it that is kept, and its release, against an oracle that sees all at once."""

from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import pytest
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AddedToken, PreTrainedTokenizerFast

from serving.engine.answer import GrowingAnswer, special_ids
from serving.engine.request import SpeculationStats, Token
from serving.engine.sampling import SamplingParams

BYTES, TOKENIZER = byte_tokenizer(), byte_tokenizer()
EOS = 2
SPECIAL = special_ids(TOKENIZER, frozenset([EOS]))


def encode(text: str) -> list[int]:
    return BYTES(text, add_special_tokens=False).input_ids  # bytes only


# tokens of several characters, and halves of characters
PIECES = ["ab", "aba", "b", "b日", "é!", "ENDE"]
TOKENIZER.add_tokens([AddedToken(piece, normalized=False) for piece in PIECES])
PIECE_IDS = TOKENIZER.convert_tokens_to_ids(PIECES)
TOKEN_IDS = [*PIECE_IDS, *encode("aabEND é日!"), 1]


def sequence(params: SamplingParams, prompt: str = "x") -> GrowingAnswer:
    return GrowingAnswer(encode(prompt), params, TOKENIZER, frozenset([EOS]), SPECIAL)


def feed(state: GrowingAnswer, ids: list[int]) -> list[Token]:
    """Append until the sequence ends; what was released after each token."""
    released = []
    for index, token_id in enumerate(ids):
        state.append(token_id, -float(index), [(token_id, -float(index))], index % 3)
        released += [replace(token) for token in state.release()]
        if state.finish_reason:
            break
    return released


def texts(tokens: list[Token]) -> list[str]:
    return [token.text for token in tokens if not token.special]


class Ending(NamedTuple):
    """The end of an answer: the first `count` tokens are kept."""

    text: str
    count: int
    finish_reason: str | None = None
    stop_reason: str | int | None = None


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def certain(text: str) -> str:
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def first_match(text: str, begin: int, stops: tuple[str, ...]) -> tuple[int, int, str] | None:
    """Try every end, and every stop string there."""
    for end in range(begin, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if end - len(stop) >= begin and text[:end].endswith(stop):
                return end - len(stop), end, stop
    return None


def ending(ids: list[int], params: SamplingParams) -> Ending:
    """The oracle: decodes everything again after each token, searches all of it, and cuts."""
    starts, before, begin = [], "", 0
    for count, token_id in enumerate(ids, 1):
        starts.append(len(before))
        if token_id == EOS and not params.ignore_eos:
            return Ending(decode(ids[:count]), count, "eos_token")
        if token_id in params.stop_ids:
            kept = count if params.keep_stop else count - 1
            return Ending(decode(ids[:kept]), kept, "stop_sequence", token_id)
        last = count == params.max_new_tokens
        text = decode(ids[:count]) if last else certain(decode(ids[:count]))
        if count <= params.min_new_tokens:
            begin = len(text)
        elif match := first_match(text, begin, params.stop):
            cut = match[1] if params.keep_stop else match[0]
            kept = max(params.min_new_tokens, sum(start < cut for start in starts))
            return Ending(text[:cut], kept, "stop_sequence", match[2])
        if last:
            return Ending(text, count, "length")
        before = text
    return Ending(before, len(ids))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], SamplingParams]:
    token = st.sampled_from([*TOKEN_IDS, EOS] if draw(st.booleans()) else TOKEN_IDS)
    ids = draw(st.lists(token, min_size=1, max_size=30))
    pieces = st.text(alphabet="abEND é日!", min_size=1, max_size=4)
    stops = draw(st.lists(pieces | st.sampled_from(["END", "aba", "bab", "日", "é!", "abab"]), max_size=3))
    if draw(st.booleans()):  # a stop string that is in the text
        text = decode(ids).replace("\N{REPLACEMENT CHARACTER}", "")  # when that is certain, the oracle does not say
        place = draw(st.integers(0, max(0, len(text) - 1)))
        stops += [text[place : place + draw(st.integers(1, 5))] or "a"]
    limit = draw(st.integers(1, 35))
    params = SamplingParams(
        max_new_tokens=limit,
        min_new_tokens=draw(st.sampled_from([0, 0, min(limit, 3), limit])),
        stop=stops,  # type: ignore[arg-type]
        stop_ids=draw(st.lists(st.sampled_from([*TOKEN_IDS, EOS]), max_size=1)),  # type: ignore[arg-type]
        keep_stop=draw(st.booleans()),
        ignore_eos=draw(st.booleans()),
    )
    return ids, params


@given(case=cases())
@settings(max_examples=300)
def test_an_answer_ends_where_an_oracle_ends_it(case):
    ids, params = case
    expected = ending(ids, params)
    state = sequence(params)
    released = feed(state, ids)
    if expected.finish_reason is None:
        assert state.finish_reason is None and certain(state.text) == certain(expected.text)
        state.cancel()
        released += [replace(token) for token in state.release()]
        assert state.finish_reason == "cancelled"
    else:
        state.cancel()  # does not end what has ended
        assert (state.finish_reason, state.stop_reason) == (expected.finish_reason, expected.stop_reason)
        assert state.text == expected.text
    # tokens, logprobs and what else they carry go together
    assert [token.id for token in state.tokens] == ids[: expected.count]
    assert [(t.logprob, t.top, t.accepted_position) for t in state.tokens] == [
        (-float(index), [(ids[index], -float(index))], index % 3) for index in range(expected.count)
    ]
    assert "".join(texts(state.tokens)) == state.text
    # each was released once, in order, as it was then
    assert released == state.tokens and state.release() == []


def test_text_is_held_back_only_while_it_may_be_a_stop_string():
    for keep_stop in (False, True):
        state = sequence(SamplingParams(stop=("END",), keep_stop=keep_stop))
        steps = []
        for token_id in encode("a ENEND"):
            state.append(token_id)
            steps.append("".join(texts(state.release())))
        assert steps == (list("a ENEND") if keep_stop else ["a", " ", "", "", "EN", "", ""])
        assert state.text == ("a ENEND" if keep_stop else "a EN") and state.stop_reason == "END"


A, B = encode("ab")


def test_characters_of_several_tokens_appear_when_they_are_whole():
    state = sequence(SamplingParams())
    assert texts(feed(state, encode("é日!"))) == ["", "é", "", "", "日", "!"]
    assert state.text == "é日!"
    # cut inside a character: the rest is shown as the tokenizer shows it
    for ids in (encode("é日!")[:3], [*encode("é日!")[:3], EOS]):
        state = sequence(SamplingParams(max_new_tokens=len(ids)))
        assert "".join(texts(feed(state, ids))) == state.text == decode(ids)
    # bytes that are no characters are not waited for
    stray = BYTES.convert_tokens_to_ids(BYTES.tokenize("é")[1])  # never begins a character
    state = sequence(SamplingParams())
    released = texts(feed(state, [stray] * 100))
    assert state.text == "\N{REPLACEMENT CHARACTER}" * 97 and len(released) == 99


@given(ids=st.lists(st.integers(3, 258) | st.sampled_from(encode("é日")), max_size=60))
@settings(max_examples=150)
def test_any_bytes_give_the_text_of_the_tokenizer_at_a_bounded_cost(ids):
    state = sequence(SamplingParams(max_new_tokens=61))
    with patch.object(TOKENIZER, "decode", side_effect=TOKENIZER.decode) as decoded:
        feed(state, [*ids, EOS])
    assert state.text == "".join(texts(state.tokens)) == decode(ids)
    assert all(len(call.args[0]) <= 30 for call in decoded.call_args_list)
    assert decoded.call_count <= 3 * len(ids) + 2


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """The kind that Llama 2, Mistral and Gemma have: characters that the vocabulary lacks become tokens of a byte."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ab.é"]
    model = models.BPE({word: place for place, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


FALLBACK = byte_fallback_tokenizer()


@settings(deadline=None)
@given(st.text("ab. é日🎉🙂", min_size=1, max_size=60), st.integers(0, 20))
def test_characters_of_several_byte_tokens_are_whole(text, asked):
    """Wherever in them the last few tokens begin that are decoded again, and wherever the prompt ends."""
    ids = FALLBACK(text, add_special_tokens=False).input_ids
    starts = [place for place in range(min(asked, len(ids)) + 1) if "\ufffd" not in FALLBACK.decode(ids[:place])]
    prompt = [1, *ids[: starts[-1]]]
    special = special_ids(FALLBACK, frozenset([EOS]))
    params = SamplingParams(max_new_tokens=len(ids) + 1)
    state = GrowingAnswer(prompt, params, FALLBACK, frozenset([EOS]), special)
    released = feed(state, [*ids[starts[-1] :], EOS])
    before, whole = (FALLBACK.decode(each, skip_special_tokens=True) for each in (prompt, prompt + ids[starts[-1] :]))
    assert state.text == "".join(texts(released)) == whole[len(before) :]


@pytest.mark.parametrize(("least", "count", "reason"), [(0, 2, "stop_sequence"), (3, 4, "eos_token")])
@pytest.mark.parametrize("keep", [True, False])
def test_a_special_token_may_be_a_stop_string(least, count, reason, keep):
    """It is in no text, where stop strings are looked for; below min_new_tokens it counts as little as any other."""
    (stop,) = TOKENIZER.convert_ids_to_tokens([1])
    params = SamplingParams(max_new_tokens=9, stop=("zz", stop), min_new_tokens=least, keep_stop=keep)
    state = sequence(params)
    feed(state, [A, 1, B, EOS])
    assert state.finish_reason == reason and state.stop_reason == (stop if reason == "stop_sequence" else None)
    assert state.text == ("a" if reason == "stop_sequence" else "ab")
    assert len(state.tokens) == (count if keep or reason == "eos_token" else count - 1)


def test_a_stop_id_comes_before_the_stop_string_of_the_same_token():
    (stop,) = TOKENIZER.convert_ids_to_tokens([1])
    state = sequence(SamplingParams(max_new_tokens=9, stop=(stop,), stop_ids=(1,)))
    feed(state, [A, 1, B])
    assert (state.finish_reason, state.stop_reason, state.text) == ("stop_sequence", 1, "a")


def test_special_tokens_that_are_only_added_are_not_in_the_text():
    tokenizer, none = byte_tokenizer(), frozenset[int]()
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True)])
    assert 259 not in tokenizer.all_special_ids and 259 in special_ids(tokenizer, none)
    state = GrowingAnswer([5], SamplingParams(max_new_tokens=9), tokenizer, none, special_ids(tokenizer, none))
    feed(state, [A, 259, B])
    assert state.text == "ab" == tokenizer.decode([A, 259, B], skip_special_tokens=True)


def test_figures_are_settled_when_a_stop_string_takes_tokens_back():
    stats = SpeculationStats()
    stats.count(depth=3, drafted=3, accepted=2, emitted=3)
    stats.count(depth=2, drafted=2, accepted=1, emitted=2)
    for kept, accepted in ((5, [2, 1, 0]), (1, [1, 0, 0])):
        stats.settle(kept)
        assert (stats.emitted, stats.accepted, stats.accepted_per_position) == (kept, sum(accepted), accepted)
    assert (stats.verifications, stats.drafted, stats.drafted_per_position) == (2, 5, [2, 2, 1])
