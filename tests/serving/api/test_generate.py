"""TGI's contract, in process: POST /generate, and the same answers as server-sent events."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from http_testing import MESSAGES, PROMPT, ask, events, failing

from serving.api.app import create_app
from serving.api.generate import Answer
from serving.api.schemas import GenerateParameters
from serving.api.service import Limits
from serving.api.streaming import event
from serving.engine import Engine, SamplingParams


def test_the_answer_is_the_engine_s_and_details_come_only_when_asked_for(client, tiny_target):
    ids = tiny_target.tokenizer(PROMPT).input_ids
    plain = Engine(tiny_target, speculation="off").generate([ids], SamplingParams(max_new_tokens=8, logprobs=0))[0]
    assert ask(client).json() == {"generated_text": plain.text}
    assert ask(client, details=False).json() == {"generated_text": plain.text}
    details = ask(client, details=True).json()["details"]
    assert details["finish_reason"] == plain.finish_reason
    assert details["generated_tokens"] == len(plain.token_ids) == len(details["tokens"])
    assert details["prefill"] == [] and details["seed"] is None
    assert [token["id"] for token in details["tokens"]] == plain.token_ids
    assert details["tokens"][0].keys() == {"id", "text", "logprob", "special"}
    assert details["tokens"][0]["logprob"] == pytest.approx(plain.tokens[0].logprob)


def test_a_request_of_inputs_alone_is_greedy_and_null_means_default(tiny_target, tiny_head):
    off = {"best_of": 1, "watermark": False, "typical_p": 1.0, "repetition_penalty": 1, "frequency_penalty": 0.0,
           "top_n_tokens": 0, "decoder_input_details": False, "stop": []}  # fmt: skip
    with TestClient(create_app(Engine(tiny_target, tiny_head), limits=Limits(max_new_tokens=8))) as client:
        bare = client.post("/generate", json={"inputs": PROMPT})
        assert bare.status_code == 200 and client.get("/info").json()["limits"]["max_new_tokens"] == 8
        assert "<= 8" in ask(client, max_new_tokens=9).json()["error"]
        for parameters in (None, {}, dict.fromkeys(GenerateParameters.model_fields), off):
            body = {"inputs": PROMPT, "parameters": parameters, "stream": None}
            assert client.post("/generate", json=body).json() == bare.json() == ask(client).json()


@pytest.mark.parametrize(
    ("samples", "parameters"),
    [
        (False, {}),
        (False, {"seed": 3}),
        (True, {"do_sample": True}),
        (True, {"temperature": 0.8}),
        (True, {"top_p": 0.9}),
        (True, {"top_k": 10**30}),
        (True, {"do_sample": False, "top_k": 20}),
        (False, {"temperature": 0, "do_sample": True, "top_p": 1.0}),
    ],
)
def test_what_turns_sampling_on(client, parameters, samples):
    greedy = ask(client).json()["generated_text"]
    drawn = [ask(client, details=True, **{"seed": seed, **parameters}).json() for seed in (0, None)]
    assert ({each["generated_text"] for each in drawn} == {greedy}) != samples
    if samples:
        again = ask(client, **parameters, seed=drawn[1]["details"]["seed"]).json()
        assert again["generated_text"] == drawn[1]["generated_text"]


def test_the_same_seed_gives_the_same_text_whatever_speculation_does(client, tiny_target, tiny_head):
    def speculating(**speculative):
        settings = {"temperature": 1.0, "seed": 7, "details": True, "max_new_tokens": 16}
        return ask(client, **settings, speculative=speculative).json()

    settings = ({}, {"enabled": False}, {"num_tokens": 2}, {"num_tokens": 99, "enabled": True})
    default, off, two, many = (speculating(**each) for each in settings)
    assert default["generated_text"] == off["generated_text"] == two["generated_text"] == many["generated_text"]
    lengths = [each["details"]["speculative"]["speculation_length"] for each in (default, off, two, many)]
    assert lengths == [5, 0, 2, 5]  # capped by the server's
    figures = off["details"]["speculative"]
    assert (figures["enabled"], figures["drafted"], figures["acceptance_per_position"]) == (False, 0, [])
    assert speculating(num_tokens=0)["details"]["speculative"]["enabled"] is False
    assert len(two["details"]["speculative"]["acceptance_per_position"]) == 2
    by_rejection = speculating(rule="rejection")
    assert by_rejection["details"]["speculative"]["rule"] == "rejection"
    params = SamplingParams(max_new_tokens=16, temperature=1.0, seed=7)
    engine = Engine(tiny_target, tiny_head, rule="rejection", speculation="chain")
    [expected] = engine.generate([tiny_target.tokenizer(PROMPT).input_ids], params)
    assert by_rejection["generated_text"] == expected.text != default["generated_text"]


def test_figures_of_speculation_are_the_engine_s(client, tiny_target, tiny_head):
    figures = ask(client, details=True, max_new_tokens=30).json()["details"]["speculative"]
    ids = tiny_target.tokenizer(PROMPT).input_ids
    engine = Engine(tiny_target, tiny_head, speculation="chain")
    stats = engine.generate([ids], SamplingParams(max_new_tokens=30))[0].stats
    for name in ("verifications", "drafted", "accepted", "emitted"):
        assert figures[name] == getattr(stats, name)
    assert figures["acceptance_length"] == stats.emitted / stats.verifications
    pairs = zip(stats.accepted_per_position, stats.drafted_per_position, strict=True)
    assert figures["acceptance_per_position"] == [accepted / drafted for accepted, drafted in pairs]
    assert (figures["enabled"], figures["speculation_length"], figures["rule"]) == (True, 5, "shared-noise")
    figures = ask(client, details=True, max_new_tokens=1).json()["details"]["speculative"]
    assert (figures["acceptance_length"], figures["verifications"]) == (None, 0)


def test_the_context_is_filled_to_its_last_token_and_no_further(tiny_target):
    prompt_tokens = len(tiny_target.tokenizer(PROMPT).input_ids)
    context = prompt_tokens + 5
    with TestClient(create_app(Engine(tiny_target, max_length=context))) as client:
        assert ask(client, max_new_tokens=5, details=True).json()["details"]["generated_tokens"] == 5
        default = client.post("/generate", json={"inputs": PROMPT, "parameters": {"details": True}})
        assert default.json()["details"]["generated_tokens"] == 5  # what is left
        refused = ask(client, max_new_tokens=6).json()
        assert refused["error"] == (
            f"`inputs` tokens + `max_new_tokens` must be <= {context}. "
            f"Given: {prompt_tokens} `inputs` tokens and 6 `max_new_tokens`"
        )
        for extra in (5, 6, 5000):
            too_long = ask(client, PROMPT + "z" * extra, max_new_tokens=1)
            assert too_long.status_code == 422 and str(context) in too_long.json()["error"]
        assert ask(client, PROMPT + "zzzz", max_new_tokens=1).status_code == 200


def test_chat_puts_the_inputs_into_the_template(client, tiny_target, monkeypatch):
    wishes = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3, "details": True}
    said = MESSAGES[0]["content"]
    asked = ask(client, said, chat=True, **wishes).json()
    assert asked == ask(client, PROMPT, **wishes).json()  # which is the template around it
    assert asked != ask(client, said, **wishes).json() == ask(client, said, chat=False, **wishes).json()
    full = ask(client, said, chat=True, return_full_text=True, **wishes).json()
    assert full["generated_text"] == said + asked["generated_text"]
    assert client.get("/info").json()["chat_template"] is True
    monkeypatch.setattr(tiny_target.tokenizer, "chat_template", None)
    assert client.get("/info").json()["chat_template"] is False
    answer = ask(client, "a", chat=True)
    assert answer.status_code == 422 and "chat template" in answer.json()["error"]


# --- streams

SAMPLED = {"temperature": 1.0, "seed": 7, "max_new_tokens": 24}
GREEDY = {"max_new_tokens": 24}


def stream(client: Any, path: str = "/generate_stream", **parameters: Any) -> list[dict[str, Any]]:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8, **parameters}}
    answer = client.post(path, json=body if path == "/generate_stream" else body | {"stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


@pytest.mark.parametrize("path", ["/generate_stream", "/generate", "/"])
@pytest.mark.parametrize("wishes", [SAMPLED, pytest.param(GREEDY, marks=pytest.mark.contract)], ids=str)
def test_one_event_a_token_and_the_last_has_all(client, path, wishes):
    whole = ask(client, **wishes, details=True).json()
    told = stream(client, path, **wishes)
    if wishes == SAMPLED:
        assert whole["details"]["speculative"]["accepted"] > 0  # several tokens in one step, one event each
    assert [each["token"] for each in told] == whole["details"]["tokens"]
    assert [each["index"] for each in told] == list(range(1, len(told) + 1))
    assert all(each["generated_text"] is None and each["details"] is None for each in told[:-1])
    last = told[-1]
    assert last["generated_text"] == whole["generated_text"]
    assert last["generated_text"] == "".join(each["token"]["text"] for each in told if not each["token"]["special"])
    expected = {name: whole["details"][name] for name in ("finish_reason", "generated_tokens", "seed", "speculative")}
    assert last["details"] == expected | {"input_length": last["details"]["input_length"]}


@pytest.mark.contract
def test_stop_strings_end_the_text_stay_in_it_and_are_the_same_streamed(client):
    text = ask(client, max_new_tokens=24).json()["generated_text"]
    stop = next(character for character in text if character.isascii())  # the random model's bytes are rarely UTF-8
    wishes = {"max_new_tokens": 24, "stop": ["\u2603", stop]}
    stopped = ask(client, **wishes, details=True).json()
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert stopped["generated_text"] == text[: text.index(stop) + len(stop)]
    told = stream(client, **wishes, return_full_text=True)[-1]
    assert told["generated_text"] == PROMPT + stopped["generated_text"]
    assert told["details"]["finish_reason"] == "stop_sequence"


def test_origins_say_which_tokens_were_drafted_and_what_fell(client):
    plain = stream(client, **SAMPLED)
    told = stream(client, **SAMPLED, speculative={"origin": True})
    assert all("origin" not in each["token"] for each in plain)
    origins = [each["token"].pop("origin") for each in told]
    assert [each["token"] for each in told] == [each["token"] for each in plain]
    figures = told[-1]["details"]["speculative"]
    assert sum(origin["source"] == "draft" for origin in origins) == figures["accepted"] > 0
    assert origins[0] == {
        "source": "target",
        "drafter": None,
        "position": None,
        "rejected": None,
        "drafted": 0,
    }  # the prefill's
    verified = origins[1:]
    begins = [index for index, origin in enumerate(verified) if index == 0 or verified[index - 1]["source"] == "target"]
    assert len(begins) == figures["verifications"]
    assert sum(verified[index]["drafted"] for index in begins) == figures["drafted"]  # chains: none beside another
    for begin, end in zip(begins, [*begins[1:], len(verified)], strict=True):
        assert len({origin["drafted"] for origin in verified[begin:end]}) == 1 and verified[begin]["drafted"] <= 5
    previous = 0
    for token, origin in zip(told, origins, strict=True):
        if origin["source"] == "draft":
            assert origin["position"] == previous + 1 and origin["rejected"] is None
        elif origin["rejected"] is not None:
            assert origin["rejected"]["id"] != token["token"]["id"] and isinstance(origin["rejected"]["text"], str)
        previous = origin["position"] or 0
    assert sum(origin["rejected"] is not None for origin in origins) > 0
    for origin in origins:
        assert origin["drafter"] == ("head" if origin["source"] == "draft" or origin["rejected"] else None)
    assert figures["sources"] == {
        "head": {"drafted": figures["drafted"], "accepted": figures["accepted"]},
        "lookup": {"drafted": 0, "accepted": 0},
    }
    whole = ask(client, **SAMPLED, details=True, speculative={"origin": True}).json()["details"]["tokens"]
    assert [token["origin"] for token in whole] == origins


@pytest.mark.contract
def test_top_tokens(client):
    told = stream(client, top_n_tokens=3)
    assert all([top["id"] for top in each["top_tokens"]][0] == each["token"]["id"] for each in told)  # greedy
    assert all(len(each["top_tokens"]) == 3 for each in told)
    details = ask(client, details=True, top_n_tokens=3).json()["details"]
    assert details["top_tokens"] == [each["top_tokens"] for each in told]
    assert "top_tokens" not in ask(client, details=True).json()["details"]


def test_an_event_is_one_line_to_all_who_split_lines():
    """httpx ends lines wherever Unicode has line ends, as U+0085, U+2028 and U+2029, which models write."""
    text = "a\u0085b\u2028c\u2029d\x0be\x1cf\r\n\u00e9\U0001f993"
    line, blank = event({"text": text}).decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text} and not blank


@pytest.mark.parametrize("failure", [RuntimeError("/home/secret exploded"), SystemExit("the thread is gone")])
def test_a_failure_in_the_middle_is_the_last_event(gated, failure):
    failing(gated, 3, failure)
    with TestClient(create_app(gated), raise_server_exceptions=False) as client:
        text = client.post("/generate_stream", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 40}}).text
    *tokens, error = events(text)
    assert tokens and all("token" in each for each in tokens) and "secret" not in text
    assert error.keys() == {"error", "error_type"}


def test_a_failure_before_the_first_token_has_a_status(gated):
    with TestClient(create_app(gated), raise_server_exceptions=False) as client:
        for path, body, status in (
            ("/generate_stream", {"inputs": "a"}, 424),
            ("/v1/completions", {"prompt": "a"}, 500),
        ):
            failing(gated, 0, RuntimeError("/home/secret exploded"))
            answer = client.post(path, json=body | {"stream": True})
            assert answer.status_code == status and "secret" not in answer.text
            assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("after", [0, 1])
def test_the_cause_of_a_failure_while_writing_events_is_in_the_log(client, monkeypatch, log_lines, after):
    inner, count = Answer.burst, iter(range(after, 99))

    def burst(*args: Any) -> bytes:
        if next(count) == 1:
            raise RuntimeError("/home/secret exploded")
        return inner(*args)

    monkeypatch.setattr(Answer, "burst", burst)
    answer = client.post("/generate_stream", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 40}})
    assert "error" in answer.text and "secret" not in answer.text
    assert any("secret exploded" in line.get("exception", "") for line in log_lines())


def test_the_deadline_ends_a_stream_with_an_error(gated):
    with TestClient(create_app(gated, limits=Limits(request_seconds=0.2))) as client:
        for path, field in (("/generate_stream", "inputs"), ("/generate", "inputs"), ("/v1/completions", "prompt")):
            answer = client.post(path, json={field: PROMPT})
            assert answer.status_code == 504 and "0.2 seconds" in answer.text
            assert answer.headers["x-should-retry"] == "false"
