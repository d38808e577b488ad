"""The HTTP surface, in process: contract, validation, the line of requests, cancellation, death, metrics."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from draft.heads import Eagle3Head
from draft.target import Target
from serving.api.app import create_app
from serving.api.operations import Limits, public_name
from serving.api.schemas import GenerateParameters
from serving.engine import Completion, Engine, SamplingParams

PROMPT = "<|im_start|>user\nA secretive prompt about zebras.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def client(tiny_target: Target, tiny_head: Eagle3Head) -> Iterator[TestClient]:
    with TestClient(create_app(Engine(tiny_target, tiny_head), head_name="/home/someone/heads/tiny-head")) as client:
        yield client


def ask(client: TestClient, inputs: str = PROMPT, **parameters: Any) -> httpx.Response:
    parameters = {"max_new_tokens": 8, **parameters}
    return client.post("/generate", json={"inputs": inputs, "parameters": parameters})


def metric(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"draftsmith:{name} ")))


# --- the contract


def test_the_answer_is_the_engine_s_and_details_come_only_when_asked_for(client, tiny_target) -> None:
    ids = tiny_target.tokenizer(PROMPT).input_ids
    plain = Engine(tiny_target).generate(ids, SamplingParams(max_new_tokens=8))
    assert ask(client).json() == {"generated_text": plain.text}
    assert ask(client, details=False).json() == {"generated_text": plain.text}
    details = ask(client, details=True).json()["details"]
    assert details["finish_reason"] == plain.finish_reason
    assert details["generated_tokens"] == len(plain.token_ids) == len(details["tokens"])
    assert details["prefill"] == [] and details["seed"] is None
    assert [token["id"] for token in details["tokens"]] == plain.token_ids
    assert details["tokens"][0].keys() == {"id", "text", "logprob", "special"}
    assert details["tokens"][0]["logprob"] == pytest.approx(plain.tokens[0].logprob)


def test_a_request_of_inputs_alone_is_greedy_and_null_means_default(tiny_target, tiny_head) -> None:
    off = {"best_of": 1, "watermark": False, "typical_p": 1.0, "repetition_penalty": 1, "frequency_penalty": 0.0,
           "top_n_tokens": 0, "decoder_input_details": False, "stop": []}  # fmt: skip
    with TestClient(create_app(Engine(tiny_target, tiny_head), limits=Limits(max_new_tokens=8))) as client:
        bare = client.post("/generate", json={"inputs": PROMPT})
        assert bare.status_code == 200
        for parameters in (None, {}, dict.fromkeys(GenerateParameters.model_fields), off):
            body = {"inputs": PROMPT, "parameters": parameters, "stream": None}
            assert client.post("/generate", json=body).json() == bare.json() == ask(client).json()


@pytest.mark.parametrize(
    ("parameters", "samples"),
    [
        ({}, False),
        ({"seed": 3}, False),
        ({"do_sample": True}, True),
        ({"do_sample": False}, False),
        ({"temperature": 0.8}, True),
        ({"top_p": 0.9}, True),
        ({"top_k": 20}, True),
        ({"top_k": 10**30}, True),
        ({"do_sample": False, "top_k": 20}, True),
        ({"temperature": 0.0}, False),
        ({"temperature": 0, "do_sample": True, "top_p": 1.0}, False),
    ],
)
def test_what_turns_sampling_on(client, parameters, samples) -> None:
    greedy = ask(client).json()["generated_text"]
    texts = {ask(client, **{"seed": seed, **parameters}).json()["generated_text"] for seed in range(2)}
    assert (texts == {greedy}) != samples
    if samples:
        drawn = ask(client, details=True, **parameters).json()
        again = ask(client, **{**parameters, "seed": drawn["details"]["seed"]}).json()
        assert again["generated_text"] == drawn["generated_text"]


def test_the_same_seed_gives_the_same_text_whatever_speculation_does(client, tiny_target, tiny_head) -> None:
    def speculating(**speculative: Any) -> dict[str, Any]:
        settings = {"temperature": 1.0, "seed": 7, "details": True, "max_new_tokens": 16}
        return ask(client, **settings, speculative=speculative).json()

    default, off, two, many = (
        speculating(),
        speculating(enabled=False),
        speculating(num_tokens=2),
        speculating(num_tokens=99, enabled=True),
    )
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
    expected = Engine(tiny_target, tiny_head, rule="rejection").generate(
        tiny_target.tokenizer(PROMPT).input_ids, params
    )
    assert by_rejection["generated_text"] == expected.text != default["generated_text"]


def test_figures_of_speculation_are_the_engine_s(client, tiny_target, tiny_head) -> None:
    figures = ask(client, details=True, max_new_tokens=30).json()["details"]["speculative"]
    ids = tiny_target.tokenizer(PROMPT).input_ids
    stats = Engine(tiny_target, tiny_head).generate(ids, SamplingParams(max_new_tokens=30)).stats
    for name in ("verifications", "drafted", "accepted", "emitted"):
        assert figures[name] == getattr(stats, name)
    assert figures["acceptance_length"] == stats.emitted / stats.verifications
    pairs = zip(stats.accepted_per_position, stats.drafted_per_position, strict=True)
    assert figures["acceptance_per_position"] == [accepted / drafted for accepted, drafted in pairs]
    assert (figures["enabled"], figures["speculation_length"], figures["rule"]) == (True, 5, "shared-noise")


def test_one_token_has_no_acceptance_length(client) -> None:
    figures = ask(client, details=True, max_new_tokens=1).json()["details"]["speculative"]
    assert (figures["acceptance_length"], figures["verifications"]) == (None, 0)


def test_stop_strings_end_the_text_and_stay_in_it(client) -> None:
    text = ask(client, max_new_tokens=24).json()["generated_text"]
    stop = next(character for character in text if character.isascii())  # the random model's bytes are rarely UTF-8
    stopped = ask(client, max_new_tokens=24, stop=["\u2603", stop], details=True).json()
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert stopped["generated_text"] == text[: text.index(stop) + len(stop)]


def test_return_full_text_puts_the_prompt_first(client) -> None:
    assert ask(client, return_full_text=True).json()["generated_text"] == PROMPT + ask(client).json()["generated_text"]


def test_the_context_is_filled_to_its_last_token_and_no_further(tiny_target) -> None:
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


# --- what is refused

REFUSED_PARAMETERS = [
    ("max_new_tokens", 0, "1"),
    ("max_new_tokens", -5, "-5"),
    ("max_new_tokens", 10**30, "512"),
    ("max_new_tokens", 10**4000, "512"),
    ("max_new_tokens", 2.5, "2.5"),
    ("max_new_tokens", "12", "'12'"),
    ("max_new_tokens", True, "True"),
    ("temperature", -0.1, "-0.1"),
    ("temperature", 999999, "100"),
    ("temperature", "hot", "'hot'"),
    ("temperature", [1], "number"),
    ("top_p", 0, "greater than 0"),
    ("top_p", 1.01, "1.01"),
    ("top_p", -1, "-1"),
    ("top_k", 0, "1"),
    ("top_k", -1, "-1"),
    ("seed", -1, "-1"),
    ("seed", 2**64, str(2**63)),
    ("stop", "word", "list"),
    ("stop", [""], "1 character"),
    ("stop", ["x" * 257], "256"),
    ("stop", ["x"] * 17, "16"),
    ("stop", ["a\0"], "NUL"),
    ("stop", [3], "string"),
    ("do_sample", "yes", "boolean"),
    ("details", 1, "boolean"),
    ("return_full_text", {}, "boolean"),
    ("speculative", True, "dictionary"),
    ("speculative.enabled", "on", "boolean"),
    ("speculative.num_tokens", -1, "-1"),
    ("speculative.rule", "guess", "rejection"),
    ("speculative.depth", 3, "not permitted"),
    ("best_of", 2, "not implemented"),
    ("repetition_penalty", 1.1, "not implemented"),
    ("repetition_penalty", 0, "not implemented"),
    ("frequency_penalty", 0.5, "not implemented"),
    ("typical_p", 0.9, "not implemented"),
    ("truncate", 100, "not implemented"),
    ("watermark", True, "not implemented"),
    ("decoder_input_details", True, "not implemented"),
    ("top_n_tokens", 5, "not implemented"),
    ("grammar", {"type": "json", "value": {}}, "not implemented"),
    ("adapter_id", "mine", "not implemented"),
    ("max_tokens", 5, "not permitted"),
    ("min_p", 0.1, "not permitted"),
]


@pytest.mark.parametrize(("field", "value", "told"), REFUSED_PARAMETERS, ids=lambda value: str(value)[:30])
def test_a_bad_parameter_is_refused_by_name(client, field, value, told) -> None:
    outer, _, inner = field.partition(".")
    answer = ask(client, **{outer: {inner: value} if inner else value})
    assert answer.status_code == 422, answer.text
    body = answer.json()
    assert body.keys() == {"error", "error_type"} and body["error_type"] == "validation"
    assert field in body["error"] and told in body["error"]
    assert len(body["error"]) <= 500 and "zebras" not in body["error"]


REFUSED_BODIES = [
    (b"", 422),
    (b"{", 422),
    (b"not json", 422),
    (b'{"inputs": "\x80"}', 400),
    (b"[]", 422),
    (b'"text"', 422),
    (b"null", 422),
    (b"{}", 422),
    (b'{"inputs": ""}', 422),
    (b'{"inputs": null}', 422),
    (b'{"inputs": 5}', 422),
    (b'{"inputs": ["a", "b"]}', 422),
    (b'{"inputs": "a\\u0000b"}', 422),
    (b'{"inputs": "\\ud800"}', 422),
    (b'{"inputs": "\\ude00\\ud83d"}', 422),
    (b'{"inputs": "a", "parameters": []}', 422),
    (b'{"inputs": "a", "parameters": {"stop": ["\\udfff"]}}', 422),
    (b'{"inputs": "a", "parameters": {"\\ud800": 1}}', 422),
    (b'{"inputs": "a", "parameters": {"temperature": NaN}}', 422),
    (b'{"inputs": "a", "parameters": {"temperature": Infinity}}', 422),
    (b'{"inputs": "a", "parameters": {"top_p": -Infinity}}', 422),
    (b'{"inputs": "a", "parameters": {"temperature": 1e400}}', 422),
    (b'{"inputs": "a", "parameters": {"max_new_tokens": 1e3}}', 422),
    (b'{"inputs": "a", "parameters": {"max_new_tokens": ' + b"9" * 5000 + b"}}", 400),
    (b'{"inputs": "a", "stream": true}', 422),
    (b'{"prompt": "a secretive prompt about zebras"}', 422),
    (b'{"inputs": "a", "model": "m"}', 422),
    (b"[" * 100_000, 400),
    (b'{"inputs": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, 400),
    (b'{"inputs": "a", "parameters": {"grammar": ' + b"[" * 900 + b"]" * 900 + b"}}", 422),
]


@pytest.mark.parametrize(("body", "status"), REFUSED_BODIES, ids=lambda value: repr(value)[:50])
def test_a_bad_body_is_refused_and_the_server_lives(client, body, status) -> None:
    answer = client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["error_type"] == "validation"
    assert len(answer.json()["error"]) <= 500 and "zebras" not in answer.text
    assert ask(client, max_new_tokens=1).status_code == 200


def test_a_secret_in_the_wrong_place_is_not_repeated(client) -> None:
    for body in ({"inputs": {"zebras": "zebras"}}, {"inputs": "a", "parameters": {"prompt": "zebras"}}, ["zebras"]):
        answer = client.post("/generate", json=body)
        assert answer.status_code == 422
        assert "'zebras'" not in answer.text


def test_many_problems_are_told_three_at_most(client) -> None:
    answer = ask(client, **{f"unknown_{'x' * 300}_{index}": 1 for index in range(1000)})
    assert answer.status_code == 422 and len(answer.content) < 700


def test_tiny_and_large_temperatures_still_answer(client) -> None:
    greedy = ask(client).json()
    for temperature in (5e-324, 1e-30, 1e-3):
        assert ask(client, temperature=temperature, seed=1).json() == greedy
    assert ask(client, temperature=100.0).status_code == 200


def test_only_json_is_taken_and_the_way_out_is_named(client) -> None:
    for headers in ({"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        answer = client.post("/generate", content=b'{"inputs": "a"}', headers=headers)
        assert answer.status_code == 415 and "application/json" in answer.json()["error"]


def test_a_body_past_the_limit_is_413_whether_or_not_it_says_its_length(tiny_target) -> None:
    app = create_app(Engine(tiny_target), limits=Limits(max_body_bytes=1000))
    body = json.dumps({"inputs": "z" * 2000}).encode()
    with TestClient(app) as client:
        for content in (body, iter([body[:600], body[600:]])):
            answer = client.post("/generate", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 413 and "1000" in answer.json()["error"]
        assert ask(client, "short", max_new_tokens=2).status_code == 200


def test_the_server_s_own_limit_of_new_tokens(tiny_target) -> None:
    with TestClient(create_app(Engine(tiny_target), limits=Limits(max_new_tokens=8))) as client:
        assert ask(client, max_new_tokens=9).status_code == 422
        assert "8" in ask(client, max_new_tokens=9).json()["error"]
        assert ask(client, max_new_tokens=8, details=True).json()["details"]["generated_tokens"] <= 8
        bare = client.post("/generate", json={"inputs": PROMPT, "parameters": {"details": True}})
        assert bare.json()["details"]["generated_tokens"] <= 8
        assert client.get("/info").json()["limits"]["max_new_tokens"] == 8


def test_paths_and_methods_that_do_not_exist(client) -> None:
    for answer, status in ((client.get("/generate"), 405), (client.get("/nothing"), 404)):
        assert answer.status_code == status and answer.json().keys() == {"error", "error_type"}


# --- operations


def test_every_answer_carries_a_request_id(client) -> None:
    given = client.get("/health", headers={"x-request-id": "trace-42"})
    assert given.headers["x-request-id"] == "trace-42"
    for bad in ("a b", "x" * 500, "<script>"):
        drawn = client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert drawn != bad and len(drawn) == 32
    assert ask(client, top_p=7).headers["x-request-id"] != ask(client, top_p=7).headers["x-request-id"]


def test_info_tells_what_is_served_and_no_paths(client, tiny_target) -> None:
    answer = client.get("/info")
    about = answer.json()
    assert (about["model_id"], about["architecture"], about["dtype"]) == ("tiny", "LlamaForCausalLM", "float64")
    assert about["head"] == {"name": "tiny-head", "architecture": "LlamaForCausalLMEagle3", "draft_vocab_size": 200}
    assert (about["speculation_length"], about["rule"], about["device"]) == (5, "shared-noise", "cpu")
    assert about["limits"]["max_total_tokens"] == tiny_target.max_length
    assert "/" not in answer.text
    with TestClient(create_app(Engine(tiny_target))) as plain:
        assert plain.get("/info").json()["head"] is None and plain.get("/info").json()["speculation_length"] == 0
        figures = ask(plain, details=True, speculative={"enabled": True}).json()["details"]["speculative"]
        assert figures["enabled"] is False and ask(plain).json() == ask(client).json()


def test_public_names(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert public_name("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name("smollm2") == "smollm2"
    assert public_name("models/mine") == public_name(f"{tmp_path}/models/mine/") == public_name("models/../models/mine")
    assert public_name("models/mine") == "mine"
    assert public_name("/srv/gone/model.gguf") == "model.gguf"


def test_metrics_add_up(tiny_target, tiny_head) -> None:
    with TestClient(create_app(Engine(tiny_target, tiny_head))) as client:
        assert metric(client, "spec_decode_num_drafts_total") == 0
        answers = [
            ask(client, details=True, max_new_tokens=n, temperature=t, seed=n) for n in (1, 7, 20) for t in (0, 1.0)
        ]
        details = [answer.json()["details"] for answer in answers]
        assert ask(client, top_p=2).status_code == 422
        figures = [each["speculative"] for each in details]
        assert sum(each["accepted"] for each in figures) > 0
        assert metric(client, "spec_decode_num_draft_tokens_total") == sum(each["drafted"] for each in figures)
        assert metric(client, "spec_decode_num_accepted_tokens_total") == sum(each["accepted"] for each in figures)
        positions = [
            metric(client, f'spec_decode_num_accepted_tokens_per_pos_total{{position="{index}"}}') for index in range(5)
        ]
        assert sum(positions) == sum(each["accepted"] for each in figures) and positions == sorted(positions)[::-1]
        drafts, verifications = metric(client, "spec_decode_num_drafts_total"), sum(f["verifications"] for f in figures)
        assert 0 < drafts <= verifications  # the last one may have had room for the bonus token only
        assert metric(client, "generation_tokens_total") == sum(each["generated_tokens"] for each in details)
        reasons = {each["finish_reason"] for each in details}
        counts = [metric(client, f'request_success_total{{finished_reason="{reason}"}}') for reason in reasons]
        assert sum(counts) == metric(client, "e2e_request_latency_seconds_count") == 6
        assert metric(client, 'request_failure_total{reason="validation"}') == 1
        several = sum(each["generated_tokens"] > 1 for each in details)
        assert metric(client, "request_time_per_output_token_seconds_count") == several
        assert metric(client, "num_requests_running") == metric(client, "num_requests_waiting") == 0


def test_the_api_describes_itself(client) -> None:
    schema = client.get("/openapi.json").json()
    body = schema["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["$ref"].endswith("/GenerateRequest")


# --- the line of requests


class GatedEngine(Engine):
    """The real engine behind a gate, so that a test decides how long a request runs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = threading.Event()
        self.calls: list[list[int]] = []
        self.ends: list[str] = []
        self.failure: BaseException | None = None

    def generate(self, prompt_ids: list[int], params: SamplingParams, **options: Any) -> Completion:
        self.calls.append(prompt_ids)
        while not self.gate.wait(0.002) and not options["cancelled"]():
            pass
        if self.failure is not None:
            raise self.failure
        completion = super().generate(prompt_ids, params, **options)
        self.ends.append(completion.finish_reason)
        return completion


