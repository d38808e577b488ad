"""Runs of benchmarks.acceptance_length on folders, as a user has them."""

import json
from pathlib import Path
from typing import Any

from benchmarks import acceptance_length


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(models: Path, out: Path, *options: str, heads: tuple[str, ...] = ("first",)) -> int:
    named = [part for head in heads for part in ("--head", str(models / head))]
    common_options = ["--target", str(models / "target"), *named, "--dtype", "float64", "--out", str(out)]
    return acceptance_length.main([*common_options, "--max-new-tokens", "12", *options])
