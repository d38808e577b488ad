"""draft-train: prepare data, pretrain or adapt a head, merge it, compare it with its base, and export it."""

from __future__ import annotations

import inspect as introspection
import logging
import os
import random
import signal
import sys
import time
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel

from draft import demo
from draft.data.settings import EndpointSettings, LocalServer, Settings
from draft.errors import UserError, file_trouble, plain_console
from draft.files import write_jsonl
from draft.training.config import DEFAULTS, SECTIONS, resolve

if typing.TYPE_CHECKING:
    from draft.data.dataset import Dataset

app = typer.Typer(
    help="Train, adapt and judge draft heads for speculative decoding.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
console = plain_console()
SECONDS_FOR_PROCESS_0 = 5
NICENESS = 10  # of the learner: beside a busy process on the same core it gets a tenth of it
TRAIN_EXTRA = ("datasets", "matplotlib", "tensorboardX")  # packages that only draft-train needs

Target = Annotated[str, typer.Option(help="Target: hub id, folder, .gguf file, or smollm2 (bundled).")]
TargetAdapter = Annotated[
    str | None, typer.Option(help="PEFT LoRA adapter of the target, merged in memory: a folder.", show_default=False)
]
Dtype = Annotated[str, typer.Option(help="Dtype of the target: auto, bfloat16, float16, float32 or float64.")]
Device = Annotated[str, typer.Option(help="Device of the target: auto, cpu, cuda.")]


def main() -> None:
    """Run a command; a user's mistake ends in one sentence and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "httpx2", "openai", "accelerate"):  # they report each request; their warnings are shown
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        _run()
    except SystemExit as end:
        if "WORLD_SIZE" in os.environ:  # torchrun or accelerate launch started it
            # gloo's threads may still be dropping the tensors of the last exchange, for which they take the
            # interpreter's lock: one that asks for it while the interpreter ends aborts the process
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _run() -> None:
    try:
        app()
    except Exception as error:
        mistake = str(error) if isinstance(error, UserError) else file_trouble(error)
        if isinstance(error, ModuleNotFoundError) and error.name in TRAIN_EXTRA:
            mistake = f"{error.name} is not installed; run: pip install 'draftsmith[train]'"
        if mistake is not None:
            if int(os.environ.get("RANK", 0)):
                # process 0 says most mistakes too; it ends with them, and the launcher then ends this one
                time.sleep(SECONDS_FOR_PROCESS_0)
            print(f"draft-train: {mistake}", file=sys.stderr)
            sys.exit(2)
        # 1 says "don't ship"; a fault of ours must not look like a verdict
        logging.exception("draft-train: this is a bug; please report it with the lines below")
        sys.exit(3)


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"`{line}`" for line in lines)


def _flags_of(
    *settings: type[BaseModel], defaults: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, instead of its `**flags`, one flag for each described field of the settings.

    defaults: those of the command where they differ from the fields'.
    """

    keyword = introspection.Parameter.KEYWORD_ONLY

    def extend(command: Callable[..., None]) -> Callable[..., None]:
        signature = introspection.signature(command, eval_str=True)
        parameters = {name: each for name, each in signature.parameters.items() if name != "flags"}
        for kind in settings:
            types = typing.get_type_hints(kind)
            for name, field in kind.model_fields.items():
                if field.description and name not in parameters:
                    default = None if field.is_required() else (defaults or {}).get(name, field.default)
                    text = field.description + (f" [default: {default}]" if default else "")
                    value: Any = types[name] | None
                    option = Annotated[value, typer.Option(help=text, show_default=False)]
                    parameters[name] = introspection.Parameter(name, keyword, default=None, annotation=option)
        keywords = [each.replace(kind=keyword) for each in parameters.values()]
        command.__signature__ = signature.replace(parameters=keywords)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in keywords}
        return command

    return extend


def _given(settings: type[BaseModel], flags: dict[str, Any]) -> dict[str, Any]:
    """Return those of the settings that the command line gives."""
    return {name: value for name, value in flags.items() if name in settings.model_fields and value is not None}


# The commands, in the order of the work.