@pytest.fixture
def gated(tiny_target: Target, tiny_head: Eagle3Head) -> GatedEngine:
    return GatedEngine(tiny_target, tiny_head)


async def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.002)


def in_process(app: Any, conversation: Callable[[httpx.AsyncClient], Any]) -> Any:
    """Run a conversation of concurrent requests with an app on one event loop."""

    async def run() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            return await asyncio.wait_for(conversation(client), 30)

    return asyncio.run(run())


def post(client: httpx.AsyncClient, inputs: str = PROMPT, **parameters: Any) -> asyncio.Task[httpx.Response]:
    body = {"inputs": inputs, "parameters": {"max_new_tokens": 6, **parameters}}
    return asyncio.ensure_future(client.post("/generate", json=body))


def test_health_and_metrics_answer_during_generation_and_a_full_line_is_429(gated) -> None:
    app = create_app(gated, limits=Limits(max_waiting=2))

    async def conversation(client: httpx.AsyncClient) -> None:
        accepted = [post(client, f"{index} {PROMPT}") for index in range(3)]
        worker = app.state.service.worker
        await eventually(lambda: worker.running == 1 and worker.waiting == 2)
        refused = await post(client)
        assert refused.status_code == 429
        assert refused.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
        assert (await client.get("/health")).status_code == 200
        text = (await client.get("/metrics")).text
        assert "draftsmith:num_requests_running 1.0" in text and "draftsmith:num_requests_waiting 2.0" in text
        assert 'draftsmith:request_failure_total{reason="overloaded"} 1.0' in text
        assert not any(task.done() for task in accepted)
        gated.gate.set()
        assert [(await task).status_code for task in accepted] == [200] * 3
        assert (await post(client)).status_code == 200  # there is room again

    in_process(app, conversation)
    assert len(gated.calls) == 4


