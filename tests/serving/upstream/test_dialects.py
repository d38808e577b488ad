"""Events, figures and metrics as vLLM, SGLang and llama.cpp give them."""

import asyncio
import math
from typing import Any

import pytest

from draft.errors import UserError
from serving.backend import DraftCounts
from serving.engine import SamplingParams, Speculation
from serving.upstream.dialects import DIALECTS, BadAnswer, read_chunk, server_events, speculation_stats
from serving.upstream.figures import drafts_between, read_figures

VLLM, SGLANG, OURS = DIALECTS["vllm"], DIALECTS["sglang"], DIALECTS["draftsmith"]


def test_sglang_gets_no_seed_and_no_alternatives_and_its_own_word_for_stop_strings():
    for params, name in (({"seed": 3, "temperature": 1.0}, "seed"), ({"logprobs": 2}, "top_logprobs")):
        with pytest.raises(UserError, match=name):
            SGLANG.check(SamplingParams(4, **params))
        VLLM.check(SamplingParams(4, **params))
    SGLANG.check(SamplingParams(4, seed=3, logprobs=0))  # greedy: no seed has an effect
    body = SGLANG.body("m", [1, 2], SamplingParams(4, logprobs=0, stop=["a"]), Speculation(), 3)
    assert body["no_stop_trim"] is True and "include_stop_str_in_output" not in body
    assert "return_tokens_as_token_ids" not in body and "seed" not in body


def test_a_seed_is_drawn_only_where_it_gives_the_text_again():
    assert OURS.reproduces and not VLLM.reproduces and VLLM.seeds


def test_only_draft_serve_gets_the_options_of_speculation():
    for dialect, speculation, sent in (
        (VLLM, Speculation(num_tokens=2), None),
        (OURS, Speculation(num_tokens=2, rule="rejection"), {"num_tokens": 2, "rule": "rejection"}),
        (OURS, Speculation(enabled=False, num_tokens=0), {"num_tokens": 0}),
        (OURS, Speculation(num_tokens=5), {}),  # what it does anyway
    ):
        assert dialect.body("m", [1], SamplingParams(4), speculation, 5).get("speculative") == sent


def test_every_value_is_sent_since_servers_have_defaults_of_their_own():
    body = VLLM.body("m", [1], SamplingParams(4), Speculation(), 0)
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
               "frequency_penalty": 0.0, "temperature": 0.0, "max_tokens": 4, "min_tokens": 0}  # fmt: skip
    assert body == body | neutral


def test_a_piece_of_vllm_s():
    logprobs = {"tokens": ["token_id:7", "token_id:9"], "token_logprobs": [-3.0, -0.5], "text_offset": [0, 1],
                "top_logprobs": [{"token_id:7": -3.0, "token_id:1": -0.1, "token_id:2": -0.2},
                                 {"token_id:9": -0.5}]}  # fmt: skip
    choice = {
        "index": 0,
        "text": "ab",
        "token_ids": [7, 9],
        "logprobs": logprobs,
        "finish_reason": "stop",
        "stop_reason": 9,
    }
    chunk = read_chunk({"choices": [choice]}, 2)
    assert chunk.tokens == [(7, -3.0, [(1, -0.1), (2, -0.2)]), (9, -0.5, [(9, -0.5)])]
    assert (chunk.finish_reason, chunk.stop_reason) == ("stop", 9)
    assert read_chunk({"choices": [choice]}, 0).tokens == [(7, -3.0, None), (9, -0.5, None)]
    assert read_chunk({"choices": [choice]}, None).tokens == [(7, None, None), (9, None, None)]
    last = {"index": 0, "text": "", "token_ids": [], "finish_reason": "stop", "matched_stop": "zz"}  # SGLang's
    assert read_chunk({"choices": [last]}, None).stop_reason == "zz"


WRONG = [
    ({"index": 0, "text": "ab"}, None),
    ({"index": 0, "text": "ab", "token_ids": [7]}, 0),
    ({"index": 0, "text": "ab", "token_ids": [7], "logprobs": {"token_logprobs": []}}, 0),
    ({"index": 0, "token_ids": [7], "logprobs": {"token_logprobs": [-1], "top_logprobs": [{"a": -1}]}}, 1),
]


