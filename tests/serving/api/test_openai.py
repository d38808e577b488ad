"""OpenAI's surface, in process: shapes, parameters, refusals."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from http_testing import MESSAGES, PROMPT, complete

from serving.api.app import create_app
from serving.engine import Engine, SamplingParams


def alone(target: Any, **params: Any) -> Any:
    params = {"max_new_tokens": 12, "keep_stop": False, **params}
    return Engine(target, speculation="off").generate([target.tokenizer(PROMPT).input_ids], SamplingParams(**params))[0]


def test_both_endpoints_answer_as_the_engine_does(client, tiny_target):
    plain = alone(tiny_target)
    told = complete(client)
    assert told["choices"][0]["text"] == plain.text and told["object"] == "text_completion"
    assert told["choices"][0]["finish_reason"] == {"eos_token": "stop"}.get(plain.finish_reason, plain.finish_reason)
    chat = complete(client, "chat/completions", max_tokens=None, max_completion_tokens=12)
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": plain.text, "refusal": None}
    usage, figures = chat["usage"], chat["metrics"]["speculative_decoding"]
    assert usage["prompt_tokens"] == len(plain.prompt_ids)
    assert usage["completion_tokens"] == len(plain.token_ids) == usage["total_tokens"] - usage["prompt_tokens"]
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == figures["num_accepted_draft_tokens"]
    drafted = details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"]
    assert drafted == figures["num_draft_tokens"] > 0 and len(figures["acceptance_histogram"]) == 6
    assert sum(figures["acceptance_histogram"]) == figures["num_spec_steps"]
    accepted = sum(count * steps for count, steps in enumerate(figures["acceptance_histogram"]))
    assert accepted == figures["num_accepted_draft_tokens"]
    assert figures["mean_acceptance_length"] == 1 + accepted / figures["num_spec_steps"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    "wishes", [{"temperature": 0.9, "seed": 3, "n": 3}, pytest.param({"n": 2}, marks=pytest.mark.contract)], ids=str
)
def test_a_stream_is_the_same_answer_in_parts(client, path, wishes):
    whole = complete(client, path, **wishes)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = complete(client, path, **wishes, **options)["events"]
    assert done == "[DONE]" and last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks) and len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        if "chat" in path:
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(each["delta"].get("content", "") for each in own) == choice["message"]["content"]
        else:
            assert "".join(each["text"] for each in own) == choice["text"]
        assert [each["finish_reason"] for each in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"] and own[-1]["seed"] == choice["seed"]
    without = complete(client, path, **wishes, stream=True)["events"]
    # the steps may be others, since drafts are planned by what is fast
    assert all("usage" not in each and each["choices"] for each in without[:-1]) and without[-1] == "[DONE]"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_token_ids_are_told_where_they_are_asked_for(client, tiny_target, path):
    """Under vLLM's names: of the prompt, and of each choice, with the token that ended it."""
    wishes = {"temperature": 0.9, "seed": 3, "n": 2, "max_tokens": 40}
    whole = complete(client, path, **wishes, return_token_ids=True)
    prompt = tiny_target.tokenizer(PROMPT).input_ids
    for choice in whole["choices"]:
        plain = alone(tiny_target, temperature=0.9, seed=choice["seed"], max_new_tokens=40)
        assert choice["token_ids"] == plain.token_ids
        assert (whole if "chat" in path else choice)["prompt_token_ids"] == prompt
    *chunks, done = complete(client, path, **wishes, return_token_ids=True, stream=True)["events"]
    for choice in whole["choices"]:
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        ids = [token for chunk in own for token in chunk["choices"][0].get("token_ids", [])]
        assert ids == choice["token_ids"]
        assert (own[0] if "chat" in path else own[0]["choices"][0])["prompt_token_ids"] == prompt
    without = complete(client, path, **wishes)
    assert "token_ids" not in without["choices"][0] and "prompt_token_ids" not in {**without, **without["choices"][0]}


def test_every_choice_has_its_own_seed_and_can_be_had_again(client):
    several = complete(client, prompt=["one ", "two "], n=2, temperature=1, seed=40)["choices"]
    assert [each["index"] for each in several] == [0, 1, 2, 3] and [each["seed"] for each in several] == [40, 41] * 2
    again = complete(client, prompt="two ", temperature=1, seed=41)["choices"][0]
    assert again["text"] == several[3]["text"]
    drawn = complete(client, temperature=1)["choices"][0]
    assert complete(client, temperature=1, seed=drawn["seed"])["choices"][0]["text"] == drawn["text"]


