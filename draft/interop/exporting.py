"""Export: a head as the folder that another engine loads, checked against that engine's rules before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from draft.errors import UserError
from draft.files import atomic_folder, write_json
from draft.heads import DraftHead, Eagle3Head, EagleHead, MedusaHead
from draft.heads.checkpoint import HEAD_FILES, load_head
from draft.interop import eagle, eagle3, medusa
from draft.interop.formats import Format, command_lines, problems, target_shape

FORMATS: dict[type[DraftHead], Mapping[str, Format]] = {
    Eagle3Head: eagle3.FORMATS,
    EagleHead: eagle.FORMATS,
    MedusaHead: medusa.FORMATS,
}


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    folder: Path
    commands: dict[str, str]  # engine -> how to serve the target with the head
    notes: list[str]  # sentences for the user


def export_head(
    head: str | Path, format: str, out: str | Path, *, target: str | None = None, speculation_length: int = 3
) -> Exported:
    """Write the head in folder `head` to the folder `out` for other engines, bit for bit in its own dtype.

    target: its name, by default the one that the head was made for; only its config.json is read.
    speculation_length: drafted tokens in the commands, and in the speculators format's config.json.

    Raises:
        UserError: naming everything that an engine of this format would stumble over, or the formats that heads of this
            architecture have; nothing is written then.
    """
    known = list(dict.fromkeys(name for formats in FORMATS.values() for name in formats))
    if format not in known:
        raise UserError(f"--format {format!r} is unknown; choose one of {', '.join(known)}.")
    loaded, about = load_head(head)
    formats = FORMATS[type(loaded)]
    if format not in formats:
        raise UserError(
            f"head {str(head)!r} of architecture {loaded.architecture} can't be exported as {format}: no engine reads "
            f"it so; use --format {' or '.join(formats)}."
        )
    how = formats[format]
    name = target or about.get("target")
    if not name:
        raise UserError(f"head {str(head)!r} does not say which target it was made for; pass --target.")
    shape, out = target_shape(name), Path(out)
    config, tensors = loaded.config.as_json(loaded.dtype), how.tensors(loaded, shape)
    found = list(problems(how, config, tensors, shape))
    if found:
        raise UserError(f"head {str(head)!r} can't be exported as {format}: {'; '.join(found)}.")
    with atomic_folder(out, HEAD_FILES) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o644)
        write_json(temporary / "config.json", how.config(config, shape, speculation_length))
        write_json(temporary / "draftsmith.json", about)  # other engines don't read it; an import keeps it
    notes = how.notes(loaded)
    if about.get("target_adapter"):
        notes.append(
            f"The head is for the target with its adapter {about['target_adapter']!r}: let these engines serve the two "
            "merged (PEFT's merge_and_unload, then save_pretrained), or most drafts are rejected."
        )
    return Exported(out, command_lines(how, loaded, out, shape, speculation_length), notes)
