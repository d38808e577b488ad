"""schemathesis against /openapi.json: no 5xx, and nothing that the schema does not promise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from http_testing import live
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving.api.app import create_app
from serving.api.limits import Limits
from serving.engine import Engine

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
PATHS = ["/generate", "/generate_stream", "/", "/v1/completions", "/v1/chat/completions", "/v1/models",
         "/v1/models/{name}", "/health", "/ready", "/info", "/metrics", "/tokenize"]  # fmt: skip


@pytest.fixture(scope="module")
def operations(tiny_target) -> Iterator[dict]:
    app = create_app(Engine(tiny_target, max_batch=64, max_length=256), limits=Limits(max_new_tokens=2))
    with live(app) as url:
        schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
        found = [result.ok() for result in schema.get_all_operations()]
        yield {operation.path: operation for operation in found}


def test_every_path_is_tried(operations) -> None:
    assert set(PATHS) == set(operations)


@pytest.mark.parametrize("path", PATHS)
def test_the_service_does_what_its_schema_says(operations, path) -> None:
    operation = operations[path]
    modes = [GenerationMode.POSITIVE] + ([GenerationMode.NEGATIVE] if operation.body else [])
    for mode in modes:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=10 if operation.body else 3,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # shrinking would cost minutes
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def check(case) -> None:
            case.call_and_validate(checks=CHECKS, timeout=60)

        check()
