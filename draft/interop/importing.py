"""Import: heads of other trainers, brought to our one folder format, or refused with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft.errors import UserError
from draft.heads import DraftHead, Eagle3Head, EagleHead, MedusaHead
from draft.heads.checkpoint import attach_head, fill, save_head
from draft.interop.eagle import EAGLE_SOURCES
from draft.interop.eagle3 import EAGLE3_SOURCES
from draft.interop.medusa import MEDUSA_SOURCES
from draft.interop.sources import Checkpoint, Source, one_dtype, read_checkpoint
from draft.target import Target

# formats that heads of an architecture are imported from; the first that recognises a checkpoint reads it
SOURCES: dict[type[DraftHead], tuple[Source, ...]] = {
    Eagle3Head: EAGLE3_SOURCES,
    EagleHead: EAGLE_SOURCES,
    MedusaHead: MEDUSA_SOURCES,
}


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    head: Path
    kind: str
    notes: list[str]  # sentences: what was filled in, left out or assumed


def import_head(
    source: str | Path, target: Target, out: str | Path, *, auxiliary_layers: list[int] | None = None
) -> Imported:
    """Write the head in the folder `source` as a head for `target`, bit for bit in its own dtype.

    auxiliary_layers: the target's layers that an EAGLE-3 head was trained on, counted as layers that have run; for
    heads whose config.json leaves that open, or is wrong.

    Raises:
        UserError: for an unknown format, or a head that doesn't fit the target, naming both values.
    """
    found = read_checkpoint(source)
    architecture, kind = _recognise(found)
    values = kind.translate(found, target, auxiliary_layers)
    head = architecture(architecture.config_class.from_dict(values))
    dtype = one_dtype(found)
    head.to(dtype)
    fill(head, found.tensors, str(source))
    attach_head(head, {}, target)
    about = {**found.about, **_made_for(found, target), "imported_as": kind.name}
    save_head(head, out, dtype=dtype, about=about)
    return Imported(Path(out), kind.name, found.notes)


def _made_for(found: Checkpoint, target: Target) -> dict[str, Any]:
    """The target that draftsmith.json is to name: this one, unless one of our exports says which it was."""
    keys = ("target", "target_fingerprint", "target_adapter")
    before = found.about.get("target_fingerprint")
    if before and before != target.fingerprint:
        found.notes.append(
            f"it was made for target {found.about.get('target')!r} with fingerprint {before}, and {target.title} has "
            f"{target.fingerprint}: it stays a head for that one; adapt it to this one with `draft-train adapt "
            "--other-target`."
        )
        return {key: found.about.get(key) for key in keys}
    adapter = target.adapter and str(target.adapter.folder.resolve())
    return dict(zip(keys, (target.name, target.fingerprint, adapter), strict=True))


def _recognise(found: Checkpoint) -> tuple[type[DraftHead], Source]:
    """The first that recognises a checkpoint reads it."""
    for head, sources in SOURCES.items():
        for kind in sources:
            if kind.recognise(found):
                return head, kind
    names = (found.config.get("architectures") or ["none"])[0]
    known = [kind.name for sources in SOURCES.values() for kind in sources]
    raise UserError(
        f"{str(found.folder)!r} (architecture {names}, tensors {', '.join(sorted(found.tensors)[:3])}, ...) is in none "
        f"of the formats {'; '.join(known)}."
    )
