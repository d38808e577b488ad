"""A run's folder whose files are damaged is named, and nothing is written."""

import json

import pytest
import torch
from conftest import make_tiny_head, make_tiny_target

from draft.errors import UserError
from draft.heads.checkpoint import head_sha256, save_head
from draft.training.merge import merge_run


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("about.json", "[]", "about.json' holds a list"),
        ("about.json", "{}", "is not the one that"),
        ("config.yaml", "\0", "config.yaml' is missing or damaged"),
        ("config.yaml", "model: 3", "config.yaml' is missing or damaged"),
        ("config.yaml", None, "config.yaml' is missing or damaged"),
        ("config.yaml", "model: {head: null}", "names no base head"),
    ],
)
def test_a_damaged_run_is_named(tmp_path, name, content, words):
    head, run = tmp_path / "head", tmp_path / "run"
    save_head(make_tiny_head(make_tiny_target()), head, dtype=torch.float64, about={})
    run.mkdir()
    (run / "about.json").write_text(json.dumps({"base_head_sha256": head_sha256(head)}))
    (run / "config.yaml").write_text(f"model: {{head: {head}}}")
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(UserError, match=words):
        merge_run(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
