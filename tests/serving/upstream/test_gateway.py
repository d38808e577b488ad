"""Answers through the gateway: those of the server upstream, on every surface, for every parameter."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from fastapi.testclient import TestClient
from http_testing import MESSAGES, PROMPT, ask, complete, events, eventually, live, metric

from draft.data.capture import open_capture
from draft.heads.checkpoint import head_sha256
from serving.api.app import create_app
from serving.api.openai_schemas import ChatRequest, CompletionRequest
from serving.api.schemas import GenerateParameters
from serving.capture import CaptureWriter
from serving.engine import Engine
from serving.upstream import load_upstream
from serving.upstream import upstream as upstream_module
from serving.upstream.dialects import read_chunk

SAMPLED = {"temperature": 1.0, "seed": 7, "max_new_tokens": 24}
# parameters of /generate
GENERATE: list[dict[str, Any]] = [
    {"max_new_tokens": 24},
    {"max_new_tokens": 24, "top_n_tokens": 3},
    SAMPLED | {"top_n_tokens": 2},
    SAMPLED | {"top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    SAMPLED | {"return_full_text": True, "chat": True, "speculative": {"num_tokens": 2}},
    SAMPLED | {"truncate": 9, "speculative": {"enabled": False}},
    SAMPLED | {"speculative": {"rule": "rejection"}},
    {"max_new_tokens": 1},
]
# bodies of /v1/completions
COMPLETIONS: list[dict[str, Any]] = [
    {"temperature": 1, "seed": 3, "n": 2, "echo": True},
    {"prompt": [PROMPT, "b"], "return_token_ids": True},
    {"prompt": [[70, 71], [72]], "seed": 2, "temperature": 0.7, "min_p": 0.05, "presence_penalty": 0.5},
    {"logprobs": 2, "max_tokens": 30, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    {"logit_bias": {"70": 100}, "min_tokens": 12, "ignore_eos": True},
]


def without(answer: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in names}


def figures_apart(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer of /generate without what the server upstream does not say: what drafted, and by which rule."""
    details = answer["details"]
    shown = without(details["speculative"], "sources", "rule", "lookup_length", "speculation_length")
    return answer | {"details": details | {"speculative": shown}}


@pytest.mark.parametrize("parameters", GENERATE, ids=str)
def test_generate_answers_as_the_server_itself(gateway, direct, parameters):
    through, own = (ask(client, details=True, **parameters).json() for client in (gateway, direct))
    assert figures_apart(through) == figures_apart(own)
    assert through["details"]["generated_tokens"] >= 1


