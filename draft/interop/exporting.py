"""Export: a head as the folder that another engine loads, checked against that engine's rules before it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draft.errors import UserError
from draft.files import atomic_folder, write_json
from draft.heads import DraftHead, Eagle3Head, EagleHead, MedusaHead
from draft.heads.checkpoint import HEAD_FILES, load_head
from draft.interop.checks import problems, target_shape
from draft.interop.eagle import EAGLE_FORMATS, EAGLE_NO_FORMAT
from draft.interop.eagle3 import EAGLE3_FORMATS
from draft.interop.formats import NAMES, Format
from draft.interop.medusa import MEDUSA_FORMATS, MEDUSA_NO_FORMAT
from draft.interop.served_targets import accepted_by

_FILES = HEAD_FILES | {"medusa_lm_head.pt"}


# by the head's class: the formats that it is exported in by name, and why it is not in others
FORMATS: dict[type[DraftHead], tuple[Mapping[str, Format], Mapping[str, str]]] = {
    Eagle3Head: (EAGLE3_FORMATS, {"medusa": "it is for Medusa heads"}),
    EagleHead: (EAGLE_FORMATS, EAGLE_NO_FORMAT),
    MedusaHead: (MEDUSA_FORMATS, MEDUSA_NO_FORMAT),
}


@dataclass(frozen=True)
class Exported:
    """What an export did."""

    folder: Path
    commands: dict[str, str]  # engine -> how to serve the target with the head
    notes: list[str]  # which engines accept such a target


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
    if format not in NAMES:
        raise UserError(f"--format {format!r} is unknown; choose one of {', '.join(NAMES)}.")
    loaded, about = load_head(head)
    how = _format(loaded, format, str(head))
    name = target or about.get("target")
    if not name:
        raise UserError(f"head {str(head)!r} does not say which target it was made for; pass --target.")
    shape, out = target_shape(name), Path(out)
    config = how.config(loaded, loaded.dtype, shape, speculation_length)
    tensors = how.tensors(loaded, shape)
    found = problems(how.rules, how.flat(config), tensors, shape)
    if found:
        raise UserError(f"head {str(head)!r} can't be exported as {format}: {'; '.join(found)}.")
    with atomic_folder(out, _FILES) as temporary:
        how.write(tensors, temporary / how.file)
        (temporary / how.file).chmod(0o644)
        write_json(temporary / "config.json", config)
        write_json(temporary / "draftsmith.json", about)  # other engines don't read it; an import keeps it
    commands = {engine: command(out, shape, speculation_length) for engine, command in how.commands(loaded).items()}
    method = loaded.architecture
    commands, notes = accepted_by(commands, shape.architecture, about, method)
    return Exported(out, commands, notes + _limited(how, config, commands))


def _limited(how: Format, config: dict[str, Any], commands: dict[str, str]) -> list[str]:
    """Leave out the commands of engines that lack what the head needs, in place; returns sentences about them."""
    notes = []
    for engine in [engine for engine in how.limits if engine in commands]:
        name = engine.split(" (")[0]
        lacking, untried = how.limits[engine](config)
        if lacking:
            del commands[engine]
            notes.append(f"{name}: {'; '.join(lacking)}, so there is no command for it.")
        notes += [] if lacking else [f"{name}: {each}." for each in untried]
    return notes


def _format(head: DraftHead, format: str, name: str) -> Format:
    formats, no_format = FORMATS[type(head)]
    if format not in formats:
        reason = no_format.get(format, f"nothing reads {head.architecture} heads in it")
        raise UserError(
            f"head {name!r} of architecture {head.architecture} can't be exported as {format}: {reason}; use --format "
            f"{' or '.join(formats)}."
        )
    return formats[format]
