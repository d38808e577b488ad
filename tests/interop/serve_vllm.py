"""The printed `vllm serve` lines, run as a user would: a chat over HTTP, then /metrics. Imports nothing of ours.

    python tests/interop/serve_vllm.py FOLDER

FOLDER is what `compare_engines prepare` and `run_vllm` wrote. To each line is added what a test on a CPU needs, and no
more; FOLDER/serve-FORMAT.log has vLLM's log. Exit status 1: no answer, or another than the engine's own text in
result.json, or no draft was accepted.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from foreign import COUNTS, fetch, served


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
    """Return (the answer to one chat, counts of /metrics after it)."""
    program, *words = shlex.split(command)
    words += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "2"]
    words += ["--max-model-len", str(job["max_length"])]
    chat = {"messages": [{"role": "user", "content": job["question"]}], "temperature": 0, "return_token_ids": True}
    chat |= {"max_tokens": job["tokens"], "ignore_eos": True}
    with served([str(Path(sys.executable).parent / program), *words], log) as address:
        answer = json.loads(fetch(f"{address}/v1/chat/completions", chat))
        metrics = fetch(f"{address}/metrics")
    found = re.findall(r"^vllm:spec_decode_(\w+)_total\{[^}]*\} (\S+)$", metrics, re.M)
    return answer, {name: int(float(value)) for name, value in found if name in COUNTS}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
