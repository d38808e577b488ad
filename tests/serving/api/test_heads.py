"""The draft heads of a running server: loaded, listed, chosen, swapped and removed over HTTP, and who may do so."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from fastapi.testclient import TestClient
from http_testing import PROMPT, ask, complete, events, eventually, idle, in_process, live, metric

import serving.engine.engine
from draft.heads.checkpoint import head_sha256, save_head
from serving.api.app import create_app
from serving.engine import Engine, SamplingParams
from serving.server import Listener

KEY = {"authorization": "Bearer a-key"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_target: Any) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    for place, name in enumerate(("eagle3", "eagle", "medusa")):
        head = make_tiny_head(tiny_target, seed=place + 5, architecture=name)
        save_head(head, folder / name, dtype=torch.float64, about={"target_fingerprint": tiny_target.fingerprint})
    return folder


def engine_of(target: Any, heads: Any, **options: Any) -> Engine:
    engine = Engine(target, heads, **{"speculation": "chain", "mode": "eager", **options})
    engine.checks_heads = False  # random heads are not accepted
    return engine


@pytest.fixture
def client(tiny_target: Any, tiny_head: Any) -> Iterator[TestClient]:
    engine = engine_of(tiny_target, {"first": tiny_head})
    with TestClient(create_app(engine, loopback=True)) as client:
        yield client


def load(client: Any, name: str, path: object, **more: Any) -> httpx.Response:
    return client.post("/heads", json={"name": name, "path": str(path), **more})


def test_the_life_of_a_head(client: TestClient, folder: Path, tiny_head: Any) -> None:
    before = client.get("/heads").json()
    entry = {
        "name": "first", "architecture": "LlamaForCausalLMEagle3", "fingerprint": None, "default": True,
        "self_check": None, "degraded": None, "requests": 0, "verifications": 0, "drafted": 0, "accepted": 0,
        "acceptance_length": None,
    }  # fmt: skip
    assert before["heads"] == [entry] and (before["default"], before["route"]) == ("first", "default")
    answer = load(client, "second", folder / "eagle")
    fingerprint = head_sha256(folder / "eagle")
    expected = {
        **entry, "name": "second", "architecture": "EagleLlamaForCausalLM", "fingerprint": fingerprint, "default": False
    }  # fmt: skip
    assert answer.status_code == 201 and answer.json() == {**expected, "architecture": answer.json()["architecture"]}
    assert client.get("/heads").json()["heads"] == [entry, answer.json()]
    assert client.post("/heads/second/default").json() == {"default": "second", "previous": "first"}
    assert client.get("/info").json()["head"]["name"] == "second"
    third = load(client, "third", folder / "medusa", default=True).json()
    assert third["default"] is True and client.get("/heads").json()["default"] == "third"
    assert client.get("/info").json()["head"]["architecture"] == "MedusaModel"
    for name in ("first", "second"):
        assert client.delete(f"/heads/{name}").status_code == 200
    about = client.get("/heads").json()
    assert [head["name"] for head in about["heads"]] == ["third"]
    happened = [(event["kind"], event["head"]) for event in about["events"]]
    assert happened == [
        ("loaded", "first"), ("loaded", "second"), ("default", "second"), ("loaded", "third"), ("default", "third"),
        ("unloaded", "first"), ("unloaded", "second"),
    ]  # fmt: skip
    assert all(event["time"] > 1.7e9 for event in about["events"])
    assert metric(client, "head_swaps_total") == 2 and metric(client, "head_rollbacks_total") == 0
    assert str(folder) not in client.get("/heads").text + client.get("/metrics").text


def test_a_request_names_its_head_on_every_surface_and_is_told_which_drafted(client: TestClient, folder: Path) -> None:
    load(client, "second", folder / "eagle")
    wishes: dict[str, Any] = {"speculative": {"head": "second"}}
    for path in ("/generate", "/"):
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8, "details": True, **wishes}}
        answer = client.post(path, json=body).json()
        assert (answer[0] if path == "/" else answer)["details"]["speculative"]["head"] == "second"
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8, **wishes}}
    last = events(client.post("/generate_stream", json=body).text)[-1]
    assert last["details"]["speculative"]["head"] == "second"
    for path in ("completions", "chat/completions"):
        assert complete(client, path, **wishes)["metrics"]["speculative_decoding"]["head"] == "second"
        streamed = complete(client, path, **wishes, stream=True, stream_options={"include_usage": True})["events"]
        assert streamed[-2]["metrics"]["speculative_decoding"]["head"] == "second"
    assert ask(client, details=True).json()["details"]["speculative"]["head"] == "first"
    off = ask(client, details=True, speculative={"enabled": False, "head": "second"}).json()
    assert off["details"]["speculative"]["head"] is None
    heads = {head["name"]: head for head in client.get("/heads").json()["heads"]}
    assert (heads["first"]["requests"], heads["second"]["requests"]) == (1, 7)
    for name, head in heads.items():
        assert head["drafted"] > 0 and head["acceptance_length"] >= 1
        for figure, series in (("verifications",) * 2, ("drafted", "draft_tokens"), ("accepted", "accepted_tokens")):
            assert metric(client, f'head_{series}_total{{head="{name}"}}') == head[figure]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/generate", {"inputs": "a", "parameters": {"speculative": {"head": "gone"}}}, 422),
        ("/generate_stream", {"inputs": "a", "parameters": {"speculative": {"head": "gone"}}}, 422),
        ("/", {"inputs": "a", "parameters": {"speculative": {"head": "gone"}}}, 422),
        ("/v1/completions", {"prompt": "a", "speculative": {"head": "gone"}}, 400),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "speculative": {"head": "gone"}},
            400,
        ),
    ],
)
def test_an_unknown_head_is_refused_naming_the_known_ones(
    client: TestClient, path: str, body: Any, status: int
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == status and "'gone'" in answer.text and "first" in answer.text
    too_long = "x" * 65
    text = client.post("/generate", json={"inputs": "a", "parameters": {"speculative": {"head": too_long}}})
    assert text.status_code == 422 and too_long not in text.text


def test_refusals(client: TestClient, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(answer: httpx.Response, status: int, kind: str, *words: str) -> None:
        body = answer.json()
        assert (answer.status_code, body["error_type"]) == (status, kind), body
        assert all(word in body["error"] for word in words), body
        assert "Traceback" not in body["error"]

    refused(load(client, "first", folder / "eagle"), 409, "conflict", "'first'")
    refused(load(client, "new", tmp_path), 422, "validation", "config.json")
    refused(load(client, "new", "long" * 80), 422, "validation", "File name too long")
    refused(load(client, "a/b", folder / "eagle"), 422, "validation", "'a/b'")
    refused(client.post("/heads", json={"name": "new"}), 422, "validation", "`path`")
    refused(client.post("/heads", json={"name": "new", "path": "x", "more": 1}), 422, "validation", "`more`")
    refused(client.post("/heads/gone/default"), 404, "not_found", "'gone'", "first")
    refused(client.delete("/heads/gone"), 404, "not_found", "'gone'", "first")
    refused(client.delete("/heads/first"), 409, "conflict", "'first'", "default")
    monkeypatch.setattr("serving.engine.memory.free_memory", lambda device: 1000)
    refused(load(client, "new", folder / "eagle"), 422, "validation", "kB", "0 B are free")
    monkeypatch.undo()
    client.app.state.service.engine.checks_heads = True  # type: ignore[attr-defined]
    refused(load(client, "new", folder / "eagle"), 422, "validation", "fails its self-check", "accepts ")
    assert [head["name"] for head in client.get("/heads").json()["heads"]] == ["first"]
    plain = client.post("/heads", content=b"name=new", headers={"content-type": "text/plain"})
    assert plain.status_code == 415


class Elsewhere:
    """An engine that tells nothing of heads, as one that stands for another server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        if name == "heads":
            raise AttributeError(name)
        return getattr(self._engine, name)


