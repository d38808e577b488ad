"""Demonstration of the whole path: adapt the bundled head to grade-school word problems, compare it, serve it.

Each step is the command that a user would type, and it is printed before it runs. A repeated run continues: what a step
has finished is not done again.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from draft.errors import UserError
from draft.launcher import draft_serve

WORD_PROBLEMS = Path(__file__).parent / "data" / "word_problems.jsonl"
QUESTION = "A baker sells 12 boxes with 6 muffins each, and then 9 single muffins. How many muffins did he sell?"
EPILOG = "Examples:\n\n`draft-train demo`\n\n`draft-train demo --num-prompts 40 --epochs 1 --out runs/small-demo`"
console = Console()


def demo(
    target: Annotated[str, typer.Option(help="Target: hub id, folder, .gguf file, or smollm2 (bundled).")] = "smollm2",
    target_adapter: Annotated[
        str | None,
        typer.Option(help="PEFT LoRA adapter of the target, merged in memory: a folder.", show_default=False),
    ] = None,
    head: Annotated[str, typer.Option(help="Head to adapt: a folder, or the bundled one.")] = "smollm2-eagle3",
    prompts: Annotated[Path, typer.Option(help="Prompts of the domain: JSONL.", show_default="word problems")] = (
        WORD_PROBLEMS
    ),
    num_prompts: Annotated[int, typer.Option(min=2, help="Number of prompts to use.")] = 150,
    epochs: Annotated[float, typer.Option(help="Passes over the training data.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder to write; the same command continues there.")] = Path(
        "runs/adaptation"
    ),
) -> None:
    """Adapt the bundled head to word problems, compare it with its base and serve both: the whole path in minutes."""
    started = time.monotonic()
    model = ["--target", target] + (["--target-adapter", target_adapter] if target_adapter else [])
    data, run, adapted, report = (out / name for name in ("data", "run", "head", "report"))
    _draft_train("prepare", *model, "--prompts", prompts, "--num-prompts", num_prompts, "--max-new-tokens", 128,
                 "--greedy-share", 0.75, "--held-out-share", 0.3, "--out", data)  # fmt: skip
    _draft_train("adapt", *model, "--head", head, "--data", data, "--method", "afa-lora", "--epochs", epochs,
                 "--tokens-per-batch", 1024, "--draft-steps", 3, "--eval-every", 0, "--out", run)  # fmt: skip
    _draft_train("merge", run, "--out", adapted)
    (report / "comparison.json").unlink(missing_ok=True)
    _draft_train("compare", *model, "--baseline", head, "--candidate", adapted, "--data", data, "--out", report,
                 accepted=(0, 1))  # fmt: skip
    answers = {name: ask(target, model, path) for name, path in (("base", head), ("adapted", str(adapted)))}
    summarise(json.loads((report / "comparison.json").read_text()), answers)
    console.print(
        f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. "
        "Next, with your own prompts (JSONL, a `prompt` column):\n"
        f"  draft-train prepare {shlex.join(model)} --prompts mine.jsonl --out data/mine\n"
        f"  draft-train adapt {shlex.join(model)} --head {head} --data data/mine --out runs/mine\n"
        "  draft-train merge runs/mine --out heads/mine\n"
        f"  draft-serve {shlex.join(model)} --head heads/mine",
        soft_wrap=True,
    )


def _draft_train(*words: object, accepted: tuple[int, ...] = (0,)) -> None:
    """Print a draft-train command and run it; another exit status than the accepted ones raises UserError."""
    arguments = [str(word) for word in words]
    console.print(f"\n[bold]$ draft-train {escape(shlex.join(arguments))}[/]", soft_wrap=True)
    status = subprocess.run([sys.executable, "-m", "draft.cli", *arguments], check=False).returncode
    if status not in accepted:
        raise UserError(f"`draft-train {arguments[0]}` ended with status {status}; its message is above.")


def ask(target: str, model: list[str], head: str) -> dict[str, Any]:
    """Send QUESTION twice to a server with this head; return the second answer, which no warm-up slows, and `seconds`.

    The server drafts chains of the length that `compare` decides by: the automatic mode drafts one token or none on a
    CPU, and its speed and acceptance length would be the planner's, not the heads'.
    """
    import httpx

    from draft.evaluation.compare import DECIDING_LENGTH
    from draft.target import load_tokenizer, render_chat

    text = render_chat(load_tokenizer(target), [{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    body = {"inputs": text, "parameters": {"max_new_tokens": 128, "details": True}}
    options = [*model, "--head", head, "--speculation", "chain", "--speculation-length", str(DECIDING_LENGTH)]
    console.print(f"\n[bold]$ draft-serve {escape(shlex.join(options))}[/]", soft_wrap=True)
    with draft_serve(options) as server, httpx.Client(base_url=server.url, timeout=300, trust_env=False) as client:
        for _ in range(2):
            began = time.monotonic()
            response = client.post("/generate", json=body)
            seconds = time.monotonic() - began
        if response.is_error:
            raise UserError(f"draft-serve answered with status {response.status_code}: {response.text.strip()}")
        return {**response.json(), "seconds": seconds}


def summarise(comparison: dict[str, Any], answers: dict[str, dict[str, Any]]) -> None:
    """Print acceptance lengths and speeds before and after, the verdict, and the served answers."""
    length = comparison["deciding_length"]
    table = Table(title=f"The head before and after adaptation (greedy, K = {length})")
    for heading in ("", "base head", "adapted head", "gain"):
        table.add_column(heading)
    for name, label in (("domain", "τ on held-out word problems"), ("general", "τ on general traffic")):
        if comparison[name]:
            result = comparison[name]["greedy"]["speculation_lengths"][length - 1]
            taus = [_interval(result[head]["acceptance_length"], ".2f") for head in ("baseline", "candidate")]
            table.add_row(label, *taus, _interval(result["gain"], "+.1%"))
    both = [answers["base"], answers["adapted"]]
    base, adapted = (answer["details"]["generated_tokens"] / answer["seconds"] for answer in both)
    label = f"tokens/s of one request, served with a chain of {length}"
    table.add_row(label, f"{base:.1f}", f"{adapted:.1f}", f"{adapted / base - 1:+.1%}")
    served = [answer["details"]["speculative"]["acceptance_length"] for answer in both]
    table.add_row("τ of that request", *("-" if tau is None else f"{tau:.2f}" for tau in served), "")
    console.print()
    console.print(table)
    console.print(escape(comparison["summary"]))
    console.print(f"\n[bold]{QUESTION}[/]\n{escape(answers['adapted']['generated_text'])}", highlight=False)
    if both[0]["generated_text"] == both[1]["generated_text"]:
        console.print("\nBoth heads gave the same text, as greedy decoding should.")
    else:
        console.print(
            "\nThe heads' texts differ: at a near tie of two tokens, the rounding of the dtype decides between them."
        )


def _interval(values: dict[str, float], form: str) -> str:
    return f"{values['value']:{form}} [{values['low']:{form}}, {values['high']:{form}}]"
