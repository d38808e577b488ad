"""A prepared data set on disk: two Parquet files, a manifest, and, while it is being written, what is done so far.

manifest.json       written last: a folder without it is unfinished
train.parquet       one row a conversation, or an answer with a prompt of its own, see `Row`
held-out.parquet    the same; no prompt of it is in train.parquet
tokenizer/          the target's, so that the rows can be read without loading the target
plan.json           the resolved arguments, while it is unfinished and afterwards
parts/              the responses so far, until all is finished: those of a process without --shard, and
parts/shard-1-of-4/     those of a process with --shard 1/4,
parts/shard-1-of-4.done empty, when that process has them all,
parts/*.lock            held while a process works; the system releases it when the process ends, however it does
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from draft.errors import UserError
from draft.files import read_json, write_json
from draft.target import Target

log = logging.getLogger(__name__)

VERSION = 1
SPLITS = ("train", "held-out")
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "loss_mask": pa.list_(pa.bool_()),
        "prompt_length": pa.int32(),
        "temperature": pa.float32(),
        "top_p": pa.float32(),
        "source": pa.string(),
        "split": pa.string(),
        "retokenised": pa.bool_(),
    }
)
_NEEDED = ("id", "input_ids", "loss_mask", "prompt_length")
_MANIFEST: dict[str, type] = {  # what others rely on
    "target": str,
    "target_fingerprint": str,
    "template_hash": str,
    "eos_token_ids": list,
    "sources": list,
    "seed": int,
    "counts": dict,
}
_PART_SCHEMA = pa.schema({"index": pa.int64(), "ids": pa.list_(pa.int32()), "retokenised": pa.bool_()})
_ROWS_PER_PART = 32
_SECONDS_PER_PART = 5.0  # slow answers are stored sooner


@dataclass(frozen=True)
class Response:
    """The target's answer to one prompt."""

    ids: list[int]
    retokenised: bool = False  # see `Row`


@dataclass(frozen=True)
class Row:
    """One conversation, or one answer of it where the template renders its prompt anew; such rows share the id."""

    id: str  # hash of the tokens before the first response: the same prompt has the same id in every data set
    ids: list[int]  # the conversation, up to the last answer of the row
    mask: list[bool]  # the tokens to train on: the assistant's, end-of-turn token included
    prompt_length: int  # tokens before the first response of the row
    temperature: float | None  # how the target wrote it (0: greedily); None: not written by the target
    top_p: float | None
    source: str  # the file it came from, or "self-prompted"
    split: str = ""
    retokenised: bool = False  # the target wrote this text, but maybe not as these tokens: not for measuring

    def continued(self, context: list[int], response: Response) -> Row:
        """The conversation with the response to the token ids `context`, which begin with this row's."""
        return replace(
            self,
            ids=context + response.ids,
            mask=self.mask + [False] * (len(context) - len(self.mask)) + [True] * len(response.ids),
            retokenised=self.retokenised or response.retokenised,
        )

    @property
    def greedy(self) -> bool:
        """Written greedily, token for token as it is here."""
        return self.temperature == 0 and not self.retokenised

    @property
    def trained(self) -> int:
        """Number of tokens to train on."""
        return sum(self.mask)


def conversation_id(prompt: Sequence[int]) -> str:
    """The id of the conversations that start with these token ids."""
    return hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()[:16]


