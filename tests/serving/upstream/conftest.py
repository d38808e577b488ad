"""The built-in server as the server upstream, and the gateway before it."""

import httpx
import pytest
from fastapi.testclient import TestClient
from http_testing import live

from draft.target import TextTarget
from serving.api.app import create_app
from serving.engine import Engine
from serving.upstream import Upstream


@pytest.fixture(scope="session")
def texts(tiny_target):
    """The tiny target without its weights."""
    return TextTarget("tiny", tiny_target.tokenizer, tiny_target.config, tiny_target.vocab_size)


@pytest.fixture(scope="module")
def address(tiny_target, tiny_head):
    """A server that drafts chains of 5."""
    with live(create_app(Engine(tiny_target, {"tiny-head": tiny_head}, speculation="chain"))) as url:
        yield url


@pytest.fixture(scope="module")
def upstream(address, texts):
    upstream = Upstream(address, texts, head_name="tiny-head", poll_seconds=0.3)
    upstream.connect()
    return upstream


@pytest.fixture(scope="module")
def gateway(upstream):
    with TestClient(create_app(upstream)) as client:
        yield client


@pytest.fixture(scope="module")
def direct(address):
    """A client of the server itself."""
    with httpx.Client(base_url=address, timeout=120) as client:
        yield client