def test_prompts_as_token_ids_and_echo(client, tiny_target):
    ids = tiny_target.tokenizer("zebra ").input_ids
    text = complete(client, prompt="zebra ")["choices"][0]["text"]
    for prompt in (ids, [ids, ids], ["zebra ", "zebra "]):
        assert {each["text"] for each in complete(client, prompt=prompt)["choices"]} == {text}
        echoed = complete(client, prompt=prompt, echo=True)["choices"]
        assert {each["text"] for each in echoed} == {"zebra " + text}
    streamed = complete(client, prompt="zebra ", echo=True, stream=True)["events"][:-1]
    assert "".join(each["choices"][0]["text"] for each in streamed) == "zebra " + text


def test_logprobs(client, tiny_target):
    plain = alone(tiny_target, logprobs=2)
    told = complete(client, logprobs=2)["choices"][0]["logprobs"]
    shown = [token for token in plain.tokens if not token.special]
    assert told["tokens"] == [token.text for token in shown]
    assert told["token_logprobs"] == pytest.approx([token.logprob for token in shown])
    assert told["text_offset"] == [sum(len(t.text) for t in shown[:i]) for i in range(len(shown))]
    assert all(len(table) == 2 for table in told["top_logprobs"])
    assert complete(client, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] is None
    chat = complete(client, "chat/completions", logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert [each["logprob"] for each in chat] == pytest.approx(told["token_logprobs"])
    assert all(len(each["top_logprobs"]) == 2 for each in chat)
    streamed = complete(client, "chat/completions", logprobs=True, top_logprobs=2, stream=True)["events"][:-1]
    parts = [each["choices"][0]["logprobs"] for each in streamed]
    assert [token for part in parts if part for token in part["content"]] == chat
    assert all(each["choices"][0]["logprobs"] is None for each in [complete(client)])


def test_the_table_of_alternatives_has_the_token_that_was_drawn(client):
    """Also where it is none of the likeliest: clients look it up."""
    wishes = {"temperature": 1.5, "seed": 3, "return_tokens_as_token_ids": True}
    told = complete(client, logprobs=1, **wishes)["choices"][0]["logprobs"]
    pairs = list(zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True))
    assert all(table[token] == logprob for token, logprob, table in pairs)
    assert any(len(table) == 2 for _, _, table in pairs)


def test_the_text_of_the_drawn_token_is_its_own_in_the_table(client, monkeypatch):
    """Tokenizers with word-start markers give other tokens the same text."""
    for seed in range(50):  # until it is no piece of a character
        wishes = {"logprobs": 2, "temperature": 1.5, "seed": seed, "max_tokens": 1}
        told = complete(client, **wishes)["choices"][0]["logprobs"]
        if told["tokens"] and told["tokens"][0].isascii():
            break
    (text,), (logprob,) = told["tokens"], told["token_logprobs"]
    monkeypatch.setattr(client.app.state.service, "token_text", lambda token_id: (text, False))
    (table,) = complete(client, **wishes)["choices"][0]["logprobs"]["top_logprobs"]
    assert table[text] == logprob and len(table) == 3
    assert all(name.startswith("token_id:") for name in table if name != text)