def hashed(*parts: object) -> int:
    """A number that depends on `parts` only, for choices that must not change between runs and machines."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big")


def assign_splits(rows: Iterable[Row], held_out_share: float, seed: int) -> list[Row]:
    """Split by conversation id: the share of ids with the smallest hashes is held out, all rows of an id together.

    A share strictly between 0 and 1 leaves at least one id on each side, where there are two.
    """
    rows = list(rows)
    ids = sorted({row.id for row in rows}, key=lambda id: hashed(seed, "split", id))
    count = round(held_out_share * len(ids))
    if 0 < held_out_share < 1 and len(ids) > 1:
        count = min(max(count, 1), len(ids) - 1)
    held_out = set(ids[:count])
    return [replace(row, split="held-out" if row.id in held_out else "train") for row in rows]


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


class Dataset:
    """A finished data set."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    def rows(self, split: str) -> list[Row]:
        """All rows of "train" or "held-out".

        Raises:
            UserError: for another split, or a file that is missing or damaged.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}.")
        path = self.folder / f"{split}.parquet"
        try:
            table = pq.read_table(path, schema=_SCHEMA)
            columns = table.to_pydict()
        except (OSError, pa.ArrowException, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{str(path)!r} is not a whole Parquet file ({reason}); prepare the data again.") from error
        if table.num_rows and not _whole(table, self.manifest.get("vocab_size")):
            raise UserError(f"{str(path)!r} has rows that no data set has; prepare the data again.")
        columns["ids"], columns["mask"] = columns.pop("input_ids"), columns.pop("loss_mask")
        columns["source"] = [source or "" for source in columns["source"]]
        columns["split"] = [split] * len(columns["ids"])
        columns["retokenised"] = [bool(value) for value in columns["retokenised"]]  # older files have no such column
        return [Row(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]

    def check_target(self, target: Target) -> None:
        """Refuse a target whose tokens or template these are not: UserError naming both fingerprints."""
        ours, theirs = self.manifest["target_fingerprint"], target.fingerprint
        if ours != theirs:
            adapter = self.manifest.get("target_adapter")
            made_for = repr(self.manifest["target"]) + (f" with adapter {adapter!r}" if adapter else "")
            raise UserError(
                f"data set {str(self.folder)!r} was prepared for target {made_for} with fingerprint "
                f"{ours}, and target {target.title} has {theirs}; prepare data with this target, or use that one."
            )


def _whole(table: pa.Table, vocab_size: Any) -> bool:
    """True where every row has an id, tokens of the vocabulary, as many mask values, and a prompt inside of them."""
    ids, mask = pc.list_flatten(table["input_ids"]), pc.list_flatten(table["loss_mask"])
    if any(column.null_count for column in (*(table[name] for name in _NEEDED), ids, mask)):
        return False
    sizes, lengths = pc.list_value_length(table["input_ids"]), table["prompt_length"]
    tokens, prompts = pc.min_max(ids).as_py(), pc.min_max(lengths).as_py()
    return bool(
        pc.min(sizes).as_py() > 0
        and pc.all(pc.equal(sizes, pc.list_value_length(table["loss_mask"]))).as_py()
        and tokens["min"] >= 0
        and (type(vocab_size) is not int or tokens["max"] < vocab_size)
        and prompts["min"] >= 0
        and pc.all(pc.less_equal(lengths, sizes)).as_py()
        and all(value is None or value >= 0 for value in table["temperature"].unique().to_pylist())
    )


def open_dataset(folder: str | Path) -> Dataset:
    """Open what `draft-train prepare` wrote.

    Raises:
        UserError: when there is none, when it is unfinished, or when its manifest is damaged or of another version.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        if (folder / "plan.json").is_file():
            missing = missing_shards(folder, read_json(folder / "plan.json").get("shards"))
            shards = f" (missing: shard {', '.join(map(str, missing))})" if missing else ""
            raise UserError(
                f"data set {str(folder)!r} is unfinished{shards}; repeat the `draft-train prepare` that began "
                f"it{f' with --shard {missing[0]}' if missing else ''} to continue."
            )
        raise UserError(f"{str(folder)!r} holds no data set; write one with `draft-train prepare --out {folder}`.")
    manifest = read_json(path)
    if manifest.get("version") != VERSION:
        raise UserError(
            f"data set {str(folder)!r} has version {manifest.get('version')}, not {VERSION}; prepare it again."
        )
    if not all(isinstance(manifest.get(name), kind) for name, kind in _MANIFEST.items()) or not all(
        isinstance(manifest["counts"].get(split), dict) for split in SPLITS
    ):
        raise UserError(f"the manifest of data set {str(folder)!r} is damaged; prepare it again.")
    return Dataset(folder, manifest)


def write_dataset(folder: Path, rows: list[Row], manifest: dict[str, Any]) -> Dataset:
    """Write the rows of both splits and then the manifest, which makes the data set valid."""
    for split in SPLITS:
        chosen = [asdict(row) for row in rows if row.split == split]
        for record in chosen:
            record["input_ids"], record["loss_mask"] = record.pop("ids"), record.pop("mask")
        _write_parquet(folder / f"{split}.parquet", pa.Table.from_pylist(chosen, schema=_SCHEMA))
    write_json(folder / "manifest.json", {"version": VERSION, **manifest})
    return open_dataset(folder)


# The state of an unfinished data set.


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of the conversations, which a process of its own answers; index counts from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        return f"shard-{self.index}-of-{self.count}"

    def holds(self, index: int) -> bool:
        """True for the indices of the conversations in this shard."""
        return index % self.count == self.index


def parse_shard(text: str | None) -> Shard | None:
    """`0/4` is the first of four. Without it, the place that `accelerate launch` or `torchrun` gave this process.

    Raises:
        UserError: for what is not of this form, or out of range.
    """
    if text is None:
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal() and int(world) > 1):
            return None
        log.warning(
            "RANK=%s and WORLD_SIZE=%s are set, as a launcher of %s processes does: this process answers shard %s/%s "
            "of the conversations only; for all of them give --shard 0/1, or unset both variables.",
            *(rank, world, world, rank, world),
        )
        return Shard(int(rank), int(world))
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text!r} is not of the form 0/4, with the first number from 0 to below the second.")
    return Shard(int(index), int(count)) if int(count) > 1 else None


def missing_shards(folder: Path, count: int | None) -> list[Shard]:
    """The shards of an unfinished data set that are not done; none where it is not written in shards."""
    shards = [Shard(index, count) for index in range(count)] if count else []
    return [shard for shard in shards if not (folder / "parts" / f"{shard.name}.done").is_file()]