def test_requests_at_once_get_what_they_get_alone(tiny_target, tiny_head) -> None:
    app = create_app(Engine(tiny_target, tiny_head))
    alone = Engine(tiny_target)
    settings = [{"temperature": index % 3 / 2, "seed": index, "max_new_tokens": 2 + index} for index in range(8)]

    async def conversation(client: httpx.AsyncClient) -> list[str]:
        answers = await asyncio.gather(
            *(post(client, f"{index} {PROMPT}", **each) for index, each in enumerate(settings))
        )
        return [answer.json()["generated_text"] for answer in answers]

    for index, text in enumerate(in_process(app, conversation)):
        ids = tiny_target.tokenizer(f"{index} {PROMPT}").input_ids
        assert text == alone.generate(ids, SamplingParams(**settings[index])).text


async def leave(app: Any, gone: asyncio.Event) -> list[dict[str, Any]]:
    """A client that sends a request to the app and closes the connection when `gone` is set."""
    body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": 100}}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
             "path": "/generate", "raw_path": b"/generate", "query_string": b"", "root_path": "", "headers": headers,
             "client": ("test", 1), "server": ("test", 80)}  # fmt: skip
    await app(scope, receive, send)
    return sent


def test_a_client_that_leaves_frees_the_engine_and_its_place_in_line(gated) -> None:
    app = create_app(gated, limits=Limits(max_waiting=1))

    async def conversation(client: httpx.AsyncClient) -> None:
        worker, gone = app.state.service.worker, asyncio.Event()
        running = asyncio.ensure_future(leave(app, gone))
        await eventually(lambda: worker.running == 1)
        gone_too = asyncio.Event()
        waiting = asyncio.ensure_future(leave(app, gone_too))
        await eventually(lambda: worker.waiting == 1)
        assert (await post(client)).status_code == 429
        gone_too.set()
        await waiting
        assert worker.waiting == 0 and worker.running == 1
        gone.set()  # the gate stays shut: only the engine's `cancelled` lets the request end
        await running
        await eventually(lambda: worker.running == 0)
        assert gated.ends == ["cancelled"] and len(gated.calls) == 1
        gated.gate.set()
        assert (await post(client)).status_code == 200
        assert 'request_failure_total{reason="cancelled"} 2.0' in (await client.get("/metrics")).text

    in_process(app, conversation)


