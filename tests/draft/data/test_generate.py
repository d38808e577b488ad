"""Responses from a live server of the same tiny target: exact rows, marked rows, failures, and interruptions."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from conftest import make_writing_target
from fastapi import FastAPI, Request, Response
from http_testing import live
from openai import _base_client
from trained_heads import responses_of
from written_data import rows_of, served

from draft.data import generate as module
from draft.data.generate import Endpoint, EndpointError
from draft.data.prepare import prepare
from draft.data.settings import EndpointSettings
from draft.errors import UserError
from draft.evaluation.replay import replay
from draft.target import load_target

SHAPE = {"max_new_tokens": 10, "progress": False, "held_out_share": 0.25, "max_length": 200}
KEY = "a-key"


@pytest.fixture(scope="module")
def server(folder):
    with served(load_target(str(folder), "float32"), api_key=KEY, strict_model_name=True) as settings:
        yield settings.endpoint


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(_base_client, "MAX_RETRY_DELAY", 0.05)


def write_questions(folder: Path, count: int = 12) -> Path:
    path = folder / "questions.jsonl"
    turns = ([f"number {n}", f"and {n * 7 % 11}"][: 1 + n % 2] for n in range(count))
    path.write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    return path


def at(address: str, **options: Any) -> EndpointSettings:
    return EndpointSettings(endpoint=address, **options)


@pytest.fixture
def write(target, tmp_path):
    """Let a server answer questions, 12 unless told otherwise, into a folder of that name."""

    def write(name, address, count=12, options=None, **arguments):
        settings = {"prompts": [write_questions(tmp_path, count)], **SHAPE, **arguments}
        dataset = prepare(target, tmp_path / name, server=at(address, **(options or {})), **settings)
        assert dataset is not None
        return dataset

    return write


class Proxy:
    """In front of the real server: it counts, delays, and fails as it is told."""

    def __init__(self, upstream: str, trouble: Callable[[int, dict[str, Any] | None], Response | None] | None) -> None:
        self.upstream, self.trouble = upstream, trouble
        self.count = self.running = self.most = 0
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self.forward, methods=["GET", "POST"])
        self.client = httpx.AsyncClient(timeout=60)

    async def forward(self, request: Request, path: str) -> Response:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            body = await request.body()
            parsed = json.loads(body) if body else None
            if parsed is not None:
                self.bodies.append(parsed)
                self.times.append(time.monotonic())
                self.count += 1
                await asyncio.sleep(0.02)
                failed = self.trouble(self.count, parsed) if self.trouble else None
                if failed is not None:
                    return failed
            headers = {
                name: value for name, value in request.headers.items() if name in ("authorization", "content-type")
            }
            answer = await self.client.request(request.method, f"{self.upstream}/{path}", content=body, headers=headers)
            return Response(answer.content, answer.status_code, media_type="application/json")
        finally:
            self.running -= 1


@contextmanager
def proxy(upstream: str, trouble: Any = None) -> Iterator[tuple[str, Proxy]]:
    made = Proxy(upstream, trouble)
    with live(made.app) as address:
        yield address, made


def problem(status: int, text: str = "no", **headers: str) -> Response:
    return Response(json.dumps({"error": {"message": text}}), status, headers, "application/json")


def test_exact_rows_are_those_of_the_target(write, target, server):
    """Greedy ones token for token; the others, and later turns, depend neither on concurrency nor on order."""
    alone = write("alone", server, options={"concurrency": 1})
    with proxy(server) as (address, seen):
        data = write("remote", address, options={"concurrency": 3})
    remote = rows_of(data)
    assert remote == rows_of(alone) and len(remote) == 12 and not any(row.retokenised for row in remote)
    greedy = [row for row in remote if row.temperature == 0]
    assert len(greedy) == 6
    expected = responses_of(target, [row.ids[: row.prompt_length] for row in greedy], 10)
    assert [row.ids[row.prompt_length :][: len(ids)] for row, ids in zip(greedy, expected, strict=True)] == expected
    assert seen.most == 3
    asked = seen.bodies[1:]  # the first one asked whether the server knows this way
    assert all(isinstance(body["prompt"][0], int) and body["return_token_ids"] for body in asked)
    assert {(body["temperature"], body["top_p"], body["top_k"]) for body in asked} == {(0.0, 1.0, -1), (1.0, 1.0, -1)}
    assert data.manifest["counts"]["train"]["retokenised_rows"] == 0
    replay(target, {}, remote, 3)


def only_chat(_: int, body: dict[str, Any] | None) -> Response | None:
    """As servers that know neither prompts of token ids nor fields beyond OpenAI's."""
    if body is not None and ("prompt" in body or "top_k" in body or "return_token_ids" in body):
        return problem(400, "unknown field")
    return None


