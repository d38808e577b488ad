"""draft-serve as a process on a real port, and what it says when it is called wrongly."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import make_tiny_head, make_tiny_target

from draft.checkpoint import save_head
from draft.heads import Eagle3Head
from draft.target import Target
from serving import cli
from serving.engine import Engine, SamplingParams

ROOT = Path(__file__).parents[2]
PROMPT = "<|im_start|>user\nTell me about zebras.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_target: Target, tiny_head: Eagle3Head) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_target.model.save_pretrained(folder / "my-target")
    tiny_target.tokenizer.save_pretrained(folder / "my-target")
    about = {"target_fingerprint": tiny_target.fingerprint}
    save_head(tiny_head, folder / "my-head", dtype=torch.float64, about=about)
    other = make_tiny_target(seed=1)
    save_head(
        make_tiny_head(other),
        folder / "other-head",
        dtype=torch.float64,
        about={"target_fingerprint": other.fingerprint},
    )
    return folder


# --- a live server


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
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"draftsmith:{name} ")))


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
    command = [sys.executable, "-m", "serving.cli", *flags, "--port", "0", "--threads", "1", "--mode", "eager"]
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


def test_it_says_when_it_is_ready_and_what_it_serves(server, folders) -> None:
    assert re.fullmatch(
        r"serving .*my-target with .*my-head, K = 4, shared-noise on http://127\.0\.0\.1:\d+\n", server.ready_line
    )
    assert httpx.get(f"{server.url}/health", timeout=30).json() == {"status": "ok"}
    info = httpx.get(f"{server.url}/info", timeout=30)
    assert (info.json()["model_id"], info.json()["head"]["name"]) == ("my-target", "my-head")
    assert (info.json()["speculation_length"], info.json()["dtype"]) == (4, "float64")
    assert str(folders) not in info.text


def test_a_seed_gives_the_same_text_with_and_without_speculation_here_and_there(server, tiny_target) -> None:
    settings = {"max_new_tokens": 24, "temperature": 0.9, "top_p": 0.95, "seed": 11}
    answers = [
        server.generate(**settings, speculative=how).json() for how in (None, {"enabled": False}, {"num_tokens": 1})
    ]
    [here] = Engine(tiny_target).generate([tiny_target.tokenizer(PROMPT).input_ids], SamplingParams(**settings))
    assert {answer["generated_text"] for answer in answers} == {here.text}
    figures = [answer["details"]["speculative"] for answer in answers]
    assert [each["speculation_length"] for each in figures] == [4, 0, 1]
    assert figures[0]["drafted"] > figures[1]["drafted"] == 0
    assert server.generate(**{**settings, "seed": 12}).json()["generated_text"] != here.text


def test_a_client_that_hangs_up_stops_its_generation(server) -> None:
    cancelled = 'request_success_total{finished_reason="cancelled"}'
    before = server.metric(cancelled)
    with pytest.raises(httpx.ReadTimeout):
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 400, "stop": ["\u2603"]}}
        httpx.post(f"{server.url}/generate", json=body, timeout=httpx.Timeout(30, read=0.05))
    deadline = time.monotonic() + 120
    while server.metric(cancelled) == before or server.metric("num_requests_running"):
        assert time.monotonic() < deadline, "the request ran on"
        time.sleep(0.02)
    assert server.generate(max_new_tokens=2).status_code == 200


def test_a_large_body_is_refused_with_an_answer(server) -> None:
    for size in (2_100_000, 10_000_000):
        answer = httpx.post(f"{server.url}/generate", json={"inputs": "z" * size}, timeout=60)
        assert answer.status_code == 413 and "2000000" in answer.json()["error"]
    assert server.generate(max_new_tokens=2).status_code == 200


def test_its_log_has_request_ids_and_no_prompts(server) -> None:
    answer = server.generate(max_new_tokens=2)
    deadline = time.monotonic() + 120
    while answer.headers["x-request-id"] not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert all(line["request_id"] for line in lines if line["message"] == "request")
    assert "zebras" not in server.log.read_text()


def test_sigterm_under_load_loses_no_accepted_request(server) -> None:
    """The last test of this server: it stops it. Half of the requests stream; 16 run and 8 wait."""
    answers: list[httpx.Response] = []

    def ask(index: int) -> None:
        body = {"inputs": PROMPT, "stream": index % 2 == 0, "parameters": {"max_new_tokens": 150}}
        answers.append(httpx.post(f"{server.url}/generate", json=body, timeout=120))

    clients = [threading.Thread(target=ask, args=(index,)) for index in range(24)]
    for client in clients:
        client.start()
    wait_for(lambda: server.metric("num_requests_running") + server.metric("num_requests_waiting") == 24)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{server.url}/ready", timeout=30).status_code == 503)
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
    assert server.generate(max_new_tokens=1).status_code == 503
    assert server.process.wait(90) == 0
    for client in clients:
        client.join(30)
    assert [answer.status_code for answer in answers] == [200] * 24
    assert all('"generated_text":"' in answer.text and '"error"' not in answer.text for answer in answers)
    assert "Traceback" not in server.log.read_text()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def test_what_does_not_finish_within_the_drain_ends_with_an_error_and_a_key_guards(folders) -> None:
    flags = ["--target", str(folders / "my-target"), "--drain-seconds", "0.3", "--max-batch", "1"]
    with started(folders, *flags, DRAFTSMITH_API_KEY="a-key") as server:
        assert httpx.get(f"{server.url}/info").status_code == 401
        headers = {"authorization": "Bearer a-key"}
        told: dict[str, str] = {}

        def ask(path: str, body: dict[str, Any]) -> None:
            told[path] = httpx.post(server.url + path, json=body, headers=headers, timeout=60).text

        bodies = {
            "/generate_stream": {"inputs": PROMPT, "parameters": {"max_new_tokens": 400}},
            "/v1/completions": {"prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True},
        }
        clients = [threading.Thread(target=ask, args=each) for each in bodies.items()]
        for client in clients:
            client.start()
        wait_for(lambda: "num_requests_waiting 1.0" in httpx.get(f"{server.url}/metrics", headers=headers).text)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        for client in clients:
            client.join(30)
    # one was running, its stream had begun; the other one waited and got a status of its own
    assert all("shutting down" in text for text in told.values())
    assert any(text.startswith("data:") for text in told.values())


def test_https_and_a_second_signal_that_ends_it_at_once(folders, tmp_path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    flags = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--drain-seconds", "60"]
    with started(folders, "--target", str(folders / "my-target"), *flags) as server:
        assert server.url.startswith("https://")
        with httpx.Client(base_url=server.url, verify=False, timeout=60) as client:

            def ask() -> None:
                with suppress(httpx.HTTPError):
                    client.post("/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 400}})

            thread = threading.Thread(target=ask)
            thread.start()
            wait_for(lambda: "num_requests_running 1.0" in client.get("/metrics").text)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/ready").status_code == 503)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(5) == 128 + signal.SIGTERM
            thread.join(30)


# --- wrong calls


def refused(capfd, *arguments: str) -> str:
    """What draft-serve writes to stderr when it refuses its arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["draft-serve", *arguments])
        patch.setattr(logging.root, "handlers", [])  # main's writes to a stderr that is captured here only
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    captured = capfd.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--speculation-length", "0"], "speculation-length"),
        (["--port", "70000"], "port"),
        (["--port", "eighty"], "port"),
        (["--rule", "typical"], "rejection"),
        (["--max-waiting", "-1"], "max-waiting"),
        (["--max-new-tokens-limit", "0"], "max-new-tokens-limit"),
        (["--threads", "0"], "threads"),
        (["--speculation", "always"], "speculation"),
        (["--mode", "fast"], "compiled"),
        (["--max-batch", "0"], "max-batch"),
        (["--drain-seconds", "-1"], "drain-seconds"),
        (["--request-timeout", "-1"], "request-timeout"),
        (["--tarrget", "smollm2"], "tarrget"),
        (["smollm2"], "smollm2"),
    ],
    ids=str,
)
def test_wrong_flags(capfd, arguments, told) -> None:
    error = refused(capfd, *arguments)
    assert told in error and "Traceback" not in error


