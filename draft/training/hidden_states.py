"""The target's hidden states on disk, for targets too large to run at every epoch.

manifest.json                   target, layers, dtype and rows; a folder with another one is refused
shard-00000.safetensors, ...    a tensor a row, named by its number: [tokens, kept layers * hidden]

A shard is what one pass of the target gives. One that is there is whole, so an interrupted run goes on with the first
that is missing. Rows are grouped by their lengths only: any run over the same rows finds them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from draft.data.dataset import Row
from draft.data.examples import batches
from draft.errors import UserError
from draft.files import atomic_file, read_json, write_json
from draft.target import Target
from draft.training.batches import kept_layers
from draft.training.distributed import Processes

TOKENS_PER_SHARD = 4096
OPEN_SHARDS = 64


class HiddenStateCache:
    """Maps the number of a training row to its states, from `fill` on."""

    def __init__(self, folder: Path, target: Target, layers: Sequence[int], rows: Sequence[Row]) -> None:
        self.folder, self.dtype = folder, target.dtype
        self.bytes_per_token = len(kept_layers(target, layers)) * target.hidden_size * target.dtype.itemsize
        self.tokens = [len(row.ids) for row in rows]
        self.shards = batches(rows, TOKENS_PER_SHARD, seed=0, epoch=0)
        self._shard_of = {row: shard for shard, part in enumerate(self.shards) for row in part}
        self._open = lru_cache(OPEN_SHARDS)(lambda shard: safe_open(self._path(shard), framework="pt"))
        self.manifest = {
            "version": 2,
            "target": target.name,
            "target_fingerprint": target.fingerprint,
            "layers": list(layers),
            "dtype": str(target.dtype).removeprefix("torch."),
            "data": hashlib.sha256(json.dumps([row.ids for row in rows]).encode()).hexdigest()[:32],
            "tokens": sum(self.tokens),
        }

    def fill(self, compute: Callable[[list[int]], dict[int, Tensor]], processes: Processes, console: Console) -> None:
        """Write the shards that are missing, each process its share of them; a second run waits for the first.

        compute: row numbers -> [tokens, kept layers * hidden] of each.

        Raises:
            UserError: when the folder holds other states, or when the missing ones don't fit on the disk.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock") if processes.is_main else nullcontext():
            missing = processes.on_main(lambda: self._begin(console))[processes.rank :: processes.count]
            shown = processes.is_main and bool(missing)
            for shard in track(missing, "Writing hidden states", console=console, disable=not shown):
                with atomic_file(self._path(shard)) as temporary:
                    save_file({str(row): states for row, states in compute(self.shards[shard]).items()}, temporary)
            processes.wait()

    def _begin(self, console: Console) -> list[int]:
        """Check the folder and its disk, and write the manifest; returns the missing shards."""
        manifest = self.folder / "manifest.json"
        others = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        if others and not manifest.is_file():
            raise UserError(
                f"--cache-hidden-states {str(self.folder)!r} holds something else ({others[0]}); choose another."
            )
        before = read_json(manifest) if others else self.manifest
        for key, value in self.manifest.items():
            if key != "target" and before.get(key) != value:
                raise UserError(
                    f"--cache-hidden-states {str(self.folder)!r} holds those of another run ({key} is "
                    f"{before.get(key)} there and {value} here); choose another folder, or delete it."
                )
        for left in self.folder.glob(".shard-*"):  # of killed runs: only this one writes here now
            left.unlink()
        missing = [shard for shard in range(len(self.shards)) if not self._path(shard).is_file()]
        if not missing:
            console.print(f"Reading the target's hidden states from {self.folder}.")
            return []
        tokens = sum(self.tokens[row] for shard in missing for row in self.shards[shard])
        needed, free = tokens * self.bytes_per_token, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"the hidden states of {tokens:,} tokens take {_size(needed)} and {str(self.folder)!r} has "
                f"{_size(free)} free; give --cache-hidden-states a folder on a larger disk, or leave it out."
            )
        write_json(manifest, self.manifest)
        console.print(
            f"Hidden states of {tokens:,} tokens: {_size(needed)} of the {_size(free)} free in {self.folder}."
        )
        return missing

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def __getitem__(self, row: int) -> Tensor:
        path = self._path(self._shard_of[row])
        try:
            states = self._open(self._shard_of[row]).get_tensor(str(row))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{str(path)!r} is not a whole shard ({error}); delete it and repeat the command."
            ) from error
        if states.dtype != self.dtype or len(states) != self.tokens[row]:
            raise UserError(f"{str(path)!r} holds other rows; delete its folder and try again.")
        return states


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
