"""Hidden states on disk: the same run with fewer passes of the target, checked before and while it is written."""

import json
import shutil
from collections import namedtuple

import psutil
import pytest
import torch
from rich.console import Console
from training_runs import Run, command, logged, make_world, weights

from draft.data.dataset import open_dataset
from draft.errors import UserError
from draft.target import load_target
from draft.training import hidden_states
from draft.training.batches import fits_in_memory, kept_layers
from draft.training.hidden_states import HiddenStateCache

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = make_world(tmp_path_factory.mktemp("world"))
    Run(command(root, "pretrain", root / "plain", "--max-steps", "8", "--no-keep-hidden-states")).succeed()
    return root


def test_the_run_is_the_same_and_the_states_are_used_again(world, tmp_path):
    cache = tmp_path / "states"
    settings = ["--max-steps", "8", "--cache-hidden-states", str(cache)]
    first = Run(command(world, "pretrain", tmp_path / "first", *settings)).succeed()
    assert "Hidden states of" in first.output() and "free in" in first.output()
    assert list(logged(tmp_path / "first").values()) == pytest.approx(list(logged(world / "plain").values()), rel=1e-5)
    written = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    # another run over the same rows, in other batches
    again = Run(command(world, "pretrain", tmp_path / "again", *settings, "--seed", "7")).succeed()
    assert "Reading the target's hidden states" in again.output()
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == written
    assert weights(tmp_path / "again").keys() == weights(world / "plain").keys()


class Source:
    """Computes states that name their row and counts the passes."""

    def __init__(self, rows, width):
        self.rows, self.width, self.passes = rows, width, 0

    def __call__(self, numbers):
        self.passes += 1
        return {row: torch.full((len(self.rows[row].ids), self.width), float(row)) for row in numbers}


class Alone:
    rank, count, is_main = 0, 1, True

    def on_main(self, action):
        return action()

    def wait(self):
        pass


@pytest.fixture
def parts(world, monkeypatch):
    monkeypatch.setattr(hidden_states, "SHARD_BYTES", 60_000)
    monkeypatch.setattr(hidden_states, "TOKENS_PER_BATCH", 256)
    target = load_target(str(world / "target"), "float32")
    rows = open_dataset(world / "data").rows("train")
    return target, rows, Source(rows, 4 * target.hidden_size)


def test_an_interrupted_pass_goes_on_where_it_was(parts, tmp_path):
    target, rows, source = parts
    cache = HiddenStateCache(tmp_path, target, (2, 4, 5), rows)
    assert len(cache.shards) > 2

    class Killed(Exception):
        pass

    def killed(numbers):
        if source.passes == 2:
            raise Killed
        return source(numbers)

    with pytest.raises(Killed):
        cache.fill(killed, Alone(), QUIET)
    done = sorted(tmp_path.glob("shard-*"))
    assert 0 < len(done) < len(cache.shards)
    HiddenStateCache(tmp_path, target, (2, 4, 5), rows).fill(source, Alone(), QUIET)
    assert source.passes == sum(len(shard) for shard in cache.shards)
    for number, row in enumerate(rows):
        assert number in cache and cache[number].shape == (len(row.ids), 4 * target.hidden_size)
        assert torch.all(cache[number] == number)


def test_other_states_and_other_files_are_refused(parts, tmp_path):
    target, rows, source = parts
    HiddenStateCache(tmp_path / "states", target, (2, 4, 5), rows).fill(source, Alone(), QUIET)
    for layers, some, reason in (((2, 4, 6), rows, "layers is"), ((2, 4, 5), rows[1:], "data is")):
        with pytest.raises(UserError, match=reason):
            HiddenStateCache(tmp_path / "states", target, layers, some).fill(source, Alone(), QUIET)
    shutil.copytree(tmp_path / "states", tmp_path / "other")
    (tmp_path / "other" / "manifest.json").unlink()
    with pytest.raises(UserError, match="something else"):
        HiddenStateCache(tmp_path / "other", target, (2, 4, 5), rows).fill(source, Alone(), QUIET)
    [first, *_] = sorted((tmp_path / "states").glob("shard-*"))
    first.write_bytes(first.read_bytes()[:100])
    cache = HiddenStateCache(tmp_path / "states", target, (2, 4, 5), rows)
    with pytest.raises(UserError, match=r"not a whole shard .*delete it"):
        cache[cache.shards[0][0][0]]


def test_runs_that_fill_one_folder_use_files_of_their_own(parts, tmp_path):
    target, rows, source = parts
    cache = HiddenStateCache(tmp_path, target, (2, 4, 5), rows)
    (tmp_path / ".shard-00000.safetensors.tmp").write_text("of a run that was killed")
    (tmp_path / "manifest.json").write_text(json.dumps(cache._manifest))
    path = cache._path(0)
    with hidden_states._temporary_file(path) as ours, hidden_states._temporary_file(path) as theirs:
        assert ours != theirs
        cache.fill(source, Alone(), QUIET)
        left = {file for file in tmp_path.iterdir() if file.name.startswith(".")}
        assert left == {ours, theirs}
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        ["manifest.json", *(cache._path(shard).name for shard in range(len(cache.shards)))]
    )


def test_whether_states_fit_does_not_depend_on_what_is_free_now(parts, monkeypatch):
    target, _, _ = parts
    size = 1000 * len(kept_layers(target, (2, 4, 5))) * target.hidden_size * target.dtype.itemsize
    for total, fits in ((4 * size, True), (2 * size, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: namedtuple("memory", "total")(total))
        assert fits_in_memory(target, (2, 4, 5), 1000) == fits


def test_a_disk_that_is_too_small_is_said_before_the_work(parts, tmp_path, monkeypatch):
    target, rows, source = parts
    usage = namedtuple("usage", "total used free")(10**6, 0, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    tokens = sum(len(row.ids) for row in rows)
    size = f"{tokens * 4 * 32 * 4 / 1e6:.1f} MB"
    with pytest.raises(UserError, match=rf"{tokens:,} tokens take {size} and .* has 0.0 MB free"):
        HiddenStateCache(tmp_path, target, (2, 4, 5), rows).fill(source, Alone(), QUIET)
    assert source.passes == 0 and not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_whole_shards(world, tmp_path):
    settings = ["--max-steps", "2", "--cache-hidden-states", str(tmp_path / "states")]
    run = Run(command(world, "pretrain", tmp_path / "run", *settings), file_size=50_000)
    assert run.wait() == 2 and "could not be written" in run.output() and "Traceback" not in run.output()
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["manifest.json"]
    assert json.loads((tmp_path / "states" / "manifest.json").read_text())["layers"] == [2, 4, 5]
    Run(command(world, "pretrain", tmp_path / "run", *settings)).succeed()
