"""The target's hidden states on disk, for targets too large to run at every epoch.

manifest.json                   target, layers, dtype and rows; a folder with another one is refused
shard-00000.safetensors, ...    a tensor a row, named by its number: [tokens, kept layers * hidden]

A shard that is there is whole, so an interrupted pass goes on with the first one that is missing. Rows are grouped by
their lengths only: any run over the same rows finds them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from draft.data.dataset import Row
from draft.data.examples import batches
from draft.errors import UserError
from draft.files import read_json, sync, write_json
from draft.target import Target
from draft.training.batches import kept_layers
from draft.training.distributed import Processes

SHARD_BYTES = 512 << 20
TOKENS_PER_BATCH = 4096
OPEN_SHARDS = 64
_UNFINISHED = ".tmp"

Compute = Callable[[list[int]], dict[int, Tensor]]  # row numbers -> [tokens, kept layers * hidden] of each


class HiddenStateCache:
    """Maps the number of a training row to its states, from `fill` on."""

    def __init__(self, folder: Path, target: Target, layers: Sequence[int], rows: Sequence[Row]) -> None:
        self.folder, self.dtype = folder, target.dtype
        self.bytes_per_token = len(kept_layers(target, layers)) * target.hidden_size * target.dtype.itemsize
        self.tokens = [len(row.ids) for row in rows]
        self.shards = self._group(batches(rows, TOKENS_PER_BATCH, seed=0, epoch=0))
        self._shard_of = {row: shard for shard, parts in enumerate(self.shards) for part in parts for row in part}
        self._open = lru_cache(OPEN_SHARDS)(lambda shard: safe_open(self._path(shard), framework="pt"))
        self._manifest = {
            "version": 1,
            "target": target.name,
            "target_fingerprint": target.fingerprint,
            "layers": list(layers),
            "dtype": str(target.dtype).removeprefix("torch."),
            "data": hashlib.sha256(json.dumps([row.ids for row in rows]).encode()).hexdigest()[:32],
            "rows": len(rows),
            "tokens": sum(self.tokens),
            "shards": len(self.shards),
        }

    def _group(self, parts: list[list[int]]) -> list[list[list[int]]]:
        """Batches of rows -> shards of batches, each of about SHARD_BYTES."""
        shards: list[list[list[int]]] = [[]]
        size = 0
        for part in parts:
            if shards[-1] and size >= SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(part)
            size += sum(self.tokens[row] for row in part) * self.bytes_per_token
        return shards

    def fill(self, compute: Compute, processes: Processes, console: Console) -> None:
        """Write the shards that are missing, each process its share of them.

        Raises:
            UserError: when the folder holds other states, or when the missing ones don't fit on the disk.
        """
        missing = processes.on_main(lambda: self._begin(console))
        mine = missing[processes.rank :: processes.count]
        for shard in track(mine, "Writing hidden states", console=console, disable=not (mine and processes.is_main)):
            self._write(shard, compute)
        processes.wait()

    def _begin(self, console: Console) -> list[int]:
        """Make the folder, if it and its disk are in order; returns the missing shards."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--cache-hidden-states {str(self.folder)!r} cannot be made ({error.strerror}); choose another."
            ) from error
        self._check_manifest()
        for left in self.folder.glob(f".*{_UNFINISHED}"):  # of killed runs, for nobody holds its lock
            with suppress(OSError), left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
        missing = [shard for shard in range(len(self.shards)) if not self._path(shard).is_file()]
        tokens = sum(self.tokens[row] for shard in missing for part in self.shards[shard] for row in part)
        needed, free = tokens * self.bytes_per_token, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"the hidden states of {tokens:,} tokens take {_size(needed)} and {str(self.folder)!r} has "
                f"{_size(free)} free; give --cache-hidden-states a folder on a larger disk, or leave it out."
            )
        if missing:
            write_json(self.folder / "manifest.json", self._manifest, replace=False)
            console.print(
                f"Hidden states of {tokens:,} tokens: {_size(needed)} of the {_size(free)} free in {self.folder}."
            )
        else:
            console.print(f"Reading the target's hidden states from {self.folder}.")
        return missing

    def _check_manifest(self) -> None:
        path = self.folder / "manifest.json"
        if not path.is_file():
            # another run may be writing its manifest at this moment
            names = (entry.name for entry in self.folder.iterdir())
            others = sorted(name for name in names if not name.startswith("manifest.json"))
            if others:
                raise UserError(
                    f"--cache-hidden-states {str(self.folder)!r} holds something else ({others[0]}); choose another."
                )
            return
        before = read_json(path)
        for key, value in self._manifest.items():
            if key != "target" and before.get(key) != value:
                raise UserError(
                    f"--cache-hidden-states {str(self.folder)!r} holds those of another run ({key} is "
                    f"{before.get(key)} there and {value} here); choose another folder, or delete it."
                )

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def _write(self, shard: int, compute: Compute) -> None:
        tensors: dict[str, Tensor] = {}
        for part in self.shards[shard]:
            tensors.update({str(row): states for row, states in compute(part).items()})
        path = self._path(shard)
        try:
            with _temporary_file(path) as temporary:
                save_file(tensors, temporary)
                sync(temporary)
                temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{str(path)!r} could not be written ({error}); make room, and the same command goes on from there."
            ) from error

    def __contains__(self, row: object) -> bool:
        return row in self._shard_of

    def __getitem__(self, row: int) -> Tensor:
        shard = self._shard_of[row]
        try:
            states = self._open(shard).get_tensor(str(row))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{str(self._path(shard))!r} is not a whole shard ({error}); delete it, and it is written again."
            ) from error
        if states.dtype != self.dtype or len(states) != self.tokens[row]:
            raise UserError(f"{str(self._path(shard))!r} holds other rows; delete the folder, and it is written again.")
        return states


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """A file beside `path` of a name that no other run uses, locked while it is written, and gone afterwards."""
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_UNFINISHED, dir=path.parent)
    temporary = Path(name)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        temporary.chmod(0o644)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(number)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
