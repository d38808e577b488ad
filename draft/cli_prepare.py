"""`draft-train prepare`: the command line of `draft.data.prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draft.cli_options import Dtype, Target, TargetAdapter, examples
from draft.errors import UserError, plain_console

console = plain_console()
EPILOG = examples(
    "draft-train prepare --target smollm2 --out data/general --num-prompts 500",
    "draft-train prepare --target smollm2 --prompts questions.jsonl --out data/mine",
    "draft-train prepare --target ./my-llama --prompts questions.jsonl --endpoint http://localhost:8000/v1 "
    "--out data/mine",
)


def prepare(
    out: Annotated[Path, typer.Option(help="Folder of the data set; the same command continues an interrupted one.")],
    target: Target = "smollm2",
    target_adapter: TargetAdapter = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="JSONL, JSON, Parquet or CSV file, or hub data set; repeatable. None: the target writes them."
        ),
    ] = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE]...", help="Further files: --prompts A B.", show_default=False)
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="At most so many conversations.")] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the prompt or conversation.")] = None,
    keep_responses: Annotated[bool, typer.Option(help="Use the responses in the files, not the target's.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 256,
    max_length: Annotated[int, typer.Option(min=8, help="Longer conversations are dropped, and counted.")] = 1024,
    greedy_share: Annotated[float, typer.Option(min=0, max=1, help="Share written greedily; the rest at T = 1.")] = 0.5,
    held_out_share: Annotated[float, typer.Option(min=0, max=1, help="Share of conversations kept for judging.")] = 0.1,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows written at once [default: by device].")] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts, responses and split.")] = 0,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda.")] = "auto",
    shard: Annotated[
        str | None,
        typer.Option(
            help="Answer one part of the conversations, 0/4 the first of four, each by a process of its own with the "
            "same arguments and --out, at once or one after the other; torchrun and `accelerate launch` set it.",
            show_default=False,
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Address of an OpenAI-compatible server that answers in the target's place. It must serve this very "
            "target under its own chat template: a server that tells only text cannot be checked for that."
        ),
    ] = None,
    endpoint_model: Annotated[
        str | None, typer.Option(help="The target's name there [default: its one model].")
    ] = None,
    api_key_env: Annotated[str, typer.Option(help="Variable that holds the server's key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests that the server has at once.")] = 16,
    retries: Annotated[int, typer.Option(min=0, help="Of a request that the server cannot answer now.")] = 8,
) -> None:
    """Let the target write its own training data."""
    from draft.data.generate import EndpointSettings
    from draft.data.prepare import prepare as run
    from draft.data.shards import missing_shards, parse_shard
    from draft.target import device_of_process, load_target

    if more and not prompts:
        raise UserError(f"{more[0]!r} belongs to no option; give files of prompts as --prompts {' '.join(more)}.")
    part = parse_shard(shard)
    server = None
    if endpoint is not None:
        server = EndpointSettings(endpoint, endpoint_model, api_key_env, concurrency, retries)
        if prompts and dtype == device == "auto":  # only the target's identity is wanted, and the server has the GPU
            dtype, device = "bfloat16", "cpu"
    dataset = run(
        load_target(target, dtype, device_of_process(device), target_adapter),
        out,
        prompts=[*prompts, *(more or ())] if prompts else None,
        num_prompts=num_prompts,
        column=column,
        keep_responses=keep_responses,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        greedy_share=greedy_share,
        held_out_share=held_out_share,
        batch_size=batch_size,
        seed=seed,
        shard=part,
        endpoint=server,
    )
    if dataset is None:
        left = ", ".join(map(str, missing_shards(out, part.count if part else None)))
        console.print(f"{out}: shard {part} is done. Not yet done: {left}.")
        return
    counts = dataset.manifest["counts"]
    dropped = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if type(count) is int)
    console.print(
        f"{out}: {counts['train']['rows']} rows to train on, {counts['held-out']['rows']} held out ({dropped}). "
        f"Next: draft-train inspect {out}"
    )
