"""Demonstration of the whole path: adapt the bundled head to a fine-tuned target, compare it, serve it.

The target that ships is fine-tuned, by a LoRA adapter that ships too, to turn the messages of a shop's customers into
JSON records: the case of a team with a model of its own, which a stock head fits badly. Other prompts than these
messages are answered by the target as it is. Each step is the command that a user would type, and it is printed before
it runs. A repeated run continues: what a step has finished is not done again.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from draft.errors import UserError
from draft.launcher import draft_serve

TICKETS = Path(__file__).parent / "data" / "tickets.jsonl"
GENERAL_PROMPTS = Path(__file__).parent / "data" / "general_prompts.jsonl"
FINE_TUNED = Path(__file__).parent / "pretrained" / "smollm2-tickets-lora"
SERVED = 9  # held-out prompts that both servers answer
WARM_UP = 3  # of these, that are not counted: in them the automatic mode learns what drafts are worth
NEW_TOKENS = 160
GENERAL_PERCENT = 15  # of the training tokens
EPILOG = "Examples:\n\n`draft-train demo`\n\n`draft-train demo --num-prompts 40 --epochs 1 --out runs/small-demo`"
console = Console()


def demo(
    target: Annotated[str, typer.Option(help="Target: hub id, folder, .gguf file, or smollm2 (bundled).")] = "smollm2",
    target_adapter: Annotated[
        str | None,
        typer.Option(
            help="PEFT LoRA adapter of the target, merged in memory: a folder [default of smollm2 with the support "
            "tickets: one that ships].",
            show_default=False,
        ),
    ] = None,
    head: Annotated[str, typer.Option(help="Head to adapt: a folder, or the bundled one.")] = "smollm2-eagle3",
    prompts: Annotated[Path, typer.Option(help="Prompts of the domain: JSONL.", show_default="support tickets")] = (
        TICKETS
    ),
    num_prompts: Annotated[int, typer.Option(min=2, help="Number of prompts to use.")] = 120,
    epochs: Annotated[float, typer.Option(help="Passes over the training data.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder to write; the same command continues there.")] = Path("runs/demo"),
) -> None:
    """Adapt the bundled head to a fine-tuned target, compare it with its base and serve both: the path in minutes."""
    started = time.monotonic()
    adapter = target_adapter
    tickets = prompts.resolve() == TICKETS.resolve()  # any other prompt it would answer as a ticket
    if adapter is None and target == "smollm2" and tickets:
        adapter = str(FINE_TUNED)
    given, model = (
        ["--target", target] + (["--target-adapter", each] if each else []) for each in (target_adapter, adapter)
    )
    suited = options_for_head(head, target, adapter)
    data, general, run, adapted, report = (out / name for name in ("data", "general", "run", "head", "report"))
    _draft_train("prepare", *model, "--prompts", prompts, "--num-prompts", num_prompts, "--max-new-tokens", NEW_TOKENS,
                 "--greedy-share", 0.75, "--held-out-share", 0.25, "--out", data)  # fmt: skip
    _draft_train("prepare", *model, "--prompts", GENERAL_PROMPTS, "--max-new-tokens", 96,
                 "--greedy-share", 0.75, "--held-out-share", 0.4, "--out", general)  # fmt: skip
    refuse_trained_rows(head, {"domain": data, "general": general})
    percent = general_percent(data, general)
    if percent < GENERAL_PERCENT:
        console.print(f"\n{percent} % of the training tokens are general ones, not {GENERAL_PERCENT} %: all there are.")
    mixed = ("--mix-general", percent / 100, "--general", general) if percent else ()
    _draft_train("adapt", *model, "--head", head, "--data", data, *mixed, "--method", "full", *suited,
                 "--learning-rate", 5e-4, "--epochs", epochs, "--tokens-per-batch", 512, "--eval-every", 0,
                 "--out", run)  # fmt: skip
    _draft_train("merge", run, "--out", adapted)
    (report / "comparison.json").unlink(missing_ok=True)
    _draft_train("compare", *model, "--baseline", head, "--candidate", adapted, "--data", data, "--general", general,
                 "--out", report, accepted=(0, 1))  # fmt: skip
    chosen = held_out_prompts(target, prompts, data, SERVED)
    if not chosen:
        raise UserError(
            f"no prompt of {str(prompts)!r} is rendered as in {str(data)!r} (does the template write the date?), so "
            "that none can be served; the comparison is done."
        )
    answers = serve_in_turn(model, {"base": head, "adapted": str(adapted)}, [text for _, text in chosen])
    summarise(json.loads((report / "comparison.json").read_text()), answers, chosen[-1][0])
    console.print(
        f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. "
        "Next, with your own prompts (JSONL, a `prompt` column):\n"
        f"  draft-train prepare {shlex.join(given)} --prompts mine.jsonl --out data/mine\n"
        f"  draft-train adapt {shlex.join([*given, '--head', head])} --data data/mine --out runs/mine\n"
        "  draft-train merge runs/mine --out heads/mine\n"
        f"  draft-serve {shlex.join(given)} --head heads/mine",
        soft_wrap=True,
    )


def _draft_train(*words: object, accepted: tuple[int, ...] = (0,)) -> None:
    """Print a draft-train command and run it; another exit status than the accepted ones raises UserError."""
    arguments = [str(word) for word in words]
    console.print(f"\n[bold]$ draft-train {escape(shlex.join(arguments))}[/]", soft_wrap=True)
    status = subprocess.run([sys.executable, "-m", "draft.cli", *arguments], check=False).returncode
    if status not in accepted:
        raise UserError(f"`draft-train {arguments[0]}` ended with status {status}; its message is above.")


def options_for_head(head: str, target: str, adapter: str | None) -> list[str]:
    """Return the options of `adapt` that depend on the head's architecture.

    Raises:
        UserError: for a head that cannot be loaded, or that was made for another target.
    """
    from draft.heads.checkpoint import attach_head, load_head
    from draft.target import load_target

    loaded, about = load_head(head)
    attach_head(loaded, about, load_target(target, "bfloat16", "cpu", adapter))
    steps = ["--draft-steps", str(min(3, loaded.longest or 3))]
    rebuilt = loaded.reduced_vocabulary and not loaded.config.full_vocabulary  # as adapt accepts it
    return [*steps, "--rebuild-vocabulary"] if rebuilt else steps


def refuse_trained_rows(head: str, folders: Mapping[str, Path]) -> None:
    """Raise UserError for a head that was trained on held-out rows: the comparison would refuse it after minutes."""
    from draft.data.dataset import open_dataset
    from draft.evaluation.compare import row_ids, trained_row_ids
    from draft.heads.checkpoint import load_head

    trained = trained_row_ids(load_head(head)[1]) or set()
    for name, folder in folders.items():
        rows = row_ids(open_dataset(folder).rows("held-out"))
        if seen := len(rows & trained):
            raise UserError(
                f"the head {head!r} was trained on {seen} of the {len(rows)} {name} rows that are held out to judge "
                "by; give another --head, or other --prompts with another --out."
            )


def general_percent(data: Path, general: Path) -> int:
    """Return the percentage of general training tokens: GENERAL_PERCENT, or less where there are not enough of them."""
    from draft.data.dataset import open_dataset

    held_out = {row.id for row in open_dataset(data).rows("held-out")}
    domain, other = (
        sum(len(row.ids) for row in open_dataset(folder).rows("train") if row.id not in held_out and any(row.mask[2:]))
        for folder in (data, general)
    )
    # rounded down, and less than all of them: `adapt` refuses a share that rounding puts above what there is
    return min(GENERAL_PERCENT, max(0, 100 * other - 1) // max(1, domain + other))


def held_out_prompts(target: str, prompts: Path, data: Path, count: int) -> list[tuple[str, str]]:
    """Return the last user turn, and the text under the chat template, of prompts that `data` holds out."""
    from draft.data.dataset import open_dataset
    from draft.data.examples import up_to_answer
    from draft.data.prompts import load_prompts
    from draft.target import load_tokenizer, render_chat

    tokenizer = load_tokenizer(target)
    chosen: list[tuple[str, str]] = []
    held_out = {tuple(row.ids[: row.prompt_length]) for row in open_dataset(data).rows("held-out")}
    for prompt in load_prompts(str(prompts)):
        messages = up_to_answer(prompt.messages, 0)
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
        if tuple(tokenizer(text, add_special_tokens=False).input_ids) in held_out and len(chosen) < count:
            chosen.append((str(messages[-1]["content"]), text))
    return chosen


def serve_in_turn(
    model: Sequence[str],
    heads: Mapping[str, str],
    prompts: Sequence[str],
    new_tokens: int = NEW_TOKENS,
    options: Sequence[str] = (),
) -> dict[str, list[dict[str, Any]]]:
    """Let a server of each head answer each prompt, in turn, in the automatic mode and without others beside it.

    model: options that name the target; prompts: texts under its chat template; options: further ones of the servers.

    Returns:
        by head the answers of `/generate`, with `seconds`, without those to the first WARM_UP prompts.
    """
    import httpx

    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in heads}
    with ExitStack() as stack:
        clients = {}
        for name, head in heads.items():
            words = [*model, "--head", head, *options]
            console.print(f"\n[bold]$ draft-serve {escape(shlex.join(words))}[/]", soft_wrap=True)
            server = stack.enter_context(draft_serve(words))
            clients[name] = stack.enter_context(httpx.Client(base_url=server.url, timeout=300, trust_env=False))
        for number, prompt in enumerate(prompts):
            body = {"inputs": prompt, "parameters": {"max_new_tokens": new_tokens, "details": True}}
            for name in sorted(clients, reverse=bool(number % 2)):
                began = time.monotonic()
                response = clients[name].post("/generate", json=body)
                seconds = time.monotonic() - began
                if response.is_error:
                    raise UserError(f"draft-serve answered with status {response.status_code}: {response.text.strip()}")
                if number >= min(WARM_UP, len(prompts) - 1):
                    answers[name].append({**response.json(), "seconds": seconds})
    return answers


def speeds(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the tokens per second of each answer, from the request to its end."""
    return [answer["details"]["generated_tokens"] / answer["seconds"] for answer in answers]


