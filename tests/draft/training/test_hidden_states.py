"""Hidden states on disk: the same run with fewer passes of the target, checked before and while it is written."""

import shutil
import threading
from types import SimpleNamespace

import psutil
import pytest
import torch
from filelock import FileLock
from rich.console import Console
from training_runs import Run, command, logged, weights

from draft.data.dataset import open_dataset
from draft.errors import UserError
from draft.target import load_target
from draft.training import hidden_states
from draft.training.batches import fits_in_memory, kept_layers
from draft.training.hidden_states import HiddenStateCache


@pytest.fixture(scope="module")
def world(made):
    Run(command(made, "pretrain", made / "plain", "--max-steps", "8", "--no-keep-hidden-states")).succeed()
    return made


def test_the_run_is_the_same_and_the_states_are_used_again(world, tmp_path):
    cache = tmp_path / "states"
    settings = ["--max-steps", "8", "--cache-hidden-states", str(cache)]
    first = Run(command(world, "pretrain", tmp_path / "first", *settings)).succeed()
    assert "Hidden states of" in first.output() and "free in" in first.output()
    assert list(logged(tmp_path / "first").values()) == pytest.approx(list(logged(world / "plain").values()), rel=1e-5)
    written = {path.name: path.stat().st_mtime_ns for path in cache.glob("[!.]*")}
    # another run over the same rows, in other batches
    again = Run(command(world, "pretrain", tmp_path / "again", *settings, "--seed", "7")).succeed()
    assert "Reading the target's hidden states" in again.output()
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("[!.]*")} == written
    assert weights(tmp_path / "again").keys() == weights(world / "plain").keys()


class Source:
    """Computes states that name their row and counts the passes."""

    def __init__(self, rows, width):
        self.rows, self.width, self.passes, self.last = rows, width, 0, None

    def __call__(self, numbers):
        if self.passes == self.last:
            raise KeyboardInterrupt
        self.passes += 1
        return {row: torch.full((len(self.rows[row].ids), self.width), float(row)) for row in numbers}


@pytest.fixture
def parts(world, monkeypatch):
    monkeypatch.setattr(hidden_states, "TOKENS_PER_SHARD", 256)
    target = load_target(str(world / "target"), "float32")
    rows = open_dataset(world / "data").rows("train")
    return target, rows, Source(rows, 4 * target.hidden_size)


def fill(folder, target, rows, source, layers=(2, 4, 5)):
    cache = HiddenStateCache(folder, target, layers, rows)
    alone = SimpleNamespace(rank=0, count=1, is_main=True, on_main=lambda action: action(), wait=lambda: None)
    cache.fill(source, alone, Console(quiet=True))
    return cache


def shards(folder):
    return sorted(folder.glob("shard-*"))


def test_an_interrupted_pass_goes_on_where_it_was(parts, tmp_path):
    target, rows, source = parts
    source.last = 2
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, *parts)
    assert len(shards(tmp_path)) == 2
    (tmp_path / ".shard-00002.safetensors.tmp").write_text("of a run that was killed")
    source.last = None
    cache = fill(tmp_path, *parts)
    assert source.passes == len(cache.shards) == len(shards(tmp_path)) > 2 and not list(tmp_path.glob("*.tmp"))
    for number, row in enumerate(rows):
        assert cache[number].shape == (len(row.ids), 4 * target.hidden_size) and torch.all(cache[number] == number)


def test_other_states_and_other_files_are_refused(parts, tmp_path):
    target, rows, source = parts
    cache = fill(tmp_path / "states", *parts)
    for some, layers, reason in ((rows, (2, 4, 6), "layers is"), (rows[1:], (2, 4, 5), "data is")):
        with pytest.raises(UserError, match=reason):
            fill(tmp_path / "states", target, some, source, layers)
    shutil.copytree(tmp_path / "states", tmp_path / "other")
    (tmp_path / "other" / "manifest.json").unlink()
    with pytest.raises(UserError, match="something else"):
        fill(tmp_path / "other", *parts)
    [first, *_] = shards(tmp_path / "states")
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(UserError, match=r"not a whole shard .*delete it"):
        cache[cache.shards[0][0]]


def test_a_second_run_waits_until_the_first_has_filled_the_folder(parts, tmp_path):
    with FileLock(tmp_path / ".lock"):
        second = threading.Thread(target=fill, args=(tmp_path, *parts))
        second.start()
        second.join(0.3)
        assert second.is_alive() and not shards(tmp_path)
    second.join(60)
    assert not second.is_alive()
    passes = parts[2].passes
    assert passes == len(shards(tmp_path)) and fill(tmp_path, *parts) and parts[2].passes == passes


def test_whether_states_fit_does_not_depend_on_what_is_free_now(parts, monkeypatch):
    target, _, _ = parts
    size = 1000 * len(kept_layers(target, (2, 4, 5))) * target.hidden_size * target.dtype.itemsize
    for total, fits in ((4 * size, True), (2 * size, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=total))
        assert fits_in_memory(target, (2, 4, 5), 1000) == fits


def test_a_disk_that_is_too_small_is_said_before_the_work(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    tokens = sum(len(row.ids) for row in parts[1])
    with pytest.raises(UserError, match=rf"{tokens:,} tokens take {tokens * 512 / 1e6:.1f} MB and .* has 0.0 MB free"):
        fill(tmp_path, *parts)
    assert parts[2].passes == 0 and not shards(tmp_path)
