"""Values of settings as a file or a command line has them: YAML, checked against a field's type."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from draft.errors import UserError

# what looks like a date and is none (2020-13-45) is a ValueError and not a YAMLError; so is a file that is no UTF-8


def read_sections(path: Path | None, known: Iterable[str]) -> dict[str, Any]:
    """A configuration file; empty without one."""
    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"config {str(path)!r} could not be read ({str(error).splitlines()[0]}).") from error
    if not isinstance(values, dict):
        raise UserError(f"config {str(path)!r} must hold sections: {', '.join(known)}.")
    return values


def read_value(override: str, text: str) -> Any:
    """The YAML `text` of an override, which is named in the error."""
    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"override {override!r}: the value is not YAML; quote it.") from error


def convert(name: str, value: Any, kind: Any) -> Any:
    """Check a value against a field's type; integers pass for floats, and 1e-3 (a string to YAML) too."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    wanted = next(option for option in options if option is not type(None))
    if typing.get_origin(wanted) is list:
        (item_kind,) = typing.get_args(wanted)
        if isinstance(value, (list, tuple)) and all(isinstance(item, item_kind) for item in value):
            return list(value)
    elif wanted is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool):
        return value
    kind_name = "finite number" if wanted is float else getattr(wanted, "__name__", wanted)
    raise UserError(f"{name} = {value!r} is not of type {kind_name}; correct the value.")
