"""Shared parts of the tests of imports and exports: a target with heads beside it, foreign heads, file comparison."""

import json

import pytest
import torch
from conftest import save_tiny_target
from interop.cases import CASES, random_head
from safetensors.torch import load_file, save_file

from draft.errors import UserError
from draft.heads.checkpoint import load_head, save_head
from draft.interop.exporting import export_head
from draft.interop.importing import import_head

# heads of the tests: options of `random_head`
HEADS = {
    **CASES,
    "EAGLE-1": {"architecture": "eagle"},
    "EAGLE-1, fc_bias": {"architecture": "eagle", "fc_bias": True},
    "EAGLE-1, qkv_bias": {"architecture": "eagle", "qkv_bias": True},
    "Medusa": {"architecture": "medusa"},
    "Medusa, full": {"architecture": "medusa", "draft_vocab_size": 259, "num_heads": 2},
    "Medusa, shared": {"architecture": "medusa", "draft_vocab_size": 259, "shared_lm_head": True},
    "Medusa, two layers": {"architecture": "medusa", "num_layers": 2},
}


def make_world(folder):
    """(folder, target): a target in folder/target, and each of HEADS beside it."""
    target = save_tiny_target(folder / "target")
    target.name = str(folder / "target")
    for name, options in HEADS.items():
        about = {"target": target.name, "trained_rows": ["a"]}
        save_head(random_head(target, **options), folder / name, dtype=torch.bfloat16, about=about)
    return folder, target


def files(folder):
    return [(folder / name).read_bytes() for name in ("config.json", "model.safetensors")]


def refused(out, pattern, function, *arguments, **options):
    with pytest.raises(UserError, match=pattern):
        function(*arguments, out, **options)
    assert not out.exists()


class Foreign:
    """A head as another project would publish it, to be changed before it is imported."""

    def __init__(self, world, folder, format="vllm", option="default"):
        self.source, self.target, self.folder = world[0] / option, world[1], folder / "foreign"
        export_head(self.source, format, self.folder)
        (self.folder / "draftsmith.json").unlink()
        self.config = json.loads((self.folder / "config.json").read_text())
        self.tensors = load_file(self.folder / "model.safetensors")
        self.out = folder / "imported"

    def publish(self, file="model.safetensors"):
        """Under this name, as a pickle or as safetensors."""
        (self.folder / "model.safetensors").unlink(missing_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        if file.endswith(".safetensors"):
            save_file({name: value.clone() for name, value in self.tensors.items()}, self.folder / file)
        else:
            torch.save(self.tensors, self.folder / file)

    def taken(self, *words, **options):
        """Import it; its weights are the original's, and the notes have these words. Returns (import, head)."""
        imported = import_head(self.folder, self.target, self.out, **options)
        original, written = (load_file(folder / "model.safetensors") for folder in (self.source, self.out))
        assert original.keys() == written.keys()
        assert all(torch.equal(value, original[name]) for name, value in written.items())
        assert all(word in " ".join(imported.notes) for word in words), imported.notes
        return imported, load_head(self.out)[0]

    def refused(self, pattern, **options):
        refused(self.out, pattern, import_head, self.folder, self.target, **options)
