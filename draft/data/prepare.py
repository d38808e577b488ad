"""`draft-train prepare`: conversations in, a data set of what the target says to them out."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draft.data.dataset import (
    SPLITS,
    Dataset,
    Parts,
    Plan,
    Row,
    assign_splits,
    conversation_id,
    hashed,
    open_dataset,
    read_json,
    write_dataset,
    write_json,
)
from draft.data.examples import encode_kept, tokenise
from draft.data.generate import Endpoint, EndpointError, EndpointSettings
from draft.data.prompts import SELF_PROMPTED, Prompt, load_prompts
from draft.data.shards import Shard, locked, mark_done, missing_shards
from draft.data.writing import SELF_PROMPTS, Settings, Writer, answered, self_prompt, self_prompts
from draft.errors import UserError, plain_console
from draft.target import Target

MAX_NEW_TOKENS = 256
GREEDY_SHARE = 0.5
_BATCH_SIZE = {"cpu": 64}  # a CPU is busy with this many rows
_ACCELERATOR_BATCH_SIZE = 128


def prepare(
    target: Target,
    out: str | Path,
    *,
    prompts: Sequence[str | Path] | None = None,
    num_prompts: int | None = None,
    column: str | None = None,
    keep_responses: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_length: int = 1024,
    greedy_share: float = GREEDY_SHARE,
    held_out_share: float = 0.1,
    batch_size: int | None = None,
    seed: int = 0,
    shard: Shard | None = None,
    endpoint: EndpointSettings | None = None,
    progress: bool = True,
) -> Dataset | None:
    """Write a data set into the folder `out`, or go on with the one that the same arguments began there.

    Args:
        prompts: files or hub data sets; None lets the target write its own prompts.
        num_prompts: how many prompts to write (default 500), or to take of the given ones (default all; fewer are a
            random sample).
        keep_responses: use the responses in the files instead of the target's.
        max_new_tokens: longest response; one that reaches it stays, without an end of turn.
        max_length: longest conversation in tokens; longer ones are dropped and counted. Never above the target's own.
        greedy_share: share of the conversations that the target answers greedily; the others it answers at
            temperature 1, untruncated.
        held_out_share: share of the prompts kept from training.
        batch_size: rows decoded together; changes the speed only.
        shard: answer only this part of the conversations; the last of the shards' processes to be done puts the parts
            together, and the result is that of one process.
        endpoint: a server that answers in the target's place.

    Returns:
        the data set, or None where other shards are not done.

    Raises:
        UserError: for arguments out of range, unreadable or empty data, another data set in `out`, or nothing left.
    """
    settings = Settings(
        num_prompts or (None if prompts else SELF_PROMPTS),
        keep_responses,
        max_new_tokens,
        min(max_length, target.max_length),
        greedy_share,
        held_out_share,
        seed,
    )
    _check(settings, num_prompts, batch_size, bool(prompts), shard is not None or endpoint is not None)
    given = _given_prompts([str(source) for source in prompts], column, settings) if prompts else None
    folder = Path(out)
    plan = Plan(folder, _arguments(target, settings, prompts, given, shard, endpoint))
    plan.begin()
    if plan.finished:
        if progress:
            plain_console().print(f"{folder} is complete: nothing to do.")
        return open_dataset(folder)
    writer = Writer(
        target,
        settings,
        Parts(folder / "parts", shard.name if shard else ""),
        batch_size or _BATCH_SIZE.get(target.device.type, _ACCELERATOR_BATCH_SIZE),
        progress,
        shard,
    )
    busy = f"{str(folder)!r} is being written by another process with {f'--shard {shard}' if shard else 'this --out'}"
    with locked(folder, shard.name if shard else "whole", wait=False, busy=f"{busy}; let it finish."):
        if shard is None:
            return _all(plan, writer, prompts, given, endpoint)
        return _part(plan, writer, prompts, given, endpoint)


def _all(
    plan: Plan,
    writer: Writer,
    sources: Sequence[str | Path] | None,
    given: list[Prompt] | None,
    endpoint: EndpointSettings | None,
) -> Dataset:
    """Write what is missing, and put everything together."""
    try:
        with _answered_by(writer, endpoint):
            conversations = _without_duplicates(writer, given if given is not None else _own_prompts(writer))
            rows = assign_splits(_rows(writer, conversations), writer.settings.held_out_share, writer.settings.seed)
    except UserError as error:
        if not (isinstance(error, EndpointError) and writer.parts.begun):
            plan.abandon()
        raise
    writer.target.tokenizer.save_pretrained(plan.folder / "tokenizer")
    dataset = write_dataset(plan.folder, rows, _manifest(writer, rows, sources))
    shutil.rmtree(writer.parts.folder, ignore_errors=True)
    return dataset


def _part(
    plan: Plan,
    writer: Writer,
    sources: Sequence[str | Path] | None,
    given: list[Prompt] | None,
    endpoint: EndpointSettings | None,
) -> Dataset | None:
    """Answer the conversations of one shard; whoever finds all shards done puts them together."""
    assert writer.shard is not None
    with locked(plan.folder, "prompts", wait=True):  # the first writes the prompts, the others take them
        own = given if given is not None else _own_prompts(writer)
    with _answered_by(writer, endpoint):
        answered(writer, _without_duplicates(writer, own))
    mark_done(plan.folder, writer.shard)
    with locked(plan.folder, "finish", wait=True):
        if plan.finished:
            return open_dataset(plan.folder)
        if missing_shards(plan.folder, writer.shard.count):
            return None
        whole = Writer(writer.target, writer.settings, Parts(plan.folder / "parts"), writer.batch_size, writer.show)
        return _all(plan, whole, sources, given, None)


@contextmanager
def _answered_by(writer: Writer, endpoint: EndpointSettings | None) -> Iterator[None]:
    """Let a server answer while the block runs, where there is one."""
    if endpoint is None:
        yield
        return
    writer.endpoint = Endpoint(endpoint, writer.target, writer.settings.seed)
    try:
        yield
    finally:
        writer.endpoint.close()


def _own_prompts(writer: Writer) -> list[Prompt]:
    """What the target asks itself; the processes of several shards all use what the first of them stored."""
    path = writer.parts.folder / "prompts.json"
    if path.is_file():
        stored = read_json(path)
        writer.counts["self_prompts_refused"] = int(stored["refused"])
        return [self_prompt(text) for text in stored["prompts"]]
    prompts = self_prompts(writer)
    texts = [prompt.messages[0]["content"] for prompt in prompts]
    writer.parts.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"refused": writer.counts["self_prompts_refused"], "prompts": texts})
    return prompts


def _check(settings: Settings, num_prompts: int | None, batch_size: int | None, given: bool, shared: bool) -> None:
    for name, share in (("greedy-share", settings.greedy_share), ("held-out-share", settings.held_out_share)):
        if not 0 <= share <= 1:
            raise UserError(f"--{name} is {share}; give a number from 0 to 1.")
    for name, number in (
        ("max-new-tokens", settings.max_new_tokens),
        ("max-length", settings.max_length),
        ("num-prompts", num_prompts),
        ("batch-size", batch_size),
    ):
        if number is not None and number < 1:
            raise UserError(f"--{name} is {number}; give a whole number of at least 1.")
    if settings.keep_responses and not given:
        raise UserError("--keep-responses keeps the responses of files, and there are none; give --prompts FILE.")
    if settings.keep_responses and shared:
        raise UserError("--shard and --endpoint are about writing responses, and --keep-responses writes none.")
    for name, value, default in (
        ("max-new-tokens", settings.max_new_tokens, MAX_NEW_TOKENS),
        ("greedy-share", settings.greedy_share, GREEDY_SHARE),
    ):
        if settings.keep_responses and value != default:
            raise UserError(
                f"--{name} {value} is about writing responses, and --keep-responses writes none; leave one of them out."
            )


def _given_prompts(sources: list[str], column: str | None, settings: Settings) -> list[Prompt]:
    keep = settings.keep_responses
    prompts = [prompt for source in sources for prompt in load_prompts(source, column=column, keep_responses=keep)]
    if settings.num_prompts is None or settings.num_prompts >= len(prompts):
        return prompts
    chosen = random.Random(hashed(settings.seed, "sample")).sample(range(len(prompts)), settings.num_prompts)
    return [prompts[index] for index in sorted(chosen)]


def _arguments(
    target: Target,
    settings: Settings,
    sources: Sequence[str | Path] | None,
    given: list[Prompt] | None,
    shard: Shard | None,
    endpoint: EndpointSettings | None,
) -> dict[str, Any]:
    """What a repeated call must agree on, conversations included: a file may have changed since."""
    said = [(prompt.messages, prompt.text, prompt.row and (prompt.row.ids, prompt.row.mask)) for prompt in given or ()]
    return {
        "target_fingerprint": target.fingerprint,
        "prompts": [Path(source).name for source in sources or ()],
        "prompts_hash": hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16] if given else None,
        **vars(settings),
        # an address may change between two calls; who answers may not
        "answered_by": None if endpoint is None else endpoint.model or "the endpoint's model",
        "shards": shard and shard.count,
    }


def _without_duplicates(writer: Writer, prompts: list[Prompt]) -> list[Prompt]:
    different = {
        json.dumps((prompt.messages, prompt.text, prompt.row and prompt.row.ids)): prompt
        for prompt in reversed(prompts)
    }
    writer.counts["conversations"] = len(prompts)
    writer.counts["duplicates"] = len(prompts) - len(different)
    return list(reversed(different.values()))


def _rows(writer: Writer, prompts: list[Prompt]) -> list[Row]:
    """The rows of all conversations that are not too long; splits are not assigned yet."""
    keep = writer.settings.keep_responses
    rows = [_kept(writer.target, prompt) for prompt in prompts] if keep else answered(writer, prompts)
    writer.counts["without_response"] = sum(not any(row.mask) for row in rows)
    rows = [row for row in rows if any(row.mask)]
    writer.counts["too_long"] += sum(len(row.ids) > writer.settings.max_length for row in rows)
    rows = [row for row in rows if len(row.ids) <= writer.settings.max_length]
    if not rows:
        counts = ", ".join(f"{name} {count}" for name, count in writer.counts.items())
        raise UserError(
            f"no conversation is left ({counts}); raise --max-length, now {writer.settings.max_length}, or give "
            "other prompts."
        )
    return rows


def _kept(target: Target, prompt: Prompt) -> Row:
    """A conversation as the file has it."""
    if prompt.row is not None:
        if max(prompt.row.ids) >= target.vocab_size:
            raise UserError(
                f"{prompt.where}: token {max(prompt.row.ids)} is beyond the target's vocabulary of "
                f"{target.vocab_size}; use the target that these tokens belong to."
            )
        return prompt.row
    if prompt.text:
        # the target's distribution teaches after every token, but has nothing to say on the first
        ids = tokenise(target, prompt.text)
        mask = [False] * min(1, len(ids)) + [True] * (len(ids) - 1)
    else:
        try:
            ids, mask = encode_kept(target, prompt.messages)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from error
    length = mask.index(True) if True in mask else len(ids)
    # ordinary text has no prompt that could tell it from another text
    return Row(conversation_id(ids if prompt.text else ids[:length]), ids, mask, length, None, None, prompt.source)


def _manifest(writer: Writer, rows: list[Row], sources: Sequence[str | Path] | None) -> dict[str, Any]:
    target, settings = writer.target, writer.settings
    answered_by = read_json(writer.parts.folder.parent / "plan.json").get("answered_by")
    return {
        "target": target.name,
        "target_adapter": target.adapter.name if target.adapter else None,
        "target_fingerprint": target.fingerprint,
        "template_hash": target.template_hash,
        "vocab_size": target.vocab_size,
        "eos_token_ids": sorted(target.eos_token_ids),
        "sources": [Path(source).name for source in sources or ()] or [SELF_PROMPTED],
        "seed": settings.seed,
        "mix": None
        if settings.keep_responses
        else {"greedy": settings.greedy_share, "temperature 1": 1 - settings.greedy_share},
        "keep_responses": settings.keep_responses,
        "answered_by": answered_by,
        "max_new_tokens": settings.max_new_tokens,
        "max_length": settings.max_length,
        "held_out_share": settings.held_out_share,
        "counts": {**writer.counts, **split_counts(rows)},
    }


def split_counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """Rows, tokens and so on of each split."""
    counts = {}
    for split in SPLITS:
        chosen = [row for row in rows if row.split == split]
        counts[split] = {
            "rows": len(chosen),
            "prompts": len({row.id for row in chosen}),
            "tokens": sum(len(row.ids) for row in chosen),
            "trained_tokens": sum(row.trained for row in chosen),
            "greedy_rows": sum(row.temperature == 0 for row in chosen),
            "sampled_rows": sum(bool(row.temperature) for row in chosen),
            "kept_rows": sum(row.temperature is None for row in chosen),
            "retokenised_rows": sum(row.retokenised for row in chosen),
        }
    return counts
