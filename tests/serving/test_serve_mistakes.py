"""Error messages of draft-serve, and its defaults."""

from __future__ import annotations

import inspect
import logging
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import make_tiny_target

from serving import cli
from serving.api.service import Service

Run = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def run(capfd, monkeypatch) -> Run:
    """Return draft-serve in this process: arguments -> exit status, stdout, stderr."""

    def serves(*_: object) -> None:
        raise AssertionError("it serves")  # and would for ever

    def run(*arguments: str) -> tuple[Any, str, str]:
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
}


@pytest.mark.parametrize("flags", FLAGS)
def test_wrong_flags(run: Run, flags: str) -> None:
    status, out, error = run(*flags.split())
    assert (status, out) == (2, "") and FLAGS[flags] in error and "Traceback" not in error


def sentence(run: Run, *arguments: str) -> str:
    status, out, error = run("--port", "0", *arguments)
    assert (status, out) == (2, "") and error.startswith("draft-serve: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("flags", SENTENCES)
def test_a_mistake_is_one_sentence(run: Run, flags: str, folders, tmp_path) -> None:
    (folders / "text.pem").write_text("no certificate")
    names = {"models": str(folders), "empty": str(tmp_path)}
    assert SENTENCES[flags].format(**names) in sentence(run, *flags.format(**names).split())


def test_a_head_of_another_target_is_refused_with_both_fingerprints(run: Run, folders, tiny_target) -> None:
    head = ["--dtype", "float64", "--head", str(folders / "other-head")]
    error = sentence(run, "--target", str(folders / "my-target"), *head)
    assert tiny_target.fingerprint in error and make_tiny_target(seed=1).fingerprint in error


def test_a_port_a_key_and_a_folder_that_cannot_be_had(run: Run, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in sentence(run, "--port", port, *NEVER.split())
    monkeypatch.setenv("DRAFTSMITH_CACHE", "/dev/null/cache")
    told = run("--port", "0", "--target", "smollm2")[2].splitlines()[-1]  # after the log
    assert told.startswith("draft-serve: '/dev/null/cache") and "could not be read or written" in told
    monkeypatch.setenv("DRAFTSMITH_API_KEY", "")
    assert "DRAFTSMITH_API_KEY is empty" in sentence(run, *NEVER.split())


def test_help_shows_examples_and_two_hundred_requests_fit_into_the_queue_by_default(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0 and "draft-serve --head smollm2-eagle3\n" in out
    defaults = {name: each.default for name, each in inspect.signature(cli.serve).parameters.items()}
    assert defaults["max_batch"] + defaults["max_waiting"] >= 200