def test_an_engine_error_costs_one_request_and_tells_nothing(gated, caplog) -> None:
    app = create_app(gated)
    gated.gate.set()
    gated.failure = RuntimeError("/home/secret/weights exploded")

    async def conversation(client: httpx.AsyncClient) -> None:
        failed = await post(client)
        assert failed.status_code == 500 and failed.headers["x-request-id"] in caplog.text
        assert failed.json() == {"error": "Request failed during generation", "error_type": "generation"}
        gated.failure = None
        assert (await client.get("/health")).status_code == 200
        assert (await post(client)).status_code == 200
        assert 'request_failure_total{reason="generation"} 1.0' in (await client.get("/metrics")).text

    in_process(app, conversation)
    assert "zebras" not in caplog.text


def test_when_the_engine_s_thread_dies_nobody_hangs(gated) -> None:
    app = create_app(gated)
    gated.failure = SystemExit("the thread is gone")

    async def conversation(client: httpx.AsyncClient) -> None:
        requests = [post(client) for _ in range(5)]
        worker = app.state.service.worker
        await eventually(lambda: worker.running == 1 and worker.waiting == 4)
        assert (await client.get("/health")).status_code == 200
        gated.gate.set()
        for answer in [await task for task in requests] + [await post(client)]:
            assert answer.status_code == 503 and answer.json()["error_type"] == "generation"
        unhealthy = await client.get("/health")
        assert unhealthy.status_code == 503
        assert unhealthy.json() == {"error": "unhealthy", "error_type": "healthcheck"}
        text = (await client.get("/metrics")).text
        assert "num_requests_running 0.0" in text and "num_requests_waiting 0.0" in text

    in_process(app, conversation)


def test_stopping_ends_what_runs_and_what_waits(gated) -> None:
    app = create_app(gated)

    async def conversation(client: httpx.AsyncClient) -> None:
        requests = [post(client) for _ in range(3)]
        worker = app.state.service.worker
        await eventually(lambda: worker.running == 1 and worker.waiting == 2)
        await asyncio.to_thread(worker.stop)
        assert [(await task).status_code for task in requests] == [503] * 3
        assert not worker.alive

    in_process(app, conversation)