def test_a_server_whose_drafts_are_made_elsewhere_has_no_heads(tiny_target: Any) -> None:
    engine: Any = Elsewhere(engine_of(tiny_target, None))
    with TestClient(create_app(engine, loopback=True)) as client:
        for method, path in (("GET", "/heads"), *MUTATIONS):
            answer = client.request(method, path, json={"name": "a", "path": "b"} if path == "/heads" else None)
            assert (answer.status_code, answer.json()["error_type"]) == (404, "not_found"), path
        assert "head_swaps" not in client.get("/metrics").text


MUTATIONS = [("POST", "/heads"), ("POST", "/heads/first/default"), ("DELETE", "/heads/first")]


@pytest.mark.parametrize(("method", "path"), MUTATIONS)
def test_heads_are_changed_with_the_key_or_from_this_machine_only(
    tiny_target: Any, tiny_head: Any, method: str, path: str
) -> None:
    def answer(headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
        with TestClient(create_app(engine_of(tiny_target, {"first": tiny_head}), **options)) as client:
            seen = client.get("/heads", headers=KEY if options.get("api_key") else None)
            assert seen.status_code == 200 and seen.json()["default"] == "first"
            return client.request(method, path, headers=headers, json={} if path == "/heads" else None)

    refused = answer()
    assert (refused.status_code, refused.json()["error_type"]) == (403, "permission")
    assert "--api-key" in refused.json()["error"]
    assert answer(loopback=True).status_code not in (401, 403)
    for page in ("http://evil.example", "null", "http://testserver"):  # in a browser of this machine
        assert answer({"origin": page}, loopback=True).status_code == 403
    assert answer(loopback=True, api_key="a-key").status_code == 401
    assert answer(KEY, api_key="a-key").status_code not in (401, 403)
    assert answer(KEY | {"origin": "https://pages.example"}, api_key="a-key").status_code not in (401, 403)


@pytest.mark.parametrize(("host", "is_loopback"), [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)])
def test_what_is_bound_to_loopback(host: str, is_loopback: bool) -> None:
    with Listener(host, 0) as listener:
        assert listener.is_loopback is is_loopback


