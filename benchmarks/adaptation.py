"""The whole path on the bundled default: a head is adapted to grade-school word problems, judged and served.

Each step is the command that a user would type; it is printed before it runs. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.provenance import ROOT
from draft.errors import UserError
from draft.evaluation.compare import DECIDING_LENGTH
from draft.target import load_tokenizer, render_chat

WORD_PROBLEMS = ROOT / "draft" / "data" / "word_problems.jsonl"
QUESTION = "A baker sells 12 boxes with 6 muffins each, and then 9 single muffins. How many muffins did he sell?"
# the automatic mode drafts one token or none on a CPU: its speed and τ would be the controller's, not the heads'
CHAIN = ["--speculation", "chain", "--speculation-length", str(DECIDING_LENGTH)]
console = Console()


def main(arguments: list[str] | None = None) -> int:
    """Run every step; 0 when the adapted head is better, 0 too when it is not (the table says which)."""
    options = parse(arguments)
    started = time.monotonic()
    folder = options.out
    target = ["--target", options.target]
    if options.target_adapter:
        target += ["--target-adapter", options.target_adapter]
    data, run, head, report = (folder / name for name in ("data", "run", "head", "report"))
    try:
        train("prepare", *target, "--prompts", options.prompts, "--num-prompts", options.num_prompts,
              "--max-new-tokens", 128, "--greedy-share", 0.75, "--held-out-share", 0.3, "--out", data)  # fmt: skip
        train("adapt", *target, "--head", options.head, "--data", data, "--method", "afa-lora",
              "--epochs", options.epochs, "--tokens-per-batch", 1024, "--draft-steps", 3, "--eval-every", 0,
              "--out", run)  # fmt: skip
        train("merge", run, "--out", head)
        (report / "comparison.json").unlink(missing_ok=True)
        train("compare", *target, "--baseline", options.head, "--candidate", head,
                       "--data", data, "--out", report, accepted=(0, 1))  # fmt: skip
        heads = {"base": options.head, "adapted": str(head)}
        answers = {name: ask(options.target, target, path) for name, path in heads.items()}
    except UserError as error:
        print(f"adaptation: {error}", file=sys.stderr)
        return 2
    summarise(json.loads((report / "comparison.json").read_text()), answers)
    console.print(
        f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. "
        "Next, with your own prompts (JSONL, a `prompt` column):\n"
        f"  draft-train prepare {shlex.join(target)} --prompts mine.jsonl --out data/mine\n"
        f"  draft-train adapt {shlex.join(target)} --head {options.head} --data data/mine --out runs/mine\n"
        "  draft-train merge runs/mine --out heads/mine\n"
        f"  draft-serve {shlex.join(target)} --head heads/mine",
        soft_wrap=True,
    )
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptation", description=__doc__)
    parser.add_argument("--target", default="smollm2", help="target (default: %(default)s)")
    parser.add_argument("--target-adapter", metavar="DIR", help="PEFT LoRA adapter of the target, merged in memory")
    parser.add_argument("--head", default="smollm2-eagle3", help="head to adapt (default: %(default)s, bundled)")
    parser.add_argument("--prompts", type=Path, default=WORD_PROBLEMS, help="prompts of the domain (JSONL)")
    parser.add_argument("--num-prompts", type=int, default=150, help="how many of them (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=2, help="passes over the data (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptation"), help="folder (default: %(default)s)")
    return parser.parse_args(arguments)


def train(*words: object, accepted: tuple[int, ...] = (0,)) -> int:
    """Run `draft-train WORDS`, showing it first."""
    arguments = [str(word) for word in words]
    console.print(f"\n[bold]$ draft-train {escape(shlex.join(arguments))}[/]", soft_wrap=True)
    status = subprocess.run([sys.executable, "-m", "draft.cli", *arguments], check=False).returncode
    if status not in accepted:
        raise UserError(f"`draft-train {arguments[0]}` ended with status {status}; its message is above.")
    return status


@contextmanager
def server(target: list[str], head: str) -> Iterator[str]:
    """A draft-serve on a free port of this machine, ended with the block; yields its address."""
    command = [*target, "--head", head, *CHAIN, "--port", "0"]
    console.print(f"\n[bold]$ draft-serve {escape(shlex.join(command))}[/]", soft_wrap=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            _, found, address = line.rpartition("http://")
            if found:
                yield "http://" + address.split()[0].rstrip("/.,")
                break
        else:
            raise UserError(
                f"the server ended with status {process.wait()} before it was ready; run the command above."
            )
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(name: str, target: list[str], head: str) -> dict[str, Any]:
    """The same question to a server with this head, twice: the first one warms it up."""
    text = render_chat(load_tokenizer(name), [{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    body = json.dumps({"inputs": text, "parameters": {"max_new_tokens": 128, "details": True}}).encode()
    with server(target, head) as address:
        for _ in range(2):
            request = urllib.request.Request(
                f"{address}/generate", data=body, headers={"Content-Type": "application/json"}
            )
            start = time.monotonic()
            with urllib.request.urlopen(request, timeout=300) as response:
                answer = json.load(response)
            seconds = time.monotonic() - start
    return {**answer, "seconds": seconds}


def summarise(comparison: dict[str, Any], answers: dict[str, dict[str, Any]]) -> None:
    """τ before and after, the served answers, and the verdict."""
    table = Table(title=f"The head before and after adaptation (greedy, K = {DECIDING_LENGTH})")
    for heading in ("", "base head", "adapted head", "gain"):
        table.add_column(heading)
    for name, label in (("domain", "τ on held-out word problems"), ("general", "τ on general traffic")):
        result = at_deciding_length(comparison, name)
        if result:
            taus = [plain(result[head]["acceptance_length"]) for head in ("baseline", "candidate")]
            table.add_row(label, *taus, percent(result["gain"]))
    speeds = {name: answer["details"]["generated_tokens"] / answer["seconds"] for name, answer in answers.items()}
    table.add_row(
        f"tokens/s of one request, served with a chain of {DECIDING_LENGTH}",
        f"{speeds['base']:.1f}", f"{speeds['adapted']:.1f}", f"{speeds['adapted'] / speeds['base'] - 1:+.1%}",
    )  # fmt: skip
    served = [answers[name]["details"]["speculative"]["acceptance_length"] for name in ("base", "adapted")]
    table.add_row("τ of that request", *("-" if tau is None else f"{tau:.2f}" for tau in served), "")
    console.print()
    console.print(table)
    console.print(escape(comparison["summary"]))
    console.print(f"\n[bold]{QUESTION}[/]\n{escape(answers['adapted']['generated_text'])}", highlight=False)
    if answers["base"]["generated_text"] == answers["adapted"]["generated_text"]:
        console.print("\nBoth heads gave the same text, as greedy decoding should.")
    else:
        console.print(
            "\nThe heads' texts differ: at a near tie of two tokens, the rounding of the dtype decides between them."
        )


def at_deciding_length(comparison: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The greedy measurement on "domain" or "general" at the speculation length that decides."""
    measured = comparison[name]
    return measured and measured["greedy"]["speculation_lengths"][comparison["deciding_length"] - 1]


def plain(interval: dict[str, float]) -> str:
    return f"{interval['value']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def percent(interval: dict[str, float]) -> str:
    return f"{interval['value']:+.1%} [{interval['low']:+.1%}, {interval['high']:+.1%}]"


if __name__ == "__main__":
    sys.exit(main())
