"""`draft-serve --engine vllm` with the bundled target and head: the API's contract, and vLLM's own text through it.

    python -m interop.gateway_vllm FOLDER BIN

FOLDER is what `compare_engines prepare` and `run_vllm` wrote; BIN has the program `vllm`. Exit status 1: a contract
test of tests/serving/api failed, another text than vLLM's own came, min_p was not refused, or no draft was accepted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx

from draft.launcher import draft_serve
from interop.compare_engines import HEAD, LENGTH, MAX_LENGTH, TARGET

ROOT = Path(__file__).parents[2]
# what a test on a CPU needs; in half precision, or with parts of prompts from a cache, texts differ between runs
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", "--max-model-len", str(MAX_LENGTH)]
OPTIONS += ["--no-enable-prefix-caching", "--per-request-spec-decode-metrics", "detailed"]


def main(folder: Path, programs: Path) -> int:
    """Serve, and check."""
    job, theirs = (json.loads((folder / name).read_text()) for name in ("prompts.json", "result.json"))
    command = ["--engine", "vllm", "--target", TARGET, "--head", HEAD, "--speculation-length", str(LENGTH)]
    environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    with (
        draft_serve([*command, "--", *OPTIONS], environment) as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
    ):
        body = {"prompt": job["prompts"][0], "max_tokens": job["tokens"], "temperature": 0, "ignore_eos": True}
        [choice] = client.post("/v1/completions", json=body | {"return_token_ids": True}).json()["choices"]
        same = choice["token_ids"] == theirs["texts"][0]
        # vLLM cannot combine it with speculation
        refused = client.post("/v1/completions", json=body | {"min_p": 0.1, "temperature": 1})
        dropped = refused.status_code != 400 or "min_p" not in refused.text
        tests = ["-m", "pytest", "-q", "-m", "contract", "-p", "no:cacheprovider", "tests/serving/api"]
        variables = os.environ | {"DRAFTSMITH_CONTRACT_URL": server.url}
        contract = subprocess.run([sys.executable, *tests], cwd=ROOT, env=variables).returncode == 0
        figures = client.get("/info").json()["engine"]["speculation"]
    print(f"through the gateway: {figures}")
    problems = {
        "the text is another": not same,
        "min_p is not refused by name": dropped,
        "a contract test failed": not contract,
        "no draft was accepted": not figures["accepted"],
    }
    for problem in (each for each, found in problems.items() if found):
        print(f"FAIL {problem}")
    return int(any(problems.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
