"""draft-serve as a process on a real port, its error messages and its defaults."""

import inspect
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import httpx
import pytest
import uvicorn
from conftest import make_tiny_target
from http_testing import events, eventually, series
from server_processes import held, started

from serving import cli
from serving.api.app import create_app
from serving.api.service import Service
from serving.server import _Server

CLIENTS = ThreadPoolExecutor(24)
PROMPT = "<|im_start|>user\nTell me about zebras.<|im_end|>\n<|im_start|>assistant\n"
UNWANTED = ("matplotlib", "datasets", "tensorboardX", "wandb", "draft.training", "draft.interop", "draft.data")


def test_a_server_from_its_ready_line_to_sigterm_under_load(folders):
    """No accepted request is lost: half of the requests stream; 16 run and 8 wait."""

    def ask(index):
        body = {"inputs": PROMPT, "stream": index % 2 == 0, "parameters": {"max_new_tokens": 80}}
        return httpx.post(f"{url}/generate", json=body, timeout=120)

    def metric(name):
        return series(httpx.get(f"{url}/metrics", timeout=30).text, name)

    flags = ["--head", str(folders / "my-head"), "--dtype", "float64", "--speculation-length", "4"]
    with started(folders, *flags, "--speculation", "chain", "--drain-seconds", "60") as (process, ready):
        what = r"serving .*my-target with .*my-head, K = 4, shared-noise on http://127\.0\.0\.1:\d+\n"
        assert re.fullmatch(what, ready)
        url = ready.split()[-1]
        assert httpx.get(f"{url}/health", timeout=30).json() == {"status": "ok"}
        info = httpx.get(f"{url}/info", timeout=30)
        assert (info.json()["model_id"], info.json()["head"]["name"]) == ("my-target", "my-head")
        assert (info.json()["speculation_length"], info.json()["dtype"]) == (4, "float64")
        assert str(folders) not in info.text
        with held(folders):
            clients = [CLIENTS.submit(ask, index) for index in range(24)]
            eventually(lambda: metric("num_requests_running") == 16 and metric("num_requests_waiting") == 8)
            process.send_signal(signal.SIGTERM)
            eventually(lambda: httpx.get(f"{url}/ready", timeout=30).status_code == 503)
            assert httpx.get(f"{url}/health", timeout=30).status_code == 200
            turned_away = httpx.post(f"{url}/generate", json={"inputs": PROMPT}, timeout=30)
            assert turned_away.status_code == 503 and turned_away.headers["retry-after"]
        answers = [client.result(120) for client in clients]
        assert process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    assert [answer.status_code for answer in answers] == [200] * 24
    assert all('"generated_text":"' in answer.text and '"error"' not in answer.text for answer in answers)
    lines = [json.loads(line) for line in (folders / "log").read_text().splitlines()]
    assert all(line["request_id"] for line in lines if line["message"] == "request")
    assert "Traceback" not in str(lines) and "zebras" not in str(lines)
    # it installs without the extras of training
    loaded = (folders / "modules").read_text().split()
    assert "torch" in loaded and not [name for name in loaded if name.startswith(UNWANTED)]


def test_https_a_key_and_a_drain_that_ends_what_has_not_finished(folders, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    flags = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--ssl-ca-certs", str(certificate)]
    flags += ["--drain-seconds", "0.3", "--max-batch", "1"]
    stranger, known = (ssl.create_default_context(cafile=str(certificate)) for _ in range(2))
    known.load_cert_chain(certificate, key)
    for context in (stranger, known):
        context.check_hostname = False
    told = {"/generate_stream": "", "/v1/completions": ""}
    parameters = {"max_tokens": 400, "stream": True, "ignore_eos": True}
    bodies = [{"inputs": PROMPT, "parameters": {"max_new_tokens": 400}}, {"prompt": PROMPT, **parameters}]
    with held(folders), started(folders, *flags, DRAFTSMITH_API_KEY="a-key") as (process, ready):
        url = ready.split()[-1]
        assert url.startswith("https://")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", verify=stranger, timeout=60)
        assert httpx.get(f"{url}/info", verify=known).status_code == 401
        headers = {"authorization": "Bearer a-key"}
        with httpx.Client(base_url=url, verify=known, headers=headers, timeout=60) as client:

            def ask(path, body):
                with client.stream("POST", path, json=body) as answer:
                    for part in answer.iter_text():
                        told[path] += part

            clients = [CLIENTS.submit(ask, *each) for each in zip(told, bodies, strict=True)]
            eventually(lambda: "num_requests_waiting 1.0" in client.get("/metrics").text)
            eventually(lambda: any(told.values()))  # its stream has begun
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert not wait(clients, 60).not_done
    # one was running; the other one waited and got a status of its own
    assert sum(text.startswith("data:") for text in told.values()) == 1
    for path, text in told.items():
        parts = events(text) if text.startswith("data:") else [json.loads(text)]
        if path == "/v1/completions":
            error = {"type": "unavailable_error", "param": None, "code": None, "message": "the server is shutting down"}
            assert {"error": error} in parts[-2:] and parts.count("[DONE]") == (len(parts) > 1)
        else:
            assert parts[-1] == {"error": "the server is shutting down", "error_type": "unavailable"}


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    ended = list[int]()
    monkeypatch.setattr(os, "_exit", ended.append)
    server = _Server(uvicorn.Config(create_app(None)), lambda: pytest.fail("it loads"), "", 60.0)
    server.handle_exit(signal.SIGTERM, None)
    assert not ended
    server.handle_exit(signal.SIGTERM, None)
    assert ended == [128 + signal.SIGTERM]


# mistakes

Run = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def run(capfd, monkeypatch):
    """Return draft-serve in this process: arguments -> exit status, stdout, stderr."""

    def serves(*_):
        raise AssertionError("it serves")  # and would for ever

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["draft-serve", *arguments])
            patch.setattr(signal, "signal", lambda *_: None)  # the handlers of a server that has ended
            patch.setattr(logging.root, "handlers", [])  # main's writes to a stderr that is captured here only
            patch.setattr(Service, "attach", serves)
            with pytest.raises(SystemExit) as stopped:
                cli.main()
        return stopped.value.code, *capfd.readouterr()

    return run