def test_logprobs_with_tokens_by_their_ids(client, tiny_target):
    """As vLLM has them: of every token, the one that ended the answer too, with alternatives by id."""
    wishes = {"logit_bias": {"2": 100}, "min_tokens": 4}  # the fifth token ends the turn
    plain = alone(tiny_target, logit_bias={2: 100}, min_new_tokens=4, logprobs=2)
    told = complete(client, **wishes, logprobs=2, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    assert told["tokens"] == [f"token_id:{token.id}" for token in plain.tokens] and plain.tokens[-1].special
    assert told["token_logprobs"] == pytest.approx([token.logprob for token in plain.tokens])
    for table, token in zip(told["top_logprobs"], plain.tokens, strict=True):
        ids = list(dict.fromkeys([*(token_id for token_id, _ in token.top), token.id]))
        assert list(table) == [f"token_id:{token_id}" for token_id in ids]


@pytest.mark.contract
def test_stop_strings_are_not_in_the_text(client):
    text = complete(client, max_tokens=24)["choices"][0]["text"]
    stop = next(character for character in text if character.isascii())
    for wish in (stop, ["\u2603", stop]):
        stopped = complete(client, max_tokens=24, stop=wish, logprobs=0)["choices"][0]
        assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(stop)], "stop")
        assert stopped["stop_reason"] == stop and "".join(stopped["logprobs"]["tokens"]) == stopped["text"]
        streamed = complete(client, max_tokens=24, stop=wish, stream=True)["events"][:-1]
        assert "".join(each["choices"][0]["text"] for each in streamed) == stopped["text"]
    kept = complete(client, max_tokens=24, stop=stop, include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == text[: text.index(stop) + 1]


# a parameter as the client has it, and as the engine has it
PARAMETERS = [
    ({"top_k": 3, "temperature": 1, "seed": 5}, {"top_k": 3, "temperature": 1, "seed": 5}),
    ({"top_k": -1, "temperature": 1, "seed": 5}, {"temperature": 1, "seed": 5}),
    ({"top_p": 0.5, "temperature": 1, "seed": 5}, {"top_p": 0.5, "temperature": 1, "seed": 5}),
    ({"min_p": 0.3, "temperature": 1, "seed": 5}, {"min_p": 0.3, "temperature": 1, "seed": 5}),
    ({"presence_penalty": 2}, {"presence_penalty": 2}),
    ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
    ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
    ({"logit_bias": {"70": 100}}, {"logit_bias": {70: 100}}),
    ({"min_tokens": 12}, {"min_new_tokens": 12}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
    ({"max_tokens": 3}, {"max_new_tokens": 3}),
    ({"max_tokens": None}, {"max_new_tokens": 16}),
]


@pytest.mark.parametrize(("asked", "params"), PARAMETERS, ids=str)
def test_each_parameter_does_what_the_engine_s_does(client, tiny_target, asked, params):
    assert complete(client, **asked)["choices"][0]["text"] == alone(tiny_target, **params).text


def test_temperature_s_default_is_1_and_speculation_changes_no_text(client, tiny_target):
    expected = alone(tiny_target, temperature=1, seed=9).text
    for how, length in ((None, 5), ({"enabled": False}, 0), ({"num_tokens": 2}, 2), ({"num_tokens": 10**9}, 5)):
        told = complete(client, temperature=None, seed=9, speculative=how)
        assert told["choices"][0]["text"] == expected
        assert told["metrics"]["speculative_decoding"]["num_spec_tokens"] == length


@pytest.mark.contract
def test_fields_without_effect_and_fields_that_are_off(client):
    plain = complete(client)["choices"]
    harmless = {"user": "me", "model": "anything", "metadata": {"a": "b"}, "store": False, "best_of": 1, "suffix": None,
                "response_format": {"type": "text"}, "skip_special_tokens": True, "top_p": 1, "n": None,
                "priority": 0, "logit_bias": {}, "bad_words": [], "use_beam_search": False}  # fmt: skip
    assert complete(client, **harmless)["choices"] == plain
    chat = complete(client, "chat/completions")["choices"]
    off = {"tools": [], "tool_choice": "none", "parallel_tool_calls": None, "modalities": ["text"]}
    assert complete(client, "chat/completions", **off)["choices"] == chat
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    assert complete(client, "chat/completions", messages=parts)["choices"] == chat


def test_models_and_strict_names(client, tiny_target):
    for n, best_of, status in ((2, 2, 200), (2, 1, 400)):
        body = {"prompt": PROMPT, "max_tokens": 1, "n": n, "best_of": best_of}
        assert client.post("/v1/completions", json=body).status_code == status
    [about] = client.get("/v1/models").json()["data"]
    assert (about["id"], about["root"], about["max_model_len"]) == ("tiny", "tiny", 512)
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert client.get("/v1/models/other/one").status_code == 404
    with TestClient(create_app(Engine(tiny_target), strict_model_name=True)) as strict:
        for path in ("completions", "chat/completions"):
            complete(strict, path, model="tiny", max_tokens=1)
            body = {"messages": MESSAGES} if "chat" in path else {"prompt": PROMPT}
            answer = strict.post(f"/v1/{path}", json=body | {"model": "gpt-4"})
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