@pytest.mark.parametrize("body", COMPLETIONS, ids=str)
def test_completions_answer_as_the_server_itself(gateway, direct, body):
    through, own = (without(complete(client, **body), "id", "created") for client in (gateway, direct))
    assert through == own
    streamed = complete(gateway, **body, stream=True)["events"][:-1]
    for index, choice in enumerate(own["choices"]):
        parts = [each["choices"][0] for each in streamed if each["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


def test_stop_strings_end_both_at_the_same_place(gateway, direct):
    text = complete(direct, max_tokens=40)["choices"][0]["text"]
    stop = next(character for character in text[2:] if character.isascii())
    for more in ({}, {"include_stop_str_in_output": True}, {"min_tokens": 25}, {"stream": True}):
        body = {"stop": ["\u2603", stop], "max_tokens": 40, **more}
        through, own = (complete(client, **body) for client in (gateway, direct))
        if "stream" in more:
            through, own = (
                "".join(each["choices"][0]["text"] for each in answer["events"][:-1]) for answer in (through, own)
            )
            assert through == own == text[: text.index(stop, 0)]
        else:
            assert through["choices"] == own["choices"]
    through, own = (ask(client, max_new_tokens=40, stop=[stop]).json() for client in (gateway, direct))
    assert through == own and own["generated_text"].endswith(stop)  # where it stays in the text


def test_chats_answer_as_the_server_itself(gateway, direct):
    body = {"logprobs": True, "top_logprobs": 3, "temperature": 0.9, "seed": 11}
    through, own = (complete(client, "chat/completions", **body) for client in (gateway, direct))
    assert without(through, "id", "created") == without(own, "id", "created")
    body |= {"stop_token_ids": [80, 81, 82]}  # the server upstream counts the one that is left out of the answer
    through, own = (complete(client, "chat/completions", **body) for client in (gateway, direct))
    assert through["choices"] == own["choices"] and own["choices"][0]["finish_reason"] == "stop"


def test_an_event_a_token(gateway, direct):
    body = {"inputs": PROMPT, "parameters": SAMPLED}
    through, own = (events(client.post("/generate_stream", json=body).text) for client in (gateway, direct))
    assert len(through) > 5 and through[:-1] == own[:-1]
    assert figures_apart(through[-1]) == figures_apart(own[-1])


def test_a_seed_that_is_drawn_is_told_and_gives_the_answer_again(gateway, direct):
    drawn = ask(gateway, details=True, temperature=1.0, max_new_tokens=16).json()
    again = ask(direct, temperature=1.0, max_new_tokens=16, seed=drawn["details"]["seed"]).json()
    assert again["generated_text"] == drawn["generated_text"]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/generate", {"inputs": "a", "parameters": {"speculative": {"origin": True}}}, "speculative.origin"),
    ("/generate", {"inputs": "a", "parameters": {"temperature": 3.0}}, "temperature"),  # which the server refuses
    ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 513}}, "max_new_tokens"),
    ("/v1/completions", {"prompt": [1] * 512, "max_tokens": 1}, "prompt"),
    ("/v1/chat/completions", {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
]


@pytest.mark.parametrize(("path", "body", "name"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_the_server_upstream_cannot_do_is_refused_by_name(gateway, path, body, name):
    answer = gateway.post(path, json=body)
    assert answer.status_code == (400 if "v1" in path else 422) and name in answer.text


def test_every_sampling_parameter_is_passed_on(upstream, gateway, monkeypatch):
    """One that is added to a surface must have an effect upstream, too, or be refused."""
    settled = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt",
               "messages", "n", "best_of", "echo", "stream", "stream_options", "logprobs", "top_logprobs",
               "speculative", "capture", "max_completion_tokens", "return_token_ids",
               "return_tokens_as_token_ids"}  # fmt: skip
    sent: dict[str, Any] = {}
    inner = upstream.connection.events
    monkeypatch.setattr(upstream.connection, "events", lambda body: sent.update(body) or inner(body))
    wishes = {"temperature": 0.5, "top_p": 0.6, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.2, "seed": 5,
              "frequency_penalty": 0.3, "repetition_penalty": 1.4, "logit_bias": {"70": 1.5}, "stop": ["zz"],
              "stop_token_ids": [9], "min_tokens": 2, "ignore_eos": True, "max_tokens": 6,
              "include_stop_str_in_output": False}  # fmt: skip
    complete(gateway, **wishes)
    assert sent == sent | wishes | {"include_stop_str_in_output": True}  # the text is cut here
    assert (CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys()) - settled == wishes.keys()
    named = {"max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "frequency_penalty", "seed"}
    here = {"do_sample", "chat", "truncate", "return_full_text", "details", "top_n_tokens", "speculative", "capture"}
    assert GenerateParameters.model_fields.keys() == named | here | {"stop"}


def test_info_and_metrics_show_the_figures_of_the_server_upstream(gateway, direct):
    ask(direct, max_new_tokens=30)  # not through the gateway: it counts all the same

    def drafts(client):
        return metric(client, "spec_decode_num_drafts_total")

    eventually(lambda: drafts(gateway) == drafts(direct) > 0)
    for name in ("num_draft_tokens", "num_accepted_tokens"):
        assert metric(gateway, f"spec_decode_{name}_total") == metric(direct, f"spec_decode_{name}_total") > 0
    first = 'spec_decode_num_accepted_tokens_per_pos_total{position="0"}'
    assert metric(gateway, first) == metric(direct, first) > 0
    accepted = metric(direct, "spec_decode_num_accepted_tokens_total")
    tau = 1 + accepted / drafts(direct)
    assert metric(gateway, "upstream_acceptance_length") == pytest.approx(tau) and metric(gateway, "upstream_up") == 1
    about = gateway.get("/info").json()
    assert about["engine"]["speculation"]["acceptance_length"] == pytest.approx(tau)
    assert (about["engine"]["server"], about["speculation"], about["speculation_length"]) == (
        "draft-serve",
        "upstream",
        5,
    )
    assert about["speculative_fields"] == ["enabled", "num_tokens", "rule"]
    assert about["limits"]["max_total_tokens"] == 512 and "/" not in str(about)
    generated = metric(gateway, "generation_tokens_total")
    ask(gateway, max_new_tokens=3)
    assert metric(gateway, "generation_tokens_total") == generated + 3  # of the gateway's own requests


def test_captured_requests_name_the_head_that_drafted(folders, tiny_target, tiny_head, tmp_path, monkeypatch):
    """Before a server that does not tell it is the gateway's own, so that the learner knows which one is served."""
    head = copy.copy(tiny_head)
    head.fingerprint = "f1"
    capture = CaptureWriter(tmp_path / "captured", limit=10**7)
    models = str(folders / "my-target"), ("mine", str(folders / "my-head"))
    with live(create_app(Engine(tiny_target, {"theirs": head}, speculation="chain"))) as url:
        upstream = load_upstream(url, *models, max_requests=3)
        with TestClient(create_app(upstream, capture=capture)) as client:
            assert ask(client, max_new_tokens=12).status_code == 200
            assert ask(client, max_new_tokens=12, speculative={"enabled": False}).status_code == 200
            for change in ({"head": None}, None):  # without names as from vLLM, and without figures at all
                monkeypatch.setattr(upstream_module, "read_chunk", partial(read_changed_chunk, change))
                assert ask(client, max_new_tokens=12).status_code == 200
    capture.close()
    rows = [(row.head, row.head_fingerprint) for row in open_capture(tmp_path / "captured").rows()][::-1]
    own = ("mine", head_sha256(folders / "my-head"))
    assert rows == [("theirs", "f1"), (None, None), own, own]


def read_changed_chunk(change, *arguments):
    chunk = read_chunk(*arguments)
    if chunk.speculation is None or change is None:
        return replace(chunk, speculation=None)
    return replace(chunk, speculation=without(chunk.speculation, *change))


def test_a_broken_head_upstream_is_noticed(upstream, gateway, direct):
    """Its random head is hardly ever right, and no self-check has said so."""
    complete(direct, n=8, max_tokens=40, ignore_eos=True)  # 200 verifications are judged
    eventually(lambda: metric(gateway, "speculation_degraded") == 1)
    assert "the target accepts" in upstream.watch.degraded
