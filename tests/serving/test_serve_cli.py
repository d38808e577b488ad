"""draft-serve as a process on a real port."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_testing import eventually, series

ROOT = Path(__file__).parents[2]
PROMPT = "<|im_start|>user\nTell me about zebras.<|im_end|>\n<|im_start|>assistant\n"
# draft-serve, which takes no answer beyond 10 tokens while there is a file `hold` where it runs: a request that a test
# needs to be running does not end first, however fast the machine is
SERVE = """
import pathlib, time
from serving.cli import main
from serving.engine.step import Decoder

hold, step = pathlib.Path("hold"), Decoder.step

def held(self, rows):
    going = [row for row in rows if len(row.answer.tokens) < 10 or not hold.exists()]
    step(self, going) if going else time.sleep(0.005)

Decoder.step = held
main()
"""


@dataclass
class Server:
    process: subprocess.Popen[str]
    ready_line: str
    log: Path

    @property
    def url(self) -> str:
        found = re.search(r"https?://\S+", self.ready_line)
        assert found, self.ready_line + self.log.read_text()
        return found.group()

    def generate(self, **parameters: Any) -> httpx.Response:
        body = {"inputs": PROMPT, "parameters": {"details": True, **parameters}}
        return httpx.post(f"{self.url}/generate", json=body, timeout=120)

    def metric(self, name: str) -> float:
        return series(httpx.get(f"{self.url}/metrics", timeout=30).text, name)


@pytest.fixture(scope="module")
def server(folders: Path) -> Iterator[Server]:
    models = ["--target", str(folders / "my-target"), "--head", str(folders / "my-head"), "--dtype", "float64"]
    with started(
        folders, *models, "--speculation-length", "4", "--speculation", "chain", "--drain-seconds", "60"
    ) as it:
        yield it


@contextmanager
def started(folder: Path, *flags: str, **variables: str) -> Iterator[Server]:
    """draft-serve with these flags, on a free port, once it is ready."""
    command = [sys.executable, "-c", SERVE, *flags, "--port", "0", "--threads", "1", "--mode", "eager"]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables
    log = folder / f"server-{time.monotonic()}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=stderr
        )
    assert process.stdout is not None
    try:
        yield Server(process, process.stdout.readline(), log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The servers that run in this folder finish no long answer."""
    (folder / "hold").touch()
    try:
        yield
    finally:
        (folder / "hold").unlink()


def test_it_says_when_it_is_ready_and_what_it_serves(server, folders) -> None:
    assert re.fullmatch(
        r"serving .*my-target with .*my-head, K = 4, shared-noise on http://127\.0\.0\.1:\d+\n", server.ready_line
    )
    assert httpx.get(f"{server.url}/health", timeout=30).json() == {"status": "ok"}
    info = httpx.get(f"{server.url}/info", timeout=30)
    assert (info.json()["model_id"], info.json()["head"]["name"]) == ("my-target", "my-head")
    assert (info.json()["speculation_length"], info.json()["dtype"]) == (4, "float64")
    assert str(folders) not in info.text


def test_sigterm_under_load_loses_no_accepted_request(server, folders) -> None:
    """The last test of this server: it stops it. Half of the requests stream; 16 run and 8 wait."""
    answers: list[httpx.Response] = []

    def ask(index: int) -> None:
        body = {"inputs": PROMPT, "stream": index % 2 == 0, "parameters": {"max_new_tokens": 80}}
        answers.append(httpx.post(f"{server.url}/generate", json=body, timeout=120))

    clients = [threading.Thread(target=ask, args=(index,)) for index in range(24)]
    with held(folders):
        for client in clients:
            client.start()
        eventually(lambda: server.metric("num_requests_running") == 16 and server.metric("num_requests_waiting") == 8)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{server.url}/ready", timeout=30).status_code == 503)
        assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
        assert server.generate(max_new_tokens=1).status_code == 503
    assert server.process.wait(90) == 0
    for client in clients:
        client.join(30)
    assert [answer.status_code for answer in answers] == [200] * 24
    assert all('"generated_text":"' in answer.text and '"error"' not in answer.text for answer in answers)
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert all(line["request_id"] for line in lines if line["message"] == "request")
    assert "Traceback" not in str(lines) and "zebras" not in str(lines)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_what_does_not_finish_within_the_drain_ends_with_an_error_and_a_key_guards(folders) -> None:
    flags = ["--target", str(folders / "my-target"), "--drain-seconds", "0.3", "--max-batch", "1"]
    with held(folders), started(folders, *flags, DRAFTSMITH_API_KEY="a-key") as server:
        assert httpx.get(f"{server.url}/info").status_code == 401
        headers = {"authorization": "Bearer a-key"}
        told = {"/generate_stream": "", "/v1/completions": ""}

        def ask(path: str, body: dict[str, Any]) -> None:
            with httpx.stream("POST", server.url + path, json=body, headers=headers, timeout=60) as answer:
                for part in answer.iter_text():
                    told[path] += part

        bodies = {
            "/generate_stream": {"inputs": PROMPT, "parameters": {"max_new_tokens": 400}},
            "/v1/completions": {"prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True},
        }
        clients = [threading.Thread(target=ask, args=each) for each in bodies.items()]
        for client in clients:
            client.start()
        eventually(lambda: "num_requests_waiting 1.0" in httpx.get(f"{server.url}/metrics", headers=headers).text)
        eventually(lambda: any(told.values()))  # its stream has begun
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        for client in clients:
            client.join(30)
    # one was running; the other one waited and got a status of its own
    assert sum(text.startswith("data:") for text in told.values()) == 1
    for path, text in told.items():
        error = {"error": "the server is shutting down", "error_type": "unavailable"}
        done = ""
        if path.startswith("/v1"):
            shape = {"type": "unavailable_error", "param": None, "code": None}
            error = {"error": {"message": error["error"], **shape}}
            done = "data: [DONE]\n\n"
        if not text.startswith("data:"):
            assert json.loads(text) == error
            continue
        assert text.endswith(done) and "[DONE]" not in text.removesuffix(done)
        *tokens, last = text.removesuffix(done).strip().split("\n\n")
        assert tokens and json.loads(last.removeprefix("data:")) == error


def test_https_for_known_clients_and_a_second_signal_that_ends_it_at_once(folders, tmp_path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    flags = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--drain-seconds", "60"]
    flags += ["--ssl-ca-certs", str(certificate)]
    stranger, known = (ssl.create_default_context(cafile=str(certificate)) for _ in range(2))
    known.load_cert_chain(certificate, key)
    for context in (stranger, known):
        context.check_hostname = False
    with held(folders), started(folders, "--target", str(folders / "my-target"), *flags) as server:
        assert server.url.startswith("https://")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health", verify=stranger, timeout=60)
        with httpx.Client(base_url=server.url, verify=known, timeout=60) as client:
            assert client.get("/health").status_code == 200

            def ask() -> None:
                with suppress(httpx.HTTPError):
                    client.post("/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 400}})

            thread = threading.Thread(target=ask)
            thread.start()
            eventually(lambda: "num_requests_running 1.0" in client.get("/metrics").text)
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: client.get("/ready").status_code == 503)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 128 + signal.SIGTERM
            thread.join(30)