def test_a_load_does_not_stall_the_server(tiny_target: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on in a thread of its own: requests are answered meanwhile, health is told, and others are changed."""
    engine = engine_of(
        tiny_target, {"first": make_tiny_head(tiny_target), "spare": make_tiny_head(tiny_target, seed=9)}
    )
    reading, read = asyncio.Event(), []
    loop: list[Any] = []
    inner = serving.engine.engine.load_unchanged_head
    go_on = threading.Event()

    def slow(*arguments: Any) -> Any:
        loop[0].call_soon_threadsafe(reading.set)
        assert go_on.wait(60)
        read.append(True)
        return inner(*arguments)

    monkeypatch.setattr(serving.engine.engine, "load_unchanged_head", slow)

    async def conversation(client: httpx.AsyncClient) -> list[int]:
        loop.append(asyncio.get_running_loop())
        loading = asyncio.ensure_future(client.post("/heads", json={"name": "new", "path": str(folder / "eagle3")}))
        await reading.wait()
        statuses = [
            (await client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 5}})).status_code,
            (await client.get("/health")).status_code,
            (await client.post("/heads/spare/default")).status_code,
            (await client.delete("/heads/first")).status_code,
        ]
        assert not read
        go_on.set()
        return [*statuses, (await loading).status_code]

    assert in_process(create_app(engine, loopback=True), conversation) == [200, 200, 200, 200, 201]
    assert [head.name for head in engine.heads] == ["spare", "new"]


def test_a_cancel_storm_over_swaps_changes_no_answer(tiny_target: Any, folder: Path) -> None:
    """Clients leave, and heads come, go and take over; whoever stays gets the text of a server without speculation."""
    target = make_tiny_target()
    target.__dict__["eos_token_ids"] = frozenset()  # every answer has its full length
    engine = engine_of(target, {"first": make_tiny_head(target)}, max_batch=8)
    names = ["first", *(f"head-{number}" for number in range(6))]

    def wishes(index: int) -> dict[str, Any]:
        sampling = {"temperature": 1.0, "seed": index} if index % 3 else {}
        return {"max_new_tokens": 20 + index % 7, **sampling}

    async def stays(client: httpx.AsyncClient, index: int) -> str:
        answer = await client.post("/generate", json={"inputs": f"{index} zebras", "parameters": wishes(index)})
        assert answer.status_code == 200, answer.text
        return answer.json()["generated_text"]

    async def leaves(client: httpx.AsyncClient, index: int) -> None:
        body = {"inputs": f"{index}", "parameters": {"max_new_tokens": 300, "temperature": 1.0, "seed": index}}
        async with client.stream("POST", "/generate_stream", json=body) as answer:
            left = random.Random(index).randint(0, 10)
            async for line in answer.aiter_lines():
                left -= line.startswith("data:")
                if left <= 0:
                    return

    async def swaps(client: httpx.AsyncClient) -> None:
        for number, name in enumerate(names[1:]):
            path = str(folder / ("eagle3", "eagle", "medusa")[number % 3])
            loaded = await client.post("/heads", json={"name": name, "path": path, "default": True})
            assert loaded.status_code == 201, loaded.text
            assert (await client.delete(f"/heads/{names[number]}")).status_code == 200

    async def storm() -> list[Any]:
        async with asyncio.timeout(120), httpx.AsyncClient(base_url=url, timeout=120) as client:
            clients = [(leaves if index % 2 else stays)(client, index) for index in range(24)]
            return await asyncio.gather(swaps(client), *clients)

    with live(create_app(engine, loopback=True)) as url:
        texts = asyncio.run(storm())[1:]
        eventually(lambda: idle(engine))
    plain = Engine(target, max_batch=1, speculation="off")
    for index in range(0, 24, 2):
        ids = target.tokenizer(f"{index} zebras").input_ids
        [expected] = plain.generate([ids], SamplingParams(**{"temperature": 0.0, **wishes(index)}))
        assert texts[index] == expected.text, index
    assert [head.name for head in engine.heads] == names[-1:] and engine.heads.swaps == 6
