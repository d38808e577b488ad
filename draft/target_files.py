"""Where the files of a target are, and why they could not be loaded."""

from __future__ import annotations

from pathlib import Path

from draft.bundled import BUNDLED_TARGET, bundled_target_folder
from draft.errors import UserError


def locate(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` should read for a target's name."""
    if name == BUNDLED_TARGET:
        return str(bundled_target_folder()), {}
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"target {name!r}: no such file; give the path of an existing .gguf file.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"target {name!r}: the folder has no config.json; give a folder that save_pretrained wrote.")
    return str(path) if path.is_dir() else name, {}


def why_not_loaded(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if isinstance(error, OSError) and not Path(name).expanduser().exists():
        return (
            f"target {name!r} is neither a folder here nor reachable on the hub ({reason}); on a machine with "
            f"network run `hf download {name}`, or pass a local folder, a .gguf file or `{BUNDLED_TARGET}`."
        )
    return f"target {name!r} could not be loaded ({reason}); pass a causal language model that transformers supports."
