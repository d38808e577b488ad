"""The printed `vllm serve` lines, run as a user would: a chat over HTTP, then /metrics. Imports nothing of ours.

    python tests/interop/serve_vllm.py FOLDER

FOLDER is what `compare_engines prepare` and `run_vllm` wrote. To each line is added what a test on a CPU needs, and no
more; FOLDER/serve-FORMAT.log has what vLLM said. Exit status 1: no answer, or another than the engine's own text in
result.json, or no draft was accepted.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PATIENCE = 600  # seconds for the server to come up
COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


def main(folder: Path) -> int:
    """Serve by every line, one after the other."""
    job = json.loads((folder / "prompts.json").read_text())
    text = json.loads((folder / "result.json").read_text())["texts"][0]
    failed = False
    for format, command in job["commands"].items():
        answer, counts = serve(command, job, folder / f"serve-{format}.log")
        problems = [] if answer["prompt_token_ids"] == job["prompts"][0] else ["the prompt is another"]
        problems += [] if answer["choices"][0]["token_ids"] == text else ["the text is another"]
        problems += [] if counts.get("num_accepted_tokens") else ["no draft was accepted"]
        failed |= bool(problems)
        print(f"{'FAIL' if problems else 'ok  '} served, {format:12} {counts} {'; '.join(problems)}", flush=True)
    return int(failed)


def serve(command: str, job: dict[str, Any], log: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(the answer to one chat, counts of /metrics after it)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *words = shlex.split(command)
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-num-seqs", "2", "--max-model-len", str(job["max_length"])]
    with log.open("w") as output:
        line = [str(Path(sys.executable).parent / program), *words]
        server = subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT)
    try:
        base = f"http://127.0.0.1:{port}"
        wait(server, base, log)
        chat = {"messages": [{"role": "user", "content": job["question"]}], "temperature": 0, "return_token_ids": True}
        chat |= {"max_tokens": job["tokens"], "ignore_eos": True}
        answer = json.loads(ask(f"{base}/v1/chat/completions", chat))
        found = re.findall(r"^vllm:spec_decode_(\w+)_total\{[^}]*\} (\S+)$", ask(f"{base}/metrics"), re.M)
        return answer, {name: int(float(value)) for name, value in found if name in COUNTS}
    finally:
        server.terminate()
        server.wait()


def wait(server: subprocess.Popen[bytes], base: str, log: Path) -> None:
    """Until it answers."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and server.poll() is None:
        try:
            ask(f"{base}/health")
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    sys.exit(f"vLLM did not come up; see {log}.")


def ask(url: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return response.read().decode()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
