"""The `speculators` package loads our exports, and its forward pass gives our logits. Imports nothing of ours.

    python tests/interop/check_speculators.py FOLDER TABLE

FOLDER is what `prepare` wrote; TABLE the JSON file that gets the names, shapes and keys which were loaded. Exit status
1: some head was not loaded whole, or computed otherwise.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from foreign import write_table
from safetensors.torch import load_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from torch import Tensor

TOLERANCE = 2e-5  # of the largest logit: both compute in float32
# what only its training reads, from the target
FROM_THE_TARGET = {"verifier_lm_head.weight", "verifier_norm.weight"}


def main(folder: Path, table: Path) -> int:
    """Check every case; write the table when all agree."""
    warnings.filterwarnings("ignore")
    rows: dict[str, Any] = {}
    failed = False
    for export in sorted((folder / "speculators").iterdir()):
        rows[export.name], amiss, difference = check(export, load_file(folder / f"{export.name}.safetensors"))
        good = difference <= TOLERANCE and not amiss
        failed |= not good
        print(f"{'ok  ' if good else 'FAIL'} {export.name:22} logits differ by {difference:.1e} {amiss or ''}")
    if not failed:
        del rows["bundled"]  # the tests have the tiny ones
        write_table(table, "speculators", version("speculators"), rows)
    return int(failed)


def check(export: Path, case: dict[str, Tensor]) -> tuple[dict[str, Any], set[str], float]:
    """Return (the loaded export, tensors that one of the two lacks, the largest difference of logits, relatively)."""
    config = Eagle3SpeculatorConfig.from_pretrained(export)
    config.transformer_layer_config._attn_implementation = "eager"  # of those it has, the one for a CPU
    model = Eagle3DraftModel.from_pretrained(export, config=config, dtype=torch.float32).eval()
    file = load_file(export / "model.safetensors")
    state, written = model.state_dict(), json.loads((export / "config.json").read_text())
    row = {
        "tensors": {name: list(state[name].shape) for name in sorted(set(file) & set(state))},
        "config": {
            key: getattr(config, key)
            for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "draft_vocab_size")
        },
        "keys": sorted(written),
        "layer_keys": sorted(written["transformer_layer_config"]),
    }
    return row, (set(file) ^ set(state)) - FROM_THE_TARGET, difference(model, case)


def difference(model: Eagle3DraftModel, case: dict[str, Tensor]) -> float:
    """Compare the logits; its input i is our entry i: the state of token i, beside token i + 1."""
    ids, theirs = case["ids"], list[Tensor]()
    model.lm_head.register_forward_hook(lambda module, args, output: theirs.append(output))
    steps = sum(name.startswith("logits.") for name in case)
    with torch.no_grad():
        model(
            hidden_states=case["auxiliary"][:, :-1],
            input_ids=ids[:, 1:],
            document_ids=torch.zeros_like(ids[:, 1:]),
            ttt_steps=steps,
        )
    worst = 0.0
    for step, logits in enumerate(theirs):
        ours = case[f"logits.{step}"][:, : ids.shape[1] - 1 - step]  # beyond, there is no token to read
        gap = (logits[:, : ours.shape[1]] - ours).abs().max() / ours.abs().max()
        worst = max(worst, float(gap))
    return worst


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
