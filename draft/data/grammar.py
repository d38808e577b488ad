"""The grammar of made prompts: slots, forms and lists of prompt_grammar.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

_FILE = Path(__file__).with_name("prompt_grammar.yaml")


@dataclass(frozen=True)
class Kind:
    """A kind of prompt: its default share, and its forms."""

    share: float
    forms: list[str]
    loose: bool  # people write these in many manners: greetings, typing errors


@dataclass(frozen=True)
class Grammar:
    """The contents of the file; the file itself says what they mean."""

    slots: dict[str, list[str]]
    kinds: dict[str, Kind]
    lists: dict[str, list[str]]


@cache
def grammar() -> Grammar:
    """The grammar that ships."""
    content = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    slots, lists = (
        {name: [each.strip() for each in values.split("|")] for name, values in content[part].items()}
        for part in ("slots", "lists")
    )
    kinds = {}
    for name, kind in content["kinds"].items():
        forms = [form.replace("\\n", "\n") for form in kind["forms"].splitlines()]
        kinds[name] = Kind(kind["share"], forms, kind.get("loose", False))
    return Grammar(slots, kinds, lists)