def test_rows_of_text_are_tokenised_again_and_kept_out_of_tau(write, target, server):
    with proxy(server, only_chat) as (address, seen):
        data = write("data", f"{address}/v1/chat/completions")
    rows = rows_of(data)
    assert all(row.retokenised for row in rows) and {row.temperature for row in rows} == {0.0, 1.0}
    assert data.manifest["counts"]["train"]["retokenised_rows"] == 9
    turns = [[message["role"] for message in body["messages"]] for body in seen.bodies if "messages" in body]
    assert ["user", "assistant", "user"] in turns
    for row in rows:
        ends = row.ids[-1] == 2
        text = target.tokenizer.decode(row.ids)
        assert text.count("<|im_start|>assistant\n") == text.count("<|im_start|>user\n")
        assert ends or row.trained <= 3 * 20  # a stray byte comes back as U+FFFD, three bytes
    with pytest.raises(UserError, match="as these very tokens"):
        replay(target, {}, rows, 3)


def test_a_conversation_ends_before_a_later_turn_that_is_refused(write, target, server):
    """As where the target wrote a character that the server takes in no message: a user could not mend that."""

    def refuse(_, body):
        said = [message["content"] for message in (body or {}).get("messages", [])]
        return problem(400, "NUL") if len(said) == 3 and said[0] == "number 3" else only_chat(0, body)

    with proxy(server, refuse) as (address, _):
        data = write("data", address, greedy_share=1.0)
    assert data.manifest["counts"]["cut_short"] >= 1
    turns = {}
    for row in rows_of(data):
        text = target.tokenizer.decode(row.ids)
        number = int(text.split("user\nnumber ")[1].split("<")[0])
        turns[number] = text.count("<|im_start|>user\n")
    assert len(turns) == 12 and turns[3] == 1 and sum(turns.values()) == 18 - data.manifest["counts"]["cut_short"]


@pytest.mark.parametrize(("status", "said"), [(402, "line 2: .*402"), (400, r"turn 2 of all \d+ conversations")])
def test_what_is_wrong_with_all_later_turns_ends_it(status, said, write, server, tmp_path):
    """A used-up credit is no refusal of what a row says, and neither is a server that takes no answers back.

    The first turns' answers are kept for another try.
    """

    def refuse(_, body):
        return problem(status) if len((body or {}).get("messages", [])) == 3 else only_chat(0, body)

    with proxy(server, refuse) as (address, _), pytest.raises(UserError, match=said):
        # 12 have a second turn, and 8 are enough: what the target writes may end a conversation before
        write("data", address, 24, {"concurrency": 1})
    assert any((tmp_path / "data" / "parts").iterdir())


def test_a_server_that_is_overloaded_now_and_then(write, target, server):
    def trouble(count, _):
        kinds = {0: problem(429, "slow down", **{"retry-after": "0.3"}), 1: problem(500), 2: Response("<html>", 503)}
        return kinds.get(count % 5)

    with proxy(server, trouble) as (address, seen):
        data = write("data", address, options={"concurrency": 4, "retries": 30}, greedy_share=1.0)
    assert rows_of(data) == rows_of(write("alone", server, greedy_share=1.0)) and seen.count > 18
    slow = problem(429, **{"retry-after": "0.4"})
    with proxy(server, lambda count, _: slow if count == 1 else None) as (address, seen):
        Endpoint(at(address), target, 0).close()
    assert seen.times[1] - seen.times[0] >= 0.4