@pytest.mark.parametrize(("choice", "logprobs"), WRONG, ids=str)
def test_a_piece_of_another_form_is_an_error(choice, logprobs):
    with pytest.raises(BadAnswer):
        read_chunk({"choices": [choice]}, logprobs)


def test_figures_of_a_request():
    """Seven tokens after the first: two verifications with drafts gave five of them, two plain ones the rest."""
    figures = {"acceptance_histogram": [0, 1, 1, 0], "num_draft_tokens": 5, "num_spec_tokens": 3,
               "acceptance_histogram_by_draft_length": {"2": [0, 1, 0], "3": [0, 0, 1, 0]}}  # fmt: skip
    stats = speculation_stats(figures, 7)
    assert (stats.drafted, stats.accepted, stats.emitted, stats.verifications) == (5, 3, 7, 4)
    assert stats.drafted_per_position == [2, 2, 1] and stats.accepted_per_position == [2, 1, 0]
    del figures["acceptance_histogram_by_draft_length"]
    assert speculation_stats(figures, 7).accepted == 3
    assert stats.known and not speculation_stats(None, 7).known


def stream(*parts: bytes) -> list[Any]:
    async def source():
        for part in parts:
            yield part

    async def read():
        return [event async for event in server_events(source())]

    return asyncio.run(read())


def test_events_end_at_line_feeds_only():
    text = "a\u2028b\x85c"
    data = f'data: {{"text": "{text}"}}\r\n\r\n: a comment\n\ndata:{{"text": "d"}}\n\ndata: [DONE]\n\n'.encode()
    for size in (1, 7, 1000):
        parts = [data[start : start + size] for start in range(0, len(data), size)]
        assert stream(*parts) == [{"text": text}, {"text": "d"}]
    for broken in (b'data: {"text": "a"}\n\n', b"data: {\n\n"):
        with pytest.raises(BadAnswer):
            stream(broken)


VLLM_METRICS = """
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="a}b"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="a}b"} 30.0
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0",model_name="a}b"} 1.7e+09
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="a}b"} 120.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="a}b"} 50.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a}b",position="1"} 20.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="a}b",position="0"} 30.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="a}b"} 0.25
"""
SGLANG_METRICS = """
# TYPE sglang:spec_accept_length gauge
sglang:spec_accept_length{engine_type="unified",model_name="m"} 2.75
# TYPE sglang:spec_num_steps gauge
sglang:spec_num_steps{model_name="m"} 3
# TYPE sglang:token_usage gauge
sglang:token_usage{model_name="m"} 0.5
"""


def test_figures_of_vllm_and_sglang():
    figures = read_figures(VLLM_METRICS)
    counts = figures.counts
    assert (counts.drafts, counts.drafted, counts.accepted) == (40, 120, 50)
    assert counts.accepted_per_position == (30, 20) and counts.acceptance_length == 1 + 50 / 40
    assert (figures.longest_draft, figures.cache_usage) == (2, 0.25)
    figures = read_figures(SGLANG_METRICS)
    assert (figures.longest_draft, figures.cache_usage, figures.counts.acceptance_length) == (3, 0.5, 2.75)
    assert figures.counts.drafts is None
    empty = read_figures("")
    assert math.isnan(empty.counts.acceptance_length) and empty.longest_draft == 0
    with pytest.raises(ValueError):
        read_figures("<html>")


def test_verifications_between_two_readings():
    first, second = DraftCounts(10, 30, 5), DraftCounts(20, 60, 12)
    between = drafts_between(first, second, 100)
    assert len(between) == 10 and {depth for depth, _ in between} == {3}
    assert sum(accepted for _, accepted in between) == 7 and max(accepted for _, accepted in between) == 1
    assert len(drafts_between(first, second, 4)) == 4
    assert drafts_between(second, first, 100) == []  # it was started again
    assert drafts_between(DraftCounts(), second, 100) == [] == drafts_between(second, second, 100)