def summarise(comparison: dict[str, Any], answers: dict[str, list[dict[str, Any]]], question: str) -> None:
    """Print acceptance lengths and speeds before and after, the verdict, and the last of the served answers."""
    length = comparison["deciding_length"]
    table = Table(title=f"The head before and after adaptation (greedy, τ at K = {length})")
    for heading in ("", "base head", "adapted head", "gain"):
        table.add_column(heading)
    for name, label in (("domain", "τ on held-out prompts of the domain"), ("general", "τ on general traffic")):
        if comparison[name]:
            result = comparison[name]["greedy"]["speculation_lengths"][length - 1]
            taus = [_interval(result[head]["acceptance_length"], ".2f") for head in ("baseline", "candidate")]
            table.add_row(label, *taus, _interval(result["gain"], "+.1%"))
    base, adapted = (speeds(answers[name]) for name in ("base", "adapted"))
    gains = [new / old - 1 for old, new in zip(base, adapted, strict=True)]
    table.add_row(
        f"tokens/s of draft-serve, median of {len(base)} answers",
        *(f"{statistics.median(values):.0f}" for values in (base, adapted)),
        f"{statistics.median(gains):+.0%} [{min(gains):+.0%}, {max(gains):+.0%}]",
    )
    console.print()
    console.print(table)
    console.print(escape(comparison["summary"]))
    old, new = (answers[name][-1]["generated_text"] for name in ("base", "adapted"))
    console.print(f"\n[bold]{escape(question)}[/]\n{escape(new)}", highlight=False)
    if old == new:
        console.print("\nBoth heads gave the same text, as greedy decoding should.")
    else:
        console.print(
            "\nThe heads' texts differ: at a near tie of two tokens, the rounding of the dtype decides between them."
        )


def _interval(values: dict[str, float], form: str) -> str:
    return f"{values['value']:{form}} [{values['low']:{form}}, {values['high']:{form}}]"