FLAGS = {
    "--speculation-length 0": "speculation-length",
    "--port 70000": "port",
    "--rule typical": "rejection",
    "--tarrget smollm2": "tarrget",
    "smollm2": "smollm2",
}
NEVER = "--target never-loaded"
# flags, with the folder of the models and one that holds nothing -> words of the sentence
SENTENCES = {
    f"{NEVER} --host 203.0.113.7": "203.0.113.7",
    "--target {empty}": "config.json",
    "--target {empty}/absent.gguf": "no such file",
    "--target {models}/my-target --dtype float64 --head {empty}": "{empty}",
    "--target {models}/my-target --dtype float12": "float12",
    f"{NEVER} --api-key é": "--api-key",
    f"{NEVER} --metrics-prefix a-b": "--metrics-prefix",
    f"{NEVER} --ssl-certfile {{empty}}/absent.pem": "absent.pem",
    f"{NEVER} --ssl-keyfile {{empty}}/absent.pem": "--ssl-certfile",
    f"{NEVER} --ssl-ca-certs {{models}}/text.pem": "--ssl-certfile",
    f"{NEVER} --ssl-cert-reqs required": "--ssl-certfile",
    f"{NEVER} --ssl-certfile {{models}}/text.pem --ssl-cert-reqs optional": "--ssl-ca-certs",
    f"{NEVER} --ssl-certfile {{models}}/text.pem": "text.pem",
    f"{NEVER} --head a=one --head a=two": "there is a head 'a' already",
    f"{NEVER} --head here/my-head --head =two": "head name ''",
    f"{NEVER} --kv-cache-memory 4pounds": "'4pounds' is not a size",
    "--target {models}/my-target --mode eager --kv-cache-memory 1kB": "is 1 kB, of which a sequence takes ",
    "--target {models}/my-target --mode eager --kv-cache-memory 9000TB": "is 9e+03 TB, and ",
    f"{NEVER} --engine vllm --upstream http://127.0.0.1:1": "give one of the two",
    f"{NEVER} --upstream http://127.0.0.1:1 --dtype float32": "--dtype is of the built-in engine",
    f"{NEVER} --upstream http://127.0.0.1:1 --speculation-length 3": "--speculation-length",
    f"{NEVER} --engine vllm --no-lookup": "--lookup",
    f"{NEVER} --engine vllm -- --port 9": "--port cannot be passed to vLLM",
    f"{NEVER} --upstream-key a": "--upstream",
    f"{NEVER} -- --tensor-parallel-size 2": "need --engine vllm",
    "--target {models}/my-target --upstream 127.0.0.1:8001": "'127.0.0.1:8001' is not a URL",
    "--target {empty} --upstream http://127.0.0.1:1": "config.json",
    "--target {models}/my-target --head {empty} --upstream http://127.0.0.1:1": "{empty}",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_wrong_flags(run, flags):
    status, out, error = run(*flags.split())
    assert (status, out) == (2, "") and FLAGS[flags] in error and "Traceback" not in error


def sentence(run: Run, *arguments: str) -> str:
    status, out, error = run("--port", "0", *arguments)
    assert (status, out) == (2, "") and error.startswith("draft-serve: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("flags", SENTENCES)
def test_a_mistake_is_one_sentence(run, flags, folders, tmp_path):
    (folders / "text.pem").write_text("no certificate")
    names = {"models": str(folders), "empty": str(tmp_path)}
    assert SENTENCES[flags].format(**names) in sentence(run, *flags.format(**names).split())


def test_a_head_of_another_target_is_refused_with_both_fingerprints(run, folders, tiny_target):
    head = ["--dtype", "float64", "--head", str(folders / "other-head")]
    error = sentence(run, "--target", str(folders / "my-target"), *head)
    assert tiny_target.fingerprint in error and make_tiny_target(seed=1).fingerprint in error


def test_a_port_a_key_and_a_folder_that_cannot_be_had(run, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in sentence(run, "--port", port, *NEVER.split())
    monkeypatch.setenv("DRAFTSMITH_CACHE", "/dev/null/cache")
    told = run("--port", "0", "--target", "smollm2")[2].splitlines()[-1]  # after the log
    assert told.startswith("draft-serve: '/dev/null/cache") and "could not be read or written" in told
    monkeypatch.setenv("DRAFTSMITH_API_KEY", "")
    assert "DRAFTSMITH_API_KEY is empty" in sentence(run, *NEVER.split())


def test_help_shows_examples_and_two_hundred_requests_fit_into_the_queue_by_default(run):
    status, out, _ = run("--help")
    assert status == 0 and "draft-serve --head smollm2-eagle3\n" in out
    defaults = {name: each.default for name, each in inspect.signature(cli.serve).parameters.items()}
    assert defaults["max_batch"] + defaults["max_waiting"] >= 200
