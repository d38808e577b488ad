"""What the tests of imports and exports share: a target on disk with heads beside it, and how files are compared."""

from __future__ import annotations

import pytest
import torch
from conftest import save_tiny_target
from interop.cases import random_head

from draft.errors import UserError
from draft.heads.checkpoint import save_head


def make_world(folder, cases):
    """(folder, target): the target in folder/target, and for each name and its options a head in folder/name."""
    target = save_tiny_target(folder / "target")
    target.name = str(folder / "target")
    for name, options in cases.items():
        about = {"target": target.name, "trained_rows": ["a"]}
        save_head(random_head(target, **options), folder / name, dtype=torch.bfloat16, about=about)
    return folder, target


def files(folder):
    return [(folder / name).read_bytes() for name in ("config.json", "model.safetensors")]


def refused(out, pattern, function, *arguments, **options):
    with pytest.raises(UserError, match=pattern):
        function(*arguments, out, **options)
    assert not out.exists()
