"""Layers that are compiled before the first request serve every batch that comes."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target
from torch._dynamo.utils import counters

from serving.engine import Engine, SamplingParams, Speculation, setup


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_no_request_waits_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    # what makes a graph be built again is the tracer's affair; C++ code for the graphs would only take its time
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    # as for targets that the C++ pass over all layers does not know
    monkeypatch.setattr(setup, "fuse_target", lambda _: False)
    monkeypatch.setattr(setup, "fuse_head", lambda _: False)
    torch._dynamo.reset()
    target = make_tiny_target(dtype=torch.float32)
    head = make_tiny_head(target)
    eager = Engine(target, head, mode="eager", speculation="tree", tree_size=6)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    prompts = [[5, 6, 7], [9] * 20, [8], [30, 31]]
    options = [Speculation(), Speculation(num_tokens=1), Speculation(enabled=False)]
    asked = [(prompts[:count], each) for count in (1, 2, 4) for each in options]
    expected = [[one.token_ids for one in eager.generate(some, params, each)] for some, each in asked]
    engine = Engine(target, head, mode="compiled", speculation="tree", tree_size=6)  # packs the target's weights
    before = graphs()
    engine.warm_up()
    compiled = graphs()
    assert compiled == before + 4  # one token, and any number of them; the target's layer, and the head
    answers = [[one.token_ids for one in engine.generate(some, params, each)] for some, each in asked]
    assert graphs() == compiled
    assert answers == expected
