"""Error messages of draft-serve, and its defaults."""

from __future__ import annotations

import inspect
import logging
import signal
import socket
import sys

import pytest
from conftest import make_tiny_target

from serving import cli


def refused(capfd, *arguments: str) -> str:
    """Return the text on stderr of draft-serve with wrong arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["draft-serve", *arguments])
        patch.setattr(signal, "signal", lambda *_: None)  # the handlers of a server that has ended
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
        (["--rule", "typical"], "rejection"),
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


def test_an_address_that_cannot_be_had(capfd) -> None:
    assert "203.0.113.7" in one_sentence(capfd, "--host", "203.0.113.7", "--target", "never-loaded")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in one_sentence(capfd, "--port", str(port), "--target", "never-loaded")


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
    text = str(tmp_path / "text.pem")
    for extra in (["--ssl-ca-certs", text], ["--ssl-cert-reqs", "required"]):
        assert "--ssl-certfile" in one_sentence(capfd, *target, *extra)
    required = ["--ssl-certfile", text, "--ssl-cert-reqs", "optional"]
    assert "--ssl-ca-certs" in one_sentence(capfd, *target, *required)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRAFTSMITH_API_KEY", "")
        assert "DRAFTSMITH_API_KEY is empty" in one_sentence(capfd, *target)
    assert "text.pem" in one_sentence(capfd, *target, "--ssl-certfile", str(tmp_path / "text.pem"))


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ("4 pounds", "'4 pounds' is not a size"),
        ("1kB", "memory is 1 kB, of which a sequence takes 16.4 kB for each 16 tokens"),
        ("9000TB", "memory is 9e+03 TB, and "),
    ],
)
def test_sizes_of_the_cache_that_cannot_be(capfd, folders, size: str, told: str) -> None:
    arguments = ["--target", str(folders / "my-target"), "--dtype", "float64", "--kv-cache-memory", size]
    assert told in one_sentence(capfd, *arguments)


def test_a_place_that_cannot_be_written_to(capfd, monkeypatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", "/dev/null/cache")
    told = refused(capfd, "--port", "0", "--target", "smollm2").splitlines()[-1]  # after the log
    assert told.startswith("draft-serve: '/dev/null/cache") and "could not be read or written" in told


def test_two_hundred_requests_fit_into_the_line_by_default() -> None:
    defaults = {name: each.default for name, each in inspect.signature(cli.serve).parameters.items()}
    assert defaults["max_batch"] + defaults["max_waiting"] >= 200


def test_help_shows_examples(capfd) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["draft-serve", "--help"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == 0
    assert "draft-serve --head smollm2-eagle3\n" in capfd.readouterr().out
