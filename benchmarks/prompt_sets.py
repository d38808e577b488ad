"""Prompts for the benchmarks: ours, or a JSONL file in the form of MT-bench or Spec-Bench."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.provenance import ROOT
from draft.errors import UserError

PROMPTS = Path(__file__).resolve().parent / "prompts"
_PROMPT_COLUMNS = ("turns", "prompt", "question")


@dataclass(frozen=True)
class Prompt:
    """One conversation to decode: the user's turns, in order."""

    id: str
    category: str
    turns: tuple[str, ...]


@dataclass(frozen=True)
class PromptSet:
    """Prompts with the files that they came from; `sha256` is of the files' bytes, in this order."""

    prompts: list[Prompt]
    files: list[str]
    sha256: str


def load_prompts(file: str | Path | None = None, limit: int | None = None) -> PromptSet:
    """Read a JSONL file of prompts, or all of benchmarks/prompts/*.jsonl.

    A line has `turns` (a list of strings; MT-bench, Spec-Bench) or one string in `prompt` or `question`. `id` or
    `question_id` names it (default: file name and line number), and `category` groups it (default: the file's name).
    Categories take turns in the result, so that `limit`, or an interrupted run, covers all of them.

    Raises:
        UserError: with the file, the line's number and what is wrong there.
    """
    files = [Path(file)] if file is not None else sorted(PROMPTS.glob("*.jsonl"))
    if not files:
        raise UserError(f"no prompts in {str(PROMPTS)!r}; pass --prompts FILE.")
    digest = hashlib.sha256()
    seen: dict[str, str] = {}
    by_category: dict[str, list[Prompt]] = {}
    for path in files:
        content = _read(path)
        digest.update(content)
        # not str.splitlines(): JSON strings may hold U+2028 and the like, which end no line of a JSONL file
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                prompt = _parse_prompt(line, where, default_id=f"{path.stem}-{number}", default_category=path.stem)
                if prompt.id in seen:
                    raise UserError(
                        f"{where}: id {prompt.id!r} was used at {seen[prompt.id]}; give each prompt its own id."
                    )
                seen[prompt.id] = where
                by_category.setdefault(prompt.category, []).append(prompt)
    rounds = itertools.zip_longest(*by_category.values())
    prompts = [prompt for together in rounds for prompt in together if prompt is not None]
    if not prompts:
        raise UserError(f"{files[0]} has no prompts; write one JSON object a line, with a `turns` list.")
    # ours without the place of the checkout: results are published
    names = [str(path if file is not None else path.relative_to(ROOT)) for path in files]
    return PromptSet(prompts[:limit], names, digest.hexdigest())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"prompts {str(path)!r} cannot be read ({error.strerror}); pass a JSONL file.") from error


def _parse_prompt(line: bytes, where: str, *, default_id: str, default_category: str) -> Prompt:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); write one JSON object a line.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__} and not a JSON object; write one object a line.")
    column = next((name for name in _PROMPT_COLUMNS if row.get(name) is not None), None)
    if column is None:
        found = ", ".join(row) or "nothing"
        raise UserError(
            f"{where}: has {found}, and none of {', '.join(_PROMPT_COLUMNS)}; add a `turns` list of strings."
        )
    turns = row[column] if isinstance(row[column], list) else [row[column]]
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{where}: `{column}` must be text, or a list of non-empty texts; correct that line.")
    if any("\ud800" <= character <= "\udfff" for turn in turns for character in turn):
        raise UserError(f"{where}: `{column}` holds half a surrogate pair and so is not text; correct that line.")
    names = [row[name] for name in ("id", "question_id") if row.get(name) is not None]
    category = default_category if row.get("category") is None else str(row["category"])
    return Prompt(str(names[0]) if names else default_id, category, tuple(turns))
