"""The CPU kernels together: threads, the schemas of operators, and building."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from cpu_cases import HALF, attend, random_case

from cpu_kernels import KernelsUnavailable, build, set_threads
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


def test_operators_say_truly_what_they_change_and_return():
    case = random_case(seed=8, count=3)
    operators, packed = torch.ops.draftsmith, pack(torch.randn(20, 10))
    for operator, arguments in (
        (operators.slot_attention.default, tuple(case.values())),
        (operators.packed_linear.default, (torch.randn(3, 10), packed, 20, torch.randn(20))),
        (operators.pack.default, (torch.randn(20, 10),)),
    ):
        torch.library.opcheck(operator, arguments, test_utils="test_schema")


def test_two_python_threads_may_call_at_once():
    set_threads(3)
    packed, x = pack(torch.randn(2000, 200)), torch.randn(4, 200)
    expected = packed_linear(x, packed, 2000)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(packed_linear, x, packed, 2000) for _ in range(300)]
    assert all(torch.equal(call.result(), expected) for call in calls)


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
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode, done.stdout) == (0, "both\n"), done.stderr


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
