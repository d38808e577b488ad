"""`draft-train prepare`: conversations in, a data set of what the target says to them out."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

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
    write_dataset,
)
from draft.data.examples import encode_kept, tokenise
from draft.data.prompts import SELF_PROMPTED, Prompt, load_prompts
from draft.data.writing import SELF_PROMPTS, Settings, Writer, answered, self_prompts
from draft.errors import UserError
from draft.target import Target

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
    max_new_tokens: int = 256,
    max_length: int = 1024,
    greedy_share: float = 0.5,
    held_out_share: float = 0.1,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
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
    _check(settings, num_prompts, batch_size, bool(prompts))
    given = _given_prompts([str(source) for source in prompts], column, settings) if prompts else None
    folder = Path(out)
    plan = Plan(folder, _arguments(target, settings, prompts, given))
    plan.begin()
    if plan.finished:
        if progress:
            Console().print(f"{folder} is complete: nothing to do.", highlight=False)
        return open_dataset(folder)
    writer = Writer(
        target,
        settings,
        Parts(folder / "parts"),
        batch_size or _BATCH_SIZE.get(target.device.type, _ACCELERATOR_BATCH_SIZE),
        progress,
    )
    try:
        conversations = _without_duplicates(writer, given if given is not None else self_prompts(writer))
        rows = assign_splits(_rows(writer, conversations), held_out_share, seed)
    except UserError:
        plan.abandon()
        raise
    target.tokenizer.save_pretrained(folder / "tokenizer")
    dataset = write_dataset(folder, rows, _manifest(writer, rows, prompts))
    shutil.rmtree(writer.parts.folder, ignore_errors=True)
    return dataset


def _check(settings: Settings, num_prompts: int | None, batch_size: int | None, given: bool) -> None:
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


def _given_prompts(sources: list[str], column: str | None, settings: Settings) -> list[Prompt]:
    keep = settings.keep_responses
    prompts = [prompt for source in sources for prompt in load_prompts(source, column=column, keep_responses=keep)]
    if settings.num_prompts is None or settings.num_prompts >= len(prompts):
        return prompts
    chosen = random.Random(hashed(settings.seed, "sample")).sample(range(len(prompts)), settings.num_prompts)
    return [prompts[index] for index in sorted(chosen)]


def _arguments(
    target: Target, settings: Settings, sources: Sequence[str | Path] | None, given: list[Prompt] | None
) -> dict[str, Any]:
    """What a repeated call must agree on, conversations included: a file may have changed since."""
    said = [(prompt.messages, prompt.text, prompt.row and (prompt.row.ids, prompt.row.mask)) for prompt in given or ()]
    return {
        "target_fingerprint": target.fingerprint,
        "prompts": [Path(source).name for source in sources or ()],
        "prompts_hash": hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16] if given else None,
        **vars(settings),
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
        }
    return counts
