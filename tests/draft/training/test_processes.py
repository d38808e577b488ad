"""Two gloo processes on the CPU train what one process trains at an equal global batch, sharded or not."""

import signal

import pytest
import torch
from conftest import ended, python
from http_testing import eventually
from torch.distributed import TCPStore
from training_runs import Run, command, group_environment, last_step, logged, run_group, weights

from draft.training.run import latest_snapshot

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
KINDS = {"ddp": {}, "fsdp2": SHARDED}
# torchrun would give the processes the name of this machine, which need not be known where there is no network
STANDALONE = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
RECIPE = ["--optimizer", "muon", "--weight-average", "0.9"]  # what `pretrain` takes by default, without FSDP2
SETTINGS = ["--max-steps", "9", "--save-every", "2", "--keep-checkpoints", "9"]


@pytest.fixture(scope="module")
def world(made):
    """Data of an odd number of batches, a base head, and what one process makes of it with twice the accumulation."""
    for mode in ("pretrain", "adapt"):
        Run(command(made, mode, made / mode, *SETTINGS, "--gradient-accumulation", "2")).succeed()
    return made


def assert_same_run(folder, reference):
    curve, expected = logged(folder), logged(reference)
    assert curve.keys() == expected.keys()
    assert list(curve.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    assert logged(folder, "beta") == logged(reference, "beta")
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=2e-4, rtol=0, msg=name)


# accelerate's own accumulation divides no loss: ours is divided by the positions of all batches
ACCELERATE = (
    "accelerate.commands.launch --num_machines 1 --num_processes 2 --main_process_ip 127.0.0.1 --main_process_port 0 "
    "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --gradient_accumulation_steps 4 "
    "--mixed_precision no --dynamo_backend no"
)


@pytest.mark.parametrize(
    ("launcher", "mode"), [(["torch.distributed.run", *STANDALONE], "pretrain"), (ACCELERATE.split(), "adapt")]
)
def test_launchers(world, tmp_path, launcher, mode):
    words = ["-m", *launcher, "-m", "draft.cli", *command(world, mode, tmp_path / "run", *SETTINGS)]
    status, shown = ended(python(*words))
    assert status == 0 and shown.count("Wrote") == 1 and "in 2 processes" in " ".join(shown.split()), shown
    assert_same_run(tmp_path / "run", world / mode)


LEAVING = """
import torch, torch.distributed as dist
from draft import cli
from draft.errors import UserError

def exchange():
    dist.init_process_group("gloo")
    dist.barrier()
    for _ in range(100):
        dist.broadcast(torch.zeros(1000), 0, async_op=True)
    raise UserError("enough")

cli.app, cli.SECONDS_FOR_PROCESS_0 = exchange, 0
cli.main()
"""


def test_a_process_that_leaves_does_not_abort():
    """Python's own end would meet gloo's threads while they drop tensors: half of these processes aborted with it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = group_environment(store, 4)
    for process in [python("-c", LEAVING, **shared, RANK=str(rank)) for rank in range(4)]:
        status, shown = ended(process)
        assert status == 2 and "draft-train: enough" in shown and "terminate called" not in shown, shown


@pytest.mark.parametrize(
    ("kind", "mode", "architecture", "accumulation", "more"),
    [
        ("ddp", "adapt", "eagle3", 2, []),
        ("fsdp2", "pretrain", "eagle3", 2, []),
        ("ddp", "pretrain", "medusa", 1, []),
        ("fsdp2", "pretrain", "eagle", 1, []),
        ("ddp", "pretrain", "eagle", 2, RECIPE),
    ],
)
def test_two_processes_train_what_one_trains(world, tmp_path, kind, mode, architecture, accumulation, more):
    """Gradients of a step's first batches stay where they are, and its last one sums them over the processes."""
    settings = [*SETTINGS, *more]
    together, alone = (
        command(world, mode, tmp_path / name, *settings, "--gradient-accumulation", count, architecture=architecture)
        for name, count in (("together", str(accumulation)), ("alone", str(2 * accumulation)))
    )
    for run in (*run_group(together, **KINDS[kind]), Run(alone)):
        run.succeed()
    assert_same_run(tmp_path / "together", tmp_path / "alone")


KEPT = """
import gc, os, weakref
import torch
from draft.training.distributed import Processes

groups, end, leave = [], Processes.end, os._exit

def noting(processes):
    groups.append(weakref.ref(torch.distributed.group.WORLD))
    end(processes)

def leaving(status):
    gc.collect()
    print("groups that are kept:", [group() is not None for group in groups], flush=True)
    leave(status)

Processes.end, os._exit = noting, leaving
"""


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_and_a_group_that_outlives_its_run(world, tmp_path, kind):
    """A group that went with the trainer would wait for gloo's threads with the interpreter's lock held, now and then
    for ever."""
    arguments = command(world, "pretrain", tmp_path / "run", *SETTINGS, "--dtype", "bfloat16")
    for run in run_group(arguments, script=KEPT, **KINDS[kind]):
        assert "groups that are kept: [True]" in run.succeed().output()
    curve, expected = logged(tmp_path / "run"), logged(world / "pretrain")
    assert curve.keys() == expected.keys()
    assert list(curve.values()) == pytest.approx(list(expected.values()), rel=0.03)
    assert curve != expected


@pytest.mark.parametrize(("kind", "mode"), [("ddp", "pretrain"), ("fsdp2", "adapt")])
def test_a_killed_group_goes_on(world, tmp_path, kind, mode):
    """And so does one process with twice the accumulation, from the group's checkpoint."""
    out = tmp_path / "run"
    group = run_group(command(world, mode, out, *SETTINGS), signalled=(5, signal.SIGKILL), **KINDS[kind])
    assert group[0].wait() == -signal.SIGKILL
    group[1].process.kill()
    group[1].wait()
    assert latest_snapshot(out / "checkpoints").name == "step-0000004"
    for run in run_group(command(world, mode, out, *SETTINGS), **KINDS[kind]):
        run.succeed()
    assert_same_run(out, world / mode)
    alone = command(world, mode, out, *SETTINGS, "--gradient-accumulation", "2")
    assert "Continuing" in Run(alone).succeed().output()
    refused = Run(command(world, mode, out, *SETTINGS))
    assert refused.wait() == 2 and "was begun with 2 batches a step and this command has 1" in refused.output()


def test_a_signal_to_one_process_ends_all(world, tmp_path):
    first, second = run_group(command(world, "pretrain", tmp_path / "run", "--max-steps", "500"))
    eventually(lambda: last_step(tmp_path / "run") >= 2 or not first.process.is_alive())
    second.process.terminate()
    assert (first.wait(), second.wait()) == (143, 143), first.output() + second.output()
    assert f"saved after step {last_step(tmp_path / 'run')}" in first.output()
    assert all(line.startswith("[W") for line in second.output().splitlines())  # torch's own sockets warn


@pytest.mark.parametrize(
    ("environment", "limit", "words"),
    [({}, 60_000, "could not be written"), ({**SHARDED, "FSDP_VERSION": "1"}, None, "add --fsdp_version 2")],
)
def test_a_full_disk_and_the_first_fsdp_end_all_with_one_sentence(world, tmp_path, environment, limit, words):
    at_once = "from draft import cli; cli.SECONDS_FOR_PROCESS_0 = 0"  # no launcher ends the second process here
    arguments = command(world, "pretrain", tmp_path / "run", *SETTINGS)
    group = run_group(arguments, file_size=limit, script=at_once, **environment)
    assert [run.wait() for run in group] == [2, 2]
    assert all(words in run.output() and "Traceback" not in run.output() for run in group)