class Plan:
    """The arguments of a data set: the same call continues it, and another call is refused."""

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        self.folder = folder
        self.arguments = json.loads(json.dumps(arguments))

    @property
    def finished(self) -> bool:
        return (self.folder / "manifest.json").is_file()

    def begin(self) -> None:
        """Write the plan, or refuse to go on with one of other arguments."""
        path = self.folder / "plan.json"
        if not path.is_file():
            # another process that begins the same data set may be writing these at this moment
            expected = ("plan.json", ".plan.json", "parts")
            if self.folder.exists() and not (
                self.folder.is_dir() and all(path.name.startswith(expected) for path in self.folder.iterdir())
            ):
                raise UserError(f"{str(self.folder)!r} exists and is no data set; choose another --out, or delete it.")
            write_json(path, self.arguments, replace=False)
        before = read_json(path)
        self.arguments["rendering_time"] = before.get("rendering_time")  # what goes on renders as it began
        for name in sorted({*before, *self.arguments}):
            old, new = before.get(name), self.arguments.get(name)
            if old != new:
                raise UserError(
                    f"data set {str(self.folder)!r} was begun with {name} = {old!r}, and this call has {new!r}; "
                    "choose another --out, or delete the folder to start again."
                )

    def abandon(self) -> None:
        """Remove what was begun: the arguments can come to nothing."""
        (self.folder / "plan.json").unlink(missing_ok=True)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        with suppress(OSError):  # something else is in it
            self.folder.rmdir()


class Parts:
    """Responses written so far, by stage and index; each file appears whole or not at all."""

    def __init__(self, folder: Path, subfolder: str = "") -> None:
        """subfolder: of this process, which writes there and reads those of all."""
        self.folder, self.written = folder, folder / subfolder
        self._waiting: list[dict[str, Any]] = []
        self._stored = time.monotonic()

    @property
    def begun(self) -> bool:
        """True once any response is stored."""
        return any(self.folder.rglob("*.parquet"))

    def load(self, stage: str) -> dict[int, Response]:
        done: dict[int, Response] = {}
        for path in sorted(self.folder.rglob(f"{stage}.*.parquet")):
            columns = pq.read_table(path, schema=_PART_SCHEMA).to_pydict()
            responses = map(Response, columns["ids"], map(bool, columns["retokenised"]))
            done.update(zip(columns["index"], responses, strict=True))
        return done

    def add(self, stage: str, index: int, response: Response) -> None:
        self._waiting.append({"index": index, **asdict(response)})
        if len(self._waiting) >= _ROWS_PER_PART or time.monotonic() - self._stored > _SECONDS_PER_PART:
            self.flush(stage)

    def flush(self, stage: str) -> None:
        if self._waiting:
            self.written.mkdir(parents=True, exist_ok=True)
            number = len(list(self.written.glob(f"{stage}.*.parquet")))
            table = pa.Table.from_pylist(self._waiting, schema=_PART_SCHEMA)
            _write_parquet(self.written / f"{stage}.{number:06d}.parquet", table)
            self._waiting = []
        self._stored = time.monotonic()


def _write_parquet(path: Path, table: pa.Table) -> None:
    """Write through a temporary name and a rename."""
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)


# The reduced vocabulary of a draft head: the tokens that the target writes most often.


def token_counts(rows: Sequence[Row], vocab_size: int) -> Tensor:
    """Number of times that each token is trained on: [vocab_size] int64."""
    trained = [token for row in rows for token, wanted in zip(row.ids, row.mask, strict=True) if wanted]
    return torch.bincount(torch.tensor(trained, dtype=torch.int64), minlength=vocab_size)


def draft_vocabulary(
    rows: Sequence[Row], size: int, vocab_size: int, always: Iterable[int] = (), kept: Tensor | None = None
) -> Tensor:
    """The `size` target ids that are trained on most often, sorted: [size] int64.

    Those of `kept` (a head's vocabulary until now) count as if they had occurred 2.5 times more. Ties, and places that
    no trained token needs, go to the lower id. `always` (the ends of a turn) come first.

    Raises:
        UserError: when `size` exceeds the target's vocabulary or has no room for `always`.
    """
    if size > vocab_size:
        raise UserError(f"a draft vocabulary of {size} tokens exceeds the target's {vocab_size}; choose a smaller one.")
    counts = 2 * token_counts(rows, vocab_size)
    if kept is not None:
        # which rare tokens a text has is chance, and a longer text's say more: chosen from 340,000 tokens, 93.8 % of
        # fresh text of the same kinds and 92.7 % of chat are in the vocabulary, so 94.2 % and 94.0 %
        counts[kept.cpu()] += 5
    required = torch.tensor(sorted(set(always)), dtype=torch.int64)
    if len(required) > size:
        raise UserError(
            f"a draft vocabulary of {size} tokens has no room for {len(required)} ends of turn; choose a larger one."
        )
    counts[required] = torch.iinfo(torch.int64).max
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def coverage(rows: Sequence[Row], vocabulary: Tensor) -> float:
    """Share of the trained-on tokens that are in `vocabulary` [draft_vocab]; 1.0 when there are none."""
    size = 1 + max([int(vocabulary.max()), *(token for row in rows for token in row.ids)])
    counts = token_counts(rows, size)
    total = int(counts.sum())
    return int(counts[vocabulary.cpu()].sum()) / total if total else 1.0
