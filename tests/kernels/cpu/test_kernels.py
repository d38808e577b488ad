"""The CPU kernels together: threads, torch.compile, what operators say of themselves, and how they are built."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cpu_cases import HALF, attend, random_case
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from cpu_kernels import KernelsUnavailable, build, pack_linears, set_threads, slot_attention
from cpu_kernels.ops import pack, packed_linear, threads


def test_threads_do_not_change_bits():
    packed, x = pack(torch.randn(1000, 300).to(HALF)), torch.randn(20, 300)
    case = random_case(seed=3, count=12)
    results = []
    for count in (1, 2, 5):
        set_threads(count)
        assert threads() == count
        for _ in range(20):  # workers that sleep, spin and start
            results.append((packed_linear(x, packed, 1000), attend(case)))
    for a, b in pairwise(results):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# -- torch.compile -----------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Three layers of attention over slots that are views of two tensors, keys and values, as in the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(64, 128) for _ in range(3))
        # [layers, slots, heads, entries, width]; were keys and values one tensor, inductor would copy the values
        self.keys, self.values = (torch.zeros(3, 2, 2, 64, 16) for _ in range(2))
        self.slots = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))

    def forward(self, x: Tensor, positions: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        for project, slots in zip(self.linears, self.slots, strict=True):
            q, k, v = (part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in project(x).split([64, 32, 32], dim=-1))
            x = x + slot_attention(q, k, v, *slots, positions, segments, mask, 0.25).flatten(2)
        return x


@torch.inference_mode()
def test_compiled_in_one_graph_without_copies_of_the_slots():
    torch.manual_seed(0)
    eager, compiled = Layers(), Layers()
    compiled.load_state_dict(eager.state_dict())
    for layers in (eager, compiled):
        pack_linears(layers, HALF)
    step = torch.compile(compiled, fullgraph=True, dynamic=True)
    past = 0
    for count in (5, 8, 3):
        inputs = (torch.randn(1, count, 64), torch.arange(past, past + count))
        segments = torch.tensor([[1, past, past, 0, count]])
        mask = torch.empty(count, 0, dtype=torch.bool)
        got, code = run_and_get_code(step, *inputs, segments, mask)
        torch.testing.assert_close(got, eager(*inputs, segments, mask), rtol=1e-5, atol=1e-5)
        for text in code:  # what is written is an input of the graph itself, not a copy of it
            calls = re.findall(r"slot_attention\.default\(.*?, ((?:\w+, ){5})0\.25", text)
            assert len(calls) == 3 and all(re.fullmatch(r"(arg\d+_1, ){5}", call) for call in calls)
        past += count
    for got, expected in ((compiled.keys, eager.keys), (compiled.values, eager.values)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert got[:, 1, :, :past].all() and not got[:, 1, :, past:].any() and not got[:, 0].any()


def test_operators_say_truly_what_they_change_and_return():
    case = random_case(seed=8, count=3)
    torch.library.opcheck(torch.ops.draftsmith.slot_attention.default, tuple(case.values()))
    packed = pack(torch.randn(20, 10))
    torch.library.opcheck(torch.ops.draftsmith.packed_linear.default, (torch.randn(3, 10), packed, 20, torch.randn(20)))
    torch.library.opcheck(torch.ops.draftsmith.pack.default, (torch.randn(20, 10),))


# -- threads and building ----------------------------------------------------------------------------------------------


def test_two_python_threads_may_call_at_once():
    set_threads(3)
    packed, x = pack(torch.randn(2000, 200)), torch.randn(4, 200)
    expected, wrong = packed_linear(x, packed, 2000), []

    def work() -> None:
        for _ in range(100):
            if not torch.equal(packed_linear(x, packed, 2000), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_process_ends_and_forks_while_workers_exist():
    code = """
import os, torch
from cpu_kernels.ops import load_kernels, pack, packed_linear, set_threads
from draft.files import cache_folder
load_kernels(cache_folder())
set_threads(3)
packed, x = pack(torch.randn(2000, 200)), torch.randn(4, 200)
expected = packed_linear(x, packed, 2000)
child = os.fork()
assert torch.equal(packed_linear(x, packed, 2000), expected)
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("both")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment())
    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr


def environment() -> dict[str, str]:
    root = Path(__file__).parents[3]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}


def test_a_missing_or_failing_compiler_is_one_sentence(monkeypatch, tmp_path):
    failing = tmp_path / "g++"
    failing.write_text("#!/bin/sh\necho 'some note' >&2; echo 'kernels.cpp:1: error: no such thing' >&2; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(KernelsUnavailable, match="could not compile.*error: no such thing.*set "):
        build.built_library(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["g++"]
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(KernelsUnavailable, match="install g"):
        build.built_library(tmp_path)