@app.command(
    epilog=_examples(
        "draft-train text /usr/share/doc /usr/share/man --out text.jsonl",
        "draft-train text unpacked/documents unpacked/words --out text.jsonl --megabytes 100 --languages de",
        "draft-train prepare --prompts text.jsonl --keep-responses --out data/text",
    )
)
def text(
    places: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER]...",
            help="Folders of documentation and source code [default: the installed Python's].",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="JSONL file to write: rows of text, kind, language and source.")] = Path(
        "text.jsonl"
    ),
    languages: Annotated[
        list[str] | None,
        typer.Option(help="Language of prose to keep, as en, de, fr, es, it or pt; repeatable [default: all]."),
    ] = None,
    megabytes: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help="Characters of the texts, in millions: 60 % English, 20 % code, 20 % other languages (without one of "
            "these, the others share in proportion), at most 15 % of each from one source, a folder below the given "
            "ones [default: all].",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order.")] = 0,
) -> None:
    """Turn documentation and source code into clean pieces of ordinary text."""
    from draft.data.passages import LANGUAGES, group, installed_places, read_passages, share_out

    if wrong := [language for language in languages or () if language not in LANGUAGES]:
        raise UserError(f"--languages {wrong[0]!r} is not known; choose from {', '.join(LANGUAGES)}.")
    with console.status("reading"):
        pieces = read_passages(places or installed_places())
    kept = [piece for piece in pieces if piece.kind == "code" or not languages or piece.language in languages]
    random.Random(seed).shuffle(kept)
    if megabytes:
        kept = share_out(kept, round(megabytes * 1e6))
    if not kept:
        raise UserError("no text is left of the files; give more folders, other --languages, or more --megabytes.")
    write_jsonl(out, map(asdict, kept))
    sizes: Counter[str] = Counter()
    for piece in kept:
        sizes[group(piece)] += len(piece.text.encode())
    parts = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sorted(sizes.items()))
    console.print(f"Wrote {out}: {len(kept)} pieces ({parts}).", soft_wrap=True)
    if megabytes and sum(len(piece.text) for piece in kept) < 0.9e6 * megabytes:
        console.print(
            f"Fewer than the {megabytes:g} million characters asked for: a group had less text, or too much of it from "
            "one source. Give more folders to take in more.",
            soft_wrap=True,
        )


@app.command(
    epilog=_examples(
        "draft-train prompts --out prompts.jsonl --count 20000",
        "draft-train prompts --out code.jsonl --count 500 --kind code --kind code-editing --passages text.jsonl",
        "draft-train prompts --out held.jsonl --count 400 --seed 1 --exclude prompts.jsonl --share chat=10",
        "draft-train prepare --prompts prompts.jsonl --out data/general --max-length 4096",
    )
)
def prompts(
    out: Annotated[Path, typer.Option(help="JSONL file to write: rows of messages and kind.")],
    count: Annotated[int, typer.Option(min=1, help="Number of prompts, all different.")],
    seed: Annotated[int, typer.Option(help="Seed; with the same passages it gives the same prompts.")] = 0,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Kind of prompt; repeatable [default: all].", show_default=False),
    ] = None,
    share: Annotated[
        list[str] | None,
        typer.Option(help="Share of a kind, as chat=30, beside the others' defaults; repeatable.", show_default=False),
    ] = None,
    passages: Annotated[
        list[Path] | None,
        typer.Option(
            help="File that draft-train text wrote, or a folder of documentation; repeatable [default: the installed "
            "Python's].",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(help="File of prompts that are not made again; repeatable.", show_default=False),
    ] = None,
) -> None:
    """Make prompts of many kinds, for which prepare lets the target write responses."""
    from draft.data.made_prompts import chosen_shares, counts, keys_of, make_prompts
    from draft.data.passages import installed_places, read_passages

    shares = chosen_shares(kind or (), share or ())
    known = [key for file in exclude or () for key in keys_of(file)]
    with console.status("reading passages"):
        pieces = read_passages(passages or installed_places())
    rows = make_prompts(count, seed, pieces, shares=shares, exclude=known)
    write_jsonl(out, rows)
    numbers = ", ".join(f"{name} {number}" for name, number in counts(rows).items())
    console.print(
        f"Wrote {out}: {len(rows)} prompts ({numbers}). Next: draft-train prepare --prompts {out}", soft_wrap=True
    )


