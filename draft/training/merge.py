"""From a finished run to a head of plain linear weights, judged as the file that was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from draft.afa import load_afa_adapter, merge_adapter
from draft.errors import UserError
from draft.files import atomic_folder, read_json
from draft.heads import DraftHead
from draft.heads.checkpoint import HEAD_FILES, head_sha256, load_head, save_head, write_head
from draft.training.run import read_config


@dataclass(frozen=True)
class Merged:
    """Result of a merge."""

    head: Path
    layers: int  # linear layers whose weights changed
    rounding: float  # largest |rounded - exact| over the changed weights, relative to the largest |weight|


def merge_run(run: str | Path, out: str | Path) -> Merged:
    """Write the head that a run trained as plain linear weights: the base head's names, shapes and dtype.

    The sum W + s·B·A is made in float64 and rounded once to the file's dtype; the file is read back and compared
    with it before it takes its place.

    Raises:
        UserError: while the adapter's β is above 0 (naming the step at which it reaches 0), or for a folder that is
            no finished run.
    """
    run, out = Path(run), Path(out)
    if not (run / "about.json").is_file():
        raise UserError(
            f"{str(run)!r} is not a finished run (no about.json); give the --out folder of `draft-train adapt` or "
            "`pretrain`, after it has ended."
        )
    about = read_json(run / "about.json")
    if (run / "head" / "config.json").is_file():
        head, _ = load_head(run / "head")
        save_head(head, out, dtype=head.dtype, about=about)
        return Merged(out, layers=0, rounding=0.0)
    base_head = read_config(run)["model"].get("head")
    if not isinstance(base_head, str):
        raise UserError(f"{str(run)!r} has no head, and its config.yaml names no base head; adapt again.")
    if head_sha256(base_head) != about.get("base_head_sha256"):
        raise UserError(
            f"the head {base_head!r} is not the one that {str(run)!r} was trained on: its weights have changed since; "
            "restore it, or adapt again."
        )
    base, _ = load_head(base_head)
    stored = base.dtype
    before = {name: value.clone() for name, value in base.state_dict().items()}
    # the wide copy is the exact sum; only writing it rounds
    wide = merge_adapter(load_afa_adapter(base.double(), run / "adapter", is_trainable=False))
    assert isinstance(wide, DraftHead)
    exact = {name: value.clone() for name, value in wide.state_dict().items()}
    with atomic_folder(out, HEAD_FILES) as temporary:
        write_head(wide, temporary, dtype=stored, about=about)
        layers, rounding = _verify(temporary, before, exact)
    return Merged(out, layers, rounding)


def _verify(folder: Path, before: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[int, float]:
    """Read the file back: same names, finite, the exact sum rounded once."""
    written = load_file(folder / "model.safetensors")
    if set(written) != set(before):
        raise UserError("the merged head has other tensors than its base head; nothing was written.")
    changed, rounding = 0, 0.0
    for name, value in written.items():
        if not value.is_floating_point():
            continue
        if not torch.equal(value, exact[name].to(value.dtype)) or not torch.isfinite(value).all():
            raise UserError(f"tensor {name}, read back, is not the finite sum that was computed; nothing was written.")
        if not torch.equal(value, before[name]):
            changed += 1
            rounding = max(rounding, float((value.double() - exact[name]).abs().max() / exact[name].abs().max()))
    return changed, rounding