def one_sentence(capfd, *arguments: str) -> str:
    error = refused(capfd, "--port", "0", *arguments)
    assert error.startswith("draft-serve: ") and error.count("\n") == 1
    return error


def test_a_port_that_is_taken(capfd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in one_sentence(capfd, "--port", str(port), "--target", "never-loaded")


def test_an_address_that_is_not_ours(capfd) -> None:
    assert "203.0.113.7" in one_sentence(capfd, "--host", "203.0.113.7", "--target", "never-loaded")


def test_targets_and_heads_that_do_not_exist(capfd, folders, tmp_path) -> None:
    assert "config.json" in one_sentence(capfd, "--target", str(tmp_path))
    assert "no such file" in one_sentence(capfd, "--target", str(tmp_path / "absent.gguf"))
    target = ["--target", str(folders / "my-target"), "--dtype", "float64"]
    assert str(tmp_path) in one_sentence(capfd, *target, "--head", str(tmp_path))
    assert "float12" in one_sentence(capfd, "--target", str(folders / "my-target"), "--dtype", "float12")


def test_a_head_of_another_target_is_refused_with_both_fingerprints(capfd, folders, tiny_target) -> None:
    arguments = ["--target", str(folders / "my-target"), "--dtype", "float64", "--head", str(folders / "other-head")]
    error = one_sentence(capfd, *arguments)
    assert tiny_target.fingerprint in error and make_tiny_target(seed=1).fingerprint in error


def test_keys_prefixes_and_certificates_that_cannot_be(capfd, folders, tmp_path) -> None:
    target = ["--target", "never-loaded"]
    assert "--api-key" in one_sentence(capfd, *target, "--api-key", "a key\n")
    assert "--metrics-prefix" in one_sentence(capfd, *target, "--metrics-prefix", "a-b")
    assert "absent.pem" in one_sentence(capfd, *target, "--ssl-certfile", str(tmp_path / "absent.pem"))
    assert "--ssl-certfile" in one_sentence(capfd, *target, "--ssl-keyfile", str(tmp_path / "absent.pem"))
    (tmp_path / "text.pem").write_text("no certificate")
    assert "text.pem" in one_sentence(capfd, *target, "--ssl-certfile", str(tmp_path / "text.pem"))


def test_help_shows_examples(capfd) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["draft-serve", "--help"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == 0
    assert "draft-serve --head smollm2-eagle3\n" in capfd.readouterr().out