Shard = Annotated[
    str | None,
    typer.Option(
        help="Answer one part of the conversations, 0/4 the first of four, each by a process of its own with the "
        "same arguments and --out, at once or one after the other; torchrun and `accelerate launch` set it.",
        show_default=False,
    ),
]


@app.command(
    epilog=_examples(
        "draft-train prepare --target smollm2 --out data/general --num-prompts 500",
        "draft-train prepare --target smollm2 --prompts questions.jsonl --out data/mine",
        "draft-train prepare --target ./my-llama --prompts questions.jsonl --endpoint http://localhost:8000/v1 "
        "--out data/mine",
        "draft-train prepare --from-capture captured --out data/traffic --num-prompts 2000",
    )
)
@_flags_of(Settings, LocalServer, EndpointSettings)
def prepare(
    out: Annotated[Path, typer.Option(help="Folder of the data set; the same command continues an interrupted one.")],
    target: Target = "smollm2",
    target_adapter: TargetAdapter = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="JSONL, JSON, Parquet or CSV file, or hub data set as owner/name, owner/name:split or "
            "owner/name:configuration:split; repeatable. None: the target writes them."
        ),
    ] = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE]...", help="Further files: --prompts A B.", show_default=False)
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the prompt or conversation.")] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="File of a Jinja chat template [default: the target's own].", show_default=False),
    ] = None,
    shard: Shard = None,
    from_capture: Annotated[
        Path | None,
        typer.Option(
            help="Folder that `draft-serve --capture` wrote: its requests become the data set, and nothing is written; "
            "the newest conversations are held out.",
            show_default=False,
        ),
    ] = None,
    **flags: Any,
) -> None:
    """Let the target write its own training data, or take it from captured traffic."""
    from draft.data.dataset import missing_shards, parse_shard
    from draft.data.prepare import prepare as run
    from draft.target import load_target, read_chat_template

    if more and not prompts:
        raise UserError(f"{more[0]!r} belongs to no option; give files of prompts as --prompts {' '.join(more)}.")
    settings = Settings.checked(_given(Settings, flags)).model_dump(exclude_unset=True)
    if from_capture is not None:
        others = {"prompts": prompts, "column": column, "shard": shard, "chat_template": chat_template, **flags}
        _prepare_capture(from_capture, out, target, target_adapter, settings, others)
        return
    part = parse_shard(shard)
    server = _server(flags, dtype, device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as Ctrl-C: store, and end the server
    files = [*prompts, *(more or ())] if prompts else None
    template = None if chat_template is None else read_chat_template(chat_template)
    try:
        identity = load_target(target, "bfloat16", "cpu", target_adapter)  # and tokenizer: the server computes
        if template is not None:
            identity.use_chat_template(template)
        dataset = run(identity, out, prompts=files, column=column, shard=part, server=server, **settings)
    except KeyboardInterrupt:
        console.print(f"Interrupted; the same command goes on with {out}.", soft_wrap=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    if dataset is None:
        left = ", ".join(map(str, missing_shards(out, part.count if part else None)))
        console.print(f"{out}: shard {part} is done. Not yet done: {left}.")
        return
    _report_dataset(out, dataset)


def _prepare_capture(
    folder: Path, out: Path, target: str, adapter: str | None, settings: dict[str, Any], others: dict[str, Any]
) -> None:
    """Make a data set of captured traffic; others: options, of which those about prompts and writing are refused."""
    from draft.data.capture import open_capture
    from draft.data.from_capture import prepare_capture
    from draft.target import load_target
    from draft.target.hidden_states import check_hidden_states

    used = ("num_prompts", "max_length", "held_out_share")
    wrong = next((name for name, value in others.items() if value is not None and name not in used), None)
    if wrong is not None:
        raise UserError(
            f"--{wrong.replace('_', '-')} is about prompts and answers that are yet to be written, and --from-capture "
            "takes both as they are; leave one of them out."
        )
    capture = open_capture(folder)
    identity = load_target(target, "bfloat16", "cpu", adapter)
    capture.check_target(identity)
    check_hidden_states(identity)
    dataset = prepare_capture(identity, capture, out, **settings)
    _report_dataset(out, dataset)


def _report_dataset(out: Path, dataset: Dataset) -> None:
    counts = dataset.manifest["counts"]
    dropped = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if type(count) is int)
    console.print(
        f"{out}: {counts['train']['rows']} rows to train on, {counts['held-out']['rows']} held out ({dropped}). "
        f"Next: draft-train inspect {out}"
    )


def _server(flags: dict[str, Any], dtype: str, device: str) -> EndpointSettings | LocalServer:
    """The server that writes responses: the one at --endpoint, or one of this machine's to be started."""
    from draft.data.generate import check_local
    from draft.target.target import device_of_process

    at_endpoint, here = _given(EndpointSettings, flags), _given(LocalServer, flags)
    if "endpoint" in at_endpoint:
        if here:
            option = f"--{next(iter(here)).replace('_', '-')}"
            raise UserError(f"{option} is of a draft-serve that is started to write; leave it out, or --endpoint.")
        return EndpointSettings.checked(at_endpoint)
    if at_endpoint:
        option = f"--{next(iter(at_endpoint)).replace('_', '-')}"
        raise UserError(f"{option} is about a running server; give its address with --endpoint, or leave it out.")
    device = device_of_process(device)
    check_local(dtype, device)
    return LocalServer.checked({"dtype": dtype, "device": device, **here})


@app.command(epilog=_examples("draft-train inspect data/mine --examples 2", "draft-train inspect captured"))
def inspect(
    data: Annotated[Path, typer.Argument(help="Folder that prepare wrote, or `draft-serve --capture`.")],
    examples: Annotated[int, typer.Option(min=0, help="Number of conversations to show.")] = 3,
) -> None:
    """Print statistics and the first conversations, with the tokens that are trained on in colour.

    Of captured traffic: its amount, the kinds of sampling, and the acceptance length of each head.
    """
    from draft.data.capture import open_capture, shards_of
    from draft.data.inspect import inspect as run

    if shards_of(data):
        from draft.evaluation.captured import inspect_capture

        inspect_capture(open_capture(data), console=console)
    else:
        run(data, examples=examples, console=console)


RunFolder = Annotated[Path, typer.Option(help="Folder of the run; the same command continues it.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Overrides of settings.")]
Config = Annotated[Path | None, typer.Option(help="YAML file of settings; flags take precedence.")]
Resume = Annotated[
    bool | None,
    typer.Option(
        show_default=False,
        help="--resume: go on with the interrupted run in --out, which has to have a checkpoint; its "
        "settings need not be repeated. --no-resume: start again, discarding what that run wrote. "
        "Neither: go on if there is a checkpoint, else start. "
        "(--head is a warm start: a new run from a head's weights.)",
    ),
]


@app.command(
    epilog=_examples(
        "draft-train pretrain --target smollm2 --data data/general --out runs/pretrain",
        "draft-train pretrain --head smollm2-eagle3 --data data/general --out runs/trained-on",
        "draft-train pretrain --architecture medusa --head-options num_heads=4 --data data/general --out runs/medusa",
    )
)
@_flags_of(SECTIONS["model"], SECTIONS["data"], SECTIONS["training"], defaults=DEFAULTS["pretrain"])
def pretrain(
    out: RunFolder, overrides: Overrides = None, config: Config = None, resume: Resume = None, **flags: Any
) -> None:
    """Train all weights of a head, from scratch or from --head."""
    _train("pretrain", out, overrides, config, resume, flags)


@app.command(
    epilog=_examples(
        "draft-train adapt --target smollm2 --head smollm2-eagle3 --data data/mine --out runs/mine",
        "draft-train adapt --config run.yaml --out runs/mine adapter.method=afa-lora adapter.rank=8",
    )
)
@_flags_of(*SECTIONS.values())
def adapt(
    out: RunFolder, overrides: Overrides = None, config: Config = None, resume: Resume = None, **flags: Any
) -> None:
    """Adapt a head to the data: all weights (default), AFA-LoRA or LoRA."""
    _train("adapt", out, overrides, config, resume, flags)


def _train(
    mode: Literal["pretrain", "adapt"], out: Path, overrides: Overrides, config: Config, resume: Resume, flags: Any
) -> None:
    from draft.training.run import Interrupted
    from draft.training.trainer import Trainer

    if resume and config is None and (out / "config.yaml").is_file():
        config = out / "config.yaml"  # with it `--out RUN --resume` is a whole command
    settings = resolve(mode, str(out), config_file=config, overrides=overrides or (), flags=flags)
    try:
        trainer = Trainer(settings, console, resume=resume)
        result = trainer.train()
    except Interrupted as interrupted:
        if trainer.processes.is_main:
            console.print(f"Interrupted, and saved after step {interrupted.step}; the same command goes on from there.")
        raise typer.Exit(interrupted.exit_code) from interrupted
    if trainer.processes.is_main:
        console.print(f"Wrote {result}. Next: draft-train merge {out} --out HEAD", soft_wrap=True)


@app.command(epilog=_examples("draft-train merge runs/mine --out heads/mine"))
def merge(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder of the head to write.")],
) -> None:
    """Write a run's head as plain linear weights, which vLLM and SGLang load."""
    from draft.training.merge import merge_run

    merged = merge_run(run, out)
    console.print(
        f"Wrote {merged.head}: {merged.layers} layers changed, "
        f"rounded by at most {merged.rounding:.1e} of their largest weight."
    )


@app.command(
    epilog=_examples(
        "draft-train compare --baseline smollm2-eagle3 --candidate heads/mine --data data/mine --out report"
    )
)
def compare(
    baseline: Annotated[str, typer.Option(help="The head to beat.")],
    candidate: Annotated[str, typer.Option(help="The head to judge.")],
    data: Annotated[Path, typer.Option(help="Data set of the domain; its held-out rows are used.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    target: Target = "smollm2",
    target_adapter: TargetAdapter = None,
    general: Annotated[Path | None, typer.Option(help="Data of general traffic [default: what ships].")] = None,
    leave_out_trained: Annotated[
        bool, typer.Option(help="Leave out rows that a head was trained on, and say how many, instead of refusing.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Compare two heads on held-out rows; exit status 0 says ship, 1 says don't."""
    from draft.data.dataset import open_dataset
    from draft.evaluation.compare import Contender, general_rows
    from draft.evaluation.compare import compare as run
    from draft.evaluation.report import print_report, write_report
    from draft.heads.checkpoint import load_head
    from draft.target import load_target

    try:
        out.mkdir(parents=True, exist_ok=True)  # before the long work, not after it
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be made ({error.strerror}); choose another.") from error
    loaded = load_target(target, dtype, device, target_adapter)
    dataset = open_dataset(data)
    dataset.check_target(loaded)
    if general is None:
        rows = general_rows(loaded)
    else:
        other = open_dataset(general)
        other.check_target(loaded)
        rows = list(other.rows("held-out"))
    old, new = (
        Contender(path, *load_head(path, dtype=loaded.dtype, device=loaded.device)) for path in (baseline, candidate)
    )
    comparison = run(
        loaded, old, new, dataset.rows("held-out"), rows, progress=True, leave_out_trained=leave_out_trained
    )
    print_report(comparison, console)  # first: a full disk must not take the verdict along
    write_report(comparison, out, console)
    if not comparison.ship:
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "draft-serve --head smollm2-eagle3 --capture captured",
        "draft-train learn --server http://localhost:8000 --capture captured --head smollm2-eagle3 --out learned",
        "draft-train learn --out learned --status",
        "draft-train learn --server http://localhost:8000 --capture captured --head smollm2-eagle3 --out learned "
        "--once model.rebuild_vocabulary=true",
    )
)
def learn(
    out: Annotated[Path, typer.Option(help="Folder of the ledger and the heads; the same command goes on there.")],
    server: Annotated[str | None, typer.Option(help="Address of the server that writes --capture.")] = None,
    capture: Annotated[Path | None, typer.Option(help="Folder that `draft-serve --capture` writes.")] = None,
    head: Annotated[str | None, typer.Option(help="The head that the server was started with.")] = None,
    overrides: Overrides = None,
    target: Target = "smollm2",
    target_adapter: TargetAdapter = None,
    general: Annotated[
        Path | None, typer.Option(help="Data of general traffic for the comparison [default: what ships].")
    ] = None,
    method: Annotated[str, typer.Option(help="Training method: full, afa-lora or lora.")] = "full",
    min_rows: Annotated[int, typer.Option(min=8, help="New usable requests from which an attempt is made.")] = 200,
    max_rows: Annotated[int, typer.Option(min=8, help="Newest requests that an attempt uses.")] = 1000,
    held_out_share: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of these conversations, the newest, kept for judging.")
    ] = 0.2,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of the longest request that is used.")] = 1024,
    budget: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the server's throughput that training may take, measured.")
    ] = 0.1,
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    once: Annotated[
        bool, typer.Option("--once", help="End after one attempt (status 2: failed), or without enough new requests.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Print what was attempted and served, and end.")] = False,
) -> None:
    """Adapt the served head to captured traffic again and again, and swap it where it is proven better.

    [SECTION.KEY=VALUE] are settings of the training, as those of `adapt`. The server's key is read from
    DRAFTSMITH_API_KEY.
    """
    from draft.learning.ledger import Ledger, status_table

    if status:
        console.print(status_table(Ledger(out / "ledger.jsonl").attempts()))
        return
    if server is None or capture is None or head is None:
        missing = "--server" if server is None else "--capture" if capture is None else "--head"
        raise UserError(f"{missing} is missing; learning needs --server, --capture and --head (--status does not).")
    import torch

    from draft.learning.loop import Learner, Options
    from draft.learning.server import Server

    os.nice(NICENESS)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = Options(
        out, capture, head, target, target_adapter, general, dtype, device, method, tuple(overrides or ()), budget,
        min_rows, max_rows, held_out_share, max_length,
    )  # fmt: skip
    try:
        with Server(server) as client:
            Learner(options, client, console).run(once=once)
    except KeyboardInterrupt as error:
        console.print(f"Interrupted; the same command goes on with {out}.", soft_wrap=True)
        raise typer.Exit(getattr(error, "exit_code", 128 + signal.SIGINT)) from None


@app.command(epilog=_examples("draft-train export heads/mine --format plain --out exports/mine"))
def export(
    head: Annotated[str, typer.Argument(help="The head: a folder, or the name of one that ships.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[
        str, typer.Option(help="Format: plain (EAGLE-3, for most engines), vllm, sglang or speculators.")
    ] = "plain",
    target: Annotated[str | None, typer.Option(help="Target [default: the one that the head was made for].")] = None,
    speculation_length: Annotated[int, typer.Option(min=1, help="Drafted tokens, in what is printed.")] = 3,
) -> None:
    """Write a head as another engine loads it, and print how that engine is started."""
    from draft.interop.exporting import export_head

    exported = export_head(head, format, out, target=target, speculation_length=speculation_length)
    console.print(f"Wrote {exported.folder}.", soft_wrap=True)
    for note in exported.notes:
        console.print(f"  {note}", soft_wrap=True)
    for engine, command in exported.commands.items():
        console.print(f"{engine}:\n  {command}", soft_wrap=True)


@app.command(
    name="import",
    epilog=_examples("draft-train import EAGLE3-LLaMA3.1-Instruct-8B --target Llama-3.1-8B-Instruct --out heads/stock"),
)
def import_(
    source: Annotated[Path, typer.Argument(help="Folder of a head in another project's format.")],
    out: Annotated[Path, typer.Option(help="Folder of the head to write.")],
    target: Target = "smollm2",
    target_adapter: TargetAdapter = None,
    auxiliary_layers: Annotated[
        str | None,
        typer.Option(help="Layers whose inputs the head reads, such as 2,15,27, if its config.json leaves that open."),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Bring a head of SafeAILab, SGLang, vLLM, speculators or FasterDecoding to this program's format."""
    from draft.interop.importing import import_head
    from draft.target import load_target

    try:
        layers = None if auxiliary_layers is None else [int(layer) for layer in auxiliary_layers.split(",")]
    except ValueError as error:
        raise UserError(f"--auxiliary-layers {auxiliary_layers!r} is no list of numbers, such as 2,15,27.") from error
    loaded = load_target(target, dtype, device, target_adapter)
    imported = import_head(source, loaded, out, auxiliary_layers=layers)
    console.print(f"Found a head in the format {imported.kind}.", soft_wrap=True)
    for note in imported.notes:
        console.print(f"  {note[0].upper()}{note[1:]}", soft_wrap=True)
    console.print(f"Wrote {imported.head}.", soft_wrap=True)


app.command(epilog=demo.EPILOG)(demo.demo)

if __name__ == "__main__":
    main()
