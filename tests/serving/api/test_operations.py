"""Health, readiness, info, metrics and the schema."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_tiny_target
from fastapi.testclient import TestClient
from http_testing import ask, in_process, live, metric, series, until

from serving.api.app import create_app
from serving.api.service import Limits, public_name
from serving.engine import Engine
from serving.engine.estimates import DraftPlan
from serving.engine.lookup import LOOKUP_LENGTH
from serving.engine.planner import Fixed


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nothing", 404, None),
        ("POST", "/generate/", 404, None),  # and no redirect
        ("GET", "/v1/completions/", 404, None),
        ("GET", "/generate", 405, "POST"),
        ("HEAD", "/generate", 405, "POST"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("DELETE", "/v1/models/tiny", 405, "GET, HEAD"),
        ("DELETE", "/", 405, "GET, HEAD, POST"),
    ],
)
def test_paths_and_methods_that_do_not_exist(client, method, path, status, allow):
    answer = client.request(method, path, content=b"no JSON", headers={"host": "evil"}, follow_redirects=False)
    assert answer.status_code == status and answer.headers.get("allow") == allow and "location" not in answer.headers
    if method != "HEAD":
        assert answer.json().keys() == ({"error"} if "v1" in path else {"error", "error_type"})


def test_head_is_get_without_its_body(client):
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/info", "/openapi.json"):
        assert client.head(path).status_code == 200 and client.head(path).headers["x-request-id"]


def test_every_answer_carries_a_request_id(client):
    given = client.get("/health", headers={"x-request-id": "trace-42"})
    assert given.headers["x-request-id"] == "trace-42"
    for bad in ("a b", "x" * 500, "<script>"):
        drawn = client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert drawn != bad and len(drawn) == 32
    assert ask(client, top_p=7).headers["x-request-id"] != ask(client, top_p=7).headers["x-request-id"]


def test_info_tells_what_is_served_and_no_paths(client, tiny_target):
    answer = client.get("/info")
    about = answer.json()
    assert (about["model_id"], about["architecture"], about["dtype"]) == ("tiny", "LlamaForCausalLM", "float64")
    shape = {"name": "tiny-head", "architecture": "LlamaForCausalLMEagle3", "draft_vocab_size": 200}
    assert about["head"] == {**shape, "self_check": None, "degraded": None}
    assert (about["speculation_length"], about["rule"], about["device"]) == (5, "shared-noise", "cpu")
    assert about["limits"]["max_total_tokens"] == tiny_target.max_length
    assert "/" not in answer.text and about["engine"]["speculation"]["plan"] == "chain 5"
    assert set(about["versions"]) == {"draftsmith", "torch", "transformers"}
    assert (about["tree_size"], about["lookup_length"], about["limits"]["max_draft_tokens"]) == (None, 0, 5)
    with TestClient(create_app(Engine(tiny_target, lookup=False))) as plain:
        assert plain.get("/info").json()["head"] is None and plain.get("/info").json()["speculation_length"] == 0
        figures = ask(plain, details=True, speculative={"enabled": True}).json()["details"]["speculative"]
        assert figures["enabled"] is False and ask(plain).json() == ask(client).json()


def test_public_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert public_name("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name("smollm2") == "smollm2"
    assert public_name("models/mine") == public_name(f"{tmp_path}/models/mine/") == public_name("models/../models/mine")
    assert public_name("models/mine") == "mine"
    assert public_name("/srv/gone/model.gguf") == "model.gguf"


def test_metrics_add_up(tiny_target, tiny_head):
    with TestClient(create_app(Engine(tiny_target, tiny_head, speculation="chain"))) as client:
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
        steps = sum(each["verifications"] for each in figures)
        # the last one may have had room for the bonus token only
        assert 0 < metric(client, "spec_decode_num_drafts_total") <= steps
        generated = sum(each["generated_tokens"] for each in details)
        assert metric(client, "generation_tokens_total") == generated
        reasons = {each["finish_reason"] for each in details}
        counts = [metric(client, f'request_success_total{{finished_reason="{reason}"}}') for reason in reasons]
        assert sum(counts) == 6
        several = sum(each["generated_tokens"] > 1 for each in details)
        for name, value in {
            "e2e_request_latency_seconds_count": 6,
            "time_to_first_token_seconds_count": 6,
            "request_queue_time_seconds_count": 6,
            "request_prompt_tokens_count": 6,
            "request_time_per_output_token_seconds_count": several,
            "request_generation_tokens_sum": generated,
            'request_failure_total{reason="validation"}': 1,
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
        }.items():
            assert metric(client, name) == value, name
        assert 0 < metric(client, "inter_token_latency_seconds_count") <= steps
        for name, least in (("queue", 0.0001), ("prefill", 0.0001), ("decode", 0.001)):  # small models are told apart
            assert f'draftsmith:request_{name}_time_seconds_bucket{{le="{least}"}}' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("options", "shown"),
    [({}, (5, None, LOOKUP_LENGTH, LOOKUP_LENGTH)), ({"speculation": "tree", "tree_size": 9}, (5, 9, 0, 5))],
)
def test_info_and_details_tell_what_is_drafted_at_most(tiny_target, tiny_head, options, shown):
    with TestClient(create_app(Engine(tiny_target, tiny_head, **options))) as client:
        about = client.get("/info").json()
        fields = ("speculation_length", "tree_size", "lookup_length")
        assert (*(about[name] for name in fields), about["limits"]["max_draft_tokens"]) == shown
        for requested in (None, 3, 12):
            wishes = {} if requested is None else {"speculative": {"num_tokens": requested}}
            figures = ask(client, details=True, **wishes).json()["details"]["speculative"]
            lengths = figures["speculation_length"], figures["lookup_length"]
            assert lengths == tuple(min(requested or 99, shown[place]) for place in (0, 2))


def test_copied_tokens_are_counted_by_their_source(tiny_target):
    engine = Engine(tiny_target)
    engine.controller = engine._decoder.controller = Fixed(DraftPlan.lookup(5))  # whatever is fast here
    with TestClient(create_app(engine)) as client:
        wishes = {"max_new_tokens": 80, "details": True, "speculative": {"origin": True}}
        details = ask(client, "zebras " * 6, **wishes).json()["details"]
        figures, origins = details["speculative"], [token["origin"] for token in details["tokens"]]
        counts = {"drafted": figures["drafted"], "accepted": figures["accepted"]}
        assert figures["sources"] == {"head": {"drafted": 0, "accepted": 0}, "lookup": counts}
        assert 0 < figures["accepted"] < figures["drafted"]
        assert (figures["speculation_length"], figures["lookup_length"]) == (0, LOOKUP_LENGTH)
        accepted = [origin for origin in origins if origin["source"] == "draft"]
        rejected = [origin for origin in origins if origin["rejected"]]
        assert len(accepted) == figures["accepted"] and rejected
        assert {origin["drafter"] for origin in accepted + rejected} == {"lookup"}
        assert {origin["drafter"] for origin in origins if origin not in accepted + rejected} == {None}
        for name, value in (("draft", figures["drafted"]), ("accepted", figures["accepted"])):
            series = f"spec_decode_num_{name}_tokens"
            assert metric(client, f"{series}_total") == value
            assert metric(client, f'{series}_by_source_total{{source="lookup"}}') == value
            assert metric(client, f'{series}_by_source_total{{source="head"}}') == 0
        about = client.get("/info").json()
        assert (about["head"], about["speculation_length"], about["lookup_length"]) == (None, 0, LOOKUP_LENGTH)
        assert about["limits"]["max_draft_tokens"] == LOOKUP_LENGTH
        assert " for 1: the only plan of this mode (a pass of " in about["engine"]["speculation"]["why"]
        off = ask(client, "zebras " * 6, **wishes | {"speculative": {"enabled": False}}).json()["details"]
        assert off["speculative"]["drafted"] == 0
        assert [token["id"] for token in off["tokens"]] == [token["id"] for token in details["tokens"]]


def test_tokens_are_counted_while_they_come(gated):
    """A long answer is seen in the figures before its end."""
    counts = ("time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "prompt_tokens_total")

    def figures(text):
        return [series(text, name) for name in (*counts, "e2e_request_latency_seconds_count")]

    async def conversation(client):
        wishes = {"max_new_tokens": 40, "speculative": {"enabled": False}}
        asked = asyncio.ensure_future(client.post("/generate", json={"inputs": "abc", "parameters": wishes}))
        inner, steps = gated._decoder.step, []

        def step(rows):
            steps.append(rows)
            if len(steps) == 6:
                gated.gate.clear()
            inner(rows)

        gated._decoder.step = step
        gated.gate.set()
        await until(lambda: len(steps) == 6)
        during = [figures((await client.get("/metrics")).text) for _ in range(2)]
        gated.gate.set()
        assert (await asked).status_code == 200
        assert during[0] == during[1]
        return during[0], figures((await client.get("/metrics")).text)

    during, after = in_process(create_app(gated), conversation)
    assert during[::2] == [1, 3] and after[::2] == [1, 3]  # none twice
    assert 0 < during[1] <= 4 < after[1] <= 39  # pieces of a character wait for the rest
    assert (during[3], after[3]) == (0, 1)


CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_schemathesis_finds_no_server_error_and_no_answer_beside_the_schema(tmp_path):
    """/openapi.json is a plain schema that the answers match, as outsiders run it."""
    engine = Engine(make_tiny_target(max_length=2048), max_batch=16)
    with live(create_app(engine, limits=Limits(max_new_tokens=2))) as url:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--no-color"]
        limits = ["--checks", CHECKS, "--phases", "examples,fuzzing,stateful", "--max-examples", "3", "--seed", "1"]
        run = subprocess.run([*command, *limits], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "Tested: 16" in run.stdout, run.stdout[-5000:]
