"""`--engine vllm`: the child's process, in whose place stands a program of that name that starts our own server."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import python
from http_testing import PROMPT, ask, events, eventually
from server_processes import SERVE, held, started

from draft.errors import UserError
from serving.engine import Engine, SamplingParams
from serving.upstream.child import VllmServer

STAND_IN = f"""#!{sys.executable}
import json, pathlib, sys
words = sys.argv[1:]
pathlib.Path("arguments").write_text(json.dumps(words))
given = dict(zip(words[2::2], words[3::2]))
speculative = json.loads(given["--speculative-config"])
print("vLLM would say a lot", flush=True)
options = "--speculation chain --dtype float64 --mode eager --threads 1 --self-check".split()
length = str(speculative["num_speculative_tokens"])
sys.argv = ["vllm", "--target", words[1], "--head", speculative["model"], "--speculation-length", length, *options]
sys.argv += ["--host", given["--host"], "--port", given["--port"]]
exec({SERVE!r})
"""


def program(folder: Path, text: str) -> dict[str, str]:
    """The environment in which `vllm` is this program."""
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / "vllm"
    path.write_text(text)
    path.chmod(0o755)
    return {"PATH": f"{path.parent}{os.pathsep}{os.environ['PATH']}", "DRAFTSMITH_CACHE": str(folder / "cache")}


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_child_from_its_start_to_its_death_in_the_middle_of_an_answer(folders, tiny_target):
    flags = ["--engine", "vllm", "--head", str(folders / "my-head"), "--speculation-length", "4"]
    variables = program(folders, STAND_IN)
    with started(folders, *flags, "--", "--max-num-seqs", "4", options=(), **variables) as (process, ready):
        assert re.fullmatch(r"serving .*my-target with .*my-head by vLLM on http://127\.0\.0\.1:\d+\n", ready)
        url = ready.split()[-1]
        [child] = psutil.Process(process.pid).children()
        serve, target, option, speculative, *rest = json.loads((folders / "arguments").read_text())
        assert (serve, target, option) == ("serve", str(folders / "my-target"), "--speculative-config")
        assert rest[:2] == ["--host", "127.0.0.1"] and rest[4:] == [
            "--disable-uvicorn-access-log",
            "--max-num-seqs",
            "4",
        ]
        speculative = json.loads(speculative)
        assert speculative["method"] == "eagle3" and speculative["num_speculative_tokens"] == 4
        assert (Path(speculative["model"]) / "model.safetensors").is_file()
        with httpx.Client(base_url=url, timeout=120) as client:
            ids = tiny_target.tokenizer(PROMPT).input_ids
            [own] = Engine(tiny_target, speculation="off").generate([ids], SamplingParams(8))
            assert ask(client).json() == {"generated_text": own.text}
            assert client.get("/info").json()["speculation_length"] == 4
            with held(folders):
                body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 200}}
                with client.stream("POST", "/generate_stream", json=body) as answer:
                    told = answer.iter_text()
                    text = next(told)
                    child.send_signal(signal.SIGKILL)
                    text += "".join(told)
        assert events(text)[-1] == {"error": "the server upstream was lost", "error_type": "unavailable"}
        assert process.wait(60) == 2
    *log, last = (folders / "log").read_text().splitlines()
    assert last.startswith("draft-serve: vllm serve ended with status -9; its last lines: ")
    assert "vLLM would say a lot" in log


KEEPER = """
import sys, time
from serving.upstream.child import VllmServer
server = VllmServer(sys.argv[1], None, 3, [])
print(server._process.pid, flush=True)
time.sleep(300)
"""
SLEEPER = f"""#!{sys.executable}
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print("ready", flush=True)
time.sleep(300)
"""


def test_the_child_ends_with_its_parent_and_takes_its_own_children_along(folders, monkeypatch):
    variables = program(folders, SLEEPER)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    server = VllmServer(str(folders / "my-target"), None, 3, [])
    child = psutil.Process(server._process.pid)
    eventually(lambda: len(child.children()) == 1 and "ready" in server._lines)
    [grandchild] = child.children()
    server.check()
    server.stop()
    eventually(lambda: gone(child) and gone(grandchild))
    server.attend()  # no error: it was to end
    if sys.platform == "linux":
        keeper = python("-c", KEEPER, str(folders / "my-target"), **variables)
        assert keeper.stdout is not None
        line = next(line for line in keeper.stdout if line.strip().isdigit())
        child = psutil.Process(int(line))
        keeper.kill()
        keeper.wait(60)
        eventually(lambda: gone(child))


def test_a_child_that_ends_before_it_is_ready_is_told_with_its_last_lines(folders, monkeypatch):
    for name, value in program(folders, "#!/bin/sh\necho first; echo out of memory >&2; exit 3\n").items():
        monkeypatch.setenv(name, value)
    server = VllmServer(str(folders / "my-target"), None, 3, [])
    server._process.wait(60)
    for ending in (server.check, server.attend):
        with pytest.raises(UserError, match=r"ended with status 3; its last lines: first \| out of memory$"):
            ending()
    server.stop()
    for word, name in (("--port", "--port"), ("--api_key=a", "--api-key"), ("--host=::", "--host")):
        with pytest.raises(UserError, match=f"{name} cannot be passed"):
            VllmServer("never-loaded", None, 3, [word, "1"])


def test_without_vllm_it_is_a_sentence(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no program vllm on the PATH"):
        VllmServer(str(folders / "my-target"), None, 3, [])
