"""/openapi.json is a plain schema that the answers match: schemathesis, as outsiders run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import make_tiny_target
from http_testing import live

from serving.api.app import create_app
from serving.api.service import Limits
from serving.engine import Engine

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_schemathesis_finds_no_server_error_and_no_answer_beside_the_schema(tmp_path) -> None:
    engine = Engine(make_tiny_target(max_length=2048), max_batch=16)
    with live(create_app(engine, limits=Limits(max_new_tokens=2))) as url:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--no-color"]
        limits = ["--checks", CHECKS, "--max-examples", "3", "--seed", "1"]
        run = subprocess.run([*command, *limits], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "Tested: 12" in run.stdout, run.stdout[-5000:]