def test_a_server_that_fails_at_token_ids_is_asked_for_text(target, server):
    """And one that fails at everything is retried; once it serves, it is asked in the best way."""

    def trouble(_, body):
        return problem(500, "list index out of range") if "prompt" in body else None

    with proxy(server, trouble) as (address, seen):
        endpoint = Endpoint(at(address), target, 0)
        assert endpoint._dialect.path == "chat/completions" and seen.count < 10
        endpoint.close()
    for first in (3, 12):
        with proxy(server, lambda count, _, first=first: problem(503) if count < first else None) as (address, seen):
            endpoint = Endpoint(at(address), target, 0)
            assert endpoint._dialect == module._DIALECTS[0] and seen.count >= first
            endpoint.close()
    with proxy(server, lambda count, _: problem(503)) as (address, _), pytest.raises(
        EndpointError, match="gives no answer to a first request .503"
    ):  # fmt: skip
        Endpoint(at(address, retries=2), target, 0)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (Response("x", 307, {"location": "/v1/completions"}), "gives no answer"),
        (Response(b"no gzip", 200, {"content-encoding": "gzip"}), "gives no answer"),
        (Response('{"choices": []}'), "without choices"),
        (Response("<html>"), "without a JSON object"),
    ],
)
def test_answers_that_lead_nowhere(target, server, answer, what):
    with proxy(server, lambda count, _: answer) as (address, _), pytest.raises(EndpointError, match=what):
        Endpoint(at(address), target, 0)


@pytest.mark.parametrize(
    ("url", "options", "what"),
    [
        ("http://127.0.0.1:9", {}, "http://127.0.0.1:9 gives no answer"),
        ("localhost:8000", {}, "is no address"),
        ("http://localhost:port", {}, "is no address"),
        ("http://", {}, "is no address"),
        ("", {"api_key_env": "LETTERS"}, r"\$LETTERS holds letters"),
        ("", {"endpoint_model": "other"}, "no model 'other'.*--endpoint-model"),
        ("", {"api_key_env": "WRONG"}, r"refuses the key in \$WRONG \(401"),
        ("", {"api_key_env": "NO_KEY"}, r"without a key \(\$NO_KEY\)"),
    ],
)
def test_a_wrong_address_model_or_key_is_one_sentence(url, options, what, write, server, tmp_path, monkeypatch):
    monkeypatch.setenv("LETTERS", "ключ")
    monkeypatch.setenv("WRONG", "wrong")
    with pytest.raises(EndpointError, match=what):
        write("data", url or server, options={"retries": 1, **options})
    assert not (tmp_path / "data").exists()


def test_a_refused_row_is_named_and_the_others_stay(write, target, server):
    def refuse(_, body):
        text = target.tokenizer.decode(body["prompt"]) if body else ""
        return problem(400, "the prompt is naughty") if "number 6<" in text else None

    what = r"questions.jsonl, line 7: .*refuses it \(400: the prompt is naughty"
    with proxy(server, refuse) as (address, _), pytest.raises(EndpointError, match=what):
        write("data", address, options={"retries": 1})
    with proxy(server) as (address, seen):
        write("data", address)
    assert seen.count < 19  # what was answered before is not asked again


def test_self_prompts_of_a_server_that_returns_only_text(tmp_path):
    """It continues the text of a user turn; one that completes chats only cannot, and says so."""
    words = make_writing_target()

    def only_text(_, body):
        refused = {"top_k", "return_token_ids"} & set(body or {})
        return problem(400, "unknown field") if refused else None

    def run(trouble, out):
        with served(words) as behind, proxy(behind.endpoint, trouble) as (address, _):
            return rows_of(prepare(words, tmp_path / out, num_prompts=3, **SHAPE, server=at(address)))

    rows = run(only_text, "data")
    # how many of the three are kept depends on what the random target writes
    assert rows and {row.source for row in rows} == {"self-prompted"}
    with pytest.raises(EndpointError, match="continues no text outside a chat .400: unknown field.*--prompts FILE"):
        run(only_chat, "none")


def test_data_sets_from_before_rows_had_the_mark(write, server):
    data = write("data", server)
    rows = data.rows("train")
    path = data.folder / "train.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["retokenised"]), path)
    assert data.rows("train") == rows and not any(row.retokenised for row in rows)
