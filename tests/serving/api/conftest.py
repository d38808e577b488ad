"""Fixtures of the HTTP service's tests."""

import json
import os
from functools import partial

import httpx
import pytest
from fastapi.testclient import TestClient
from http_testing import GatedEngine

from serving.api.app import create_app
from serving.api.middleware import JsonFormatter
from serving.engine import Engine


@pytest.fixture(scope="module")
def client(tiny_target, tiny_head):
    """The service around a float64 target whose head drafts chains of 5, or, for `make interop`, a server."""
    if address := os.environ.get("DRAFTSMITH_CONTRACT_URL"):
        with httpx.Client(base_url=address, timeout=300) as client:
            yield client
        return
    engine = Engine(tiny_target, {"tiny-head": tiny_head}, speculation="chain")
    with TestClient(create_app(engine)) as client:
        yield client


@pytest.fixture
def make_gated(tiny_target, tiny_head):
    """Return a maker of engines of one slot, which take no step before their gate is opened."""
    return partial(GatedEngine, tiny_target, tiny_head, speculation="chain", max_batch=1)


@pytest.fixture
def log_lines(caplog, monkeypatch):
    """Return a function that gives the lines of the server's log so far."""
    monkeypatch.setattr(caplog.handler, "formatter", JsonFormatter())
    caplog.set_level("INFO", "serving")
    return lambda: [json.loads(line) for line in caplog.text.splitlines()]


@pytest.fixture
def gated(make_gated):
    """An engine with a queue of two."""
    return make_gated(max_waiting=2)
