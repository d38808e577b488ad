"""Conversations from files and hub data sets, and prompts that the target writes itself."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from draft.data.conversations import COLUMNS, CONVERSATIONS, RESPONSES, Layout, Record, text_of
from draft.data.dataset import Response, Row, conversation_id
from draft.data.examples import (
    SENTINEL,
    Message,
    check_ids,
    encode_kept,
    encode_text,
    prompt_id,
    render,
    tokenise,
)
from draft.data.generate import Question
from draft.data.records import BadRow, records
from draft.errors import UserError
from draft.target import Target

log = logging.getLogger(__name__)

SELF_PROMPTED = "self-prompted"
_SELF_PROMPT_TOKENS = 80
_SELF_PROMPT_TOP_P = 0.95  # the tail of a prompt's distribution is noise; responses are never cut
_SELF_PROMPT_ROUNDS = 10
_TOKEN_COLUMNS = (("prompt_ids", "response_ids"), ("input_ids", "loss_mask"))


@dataclass(frozen=True)
class Prompt:
    """One conversation to be answered, or kept as it is."""

    source: str
    where: str = ""  # file and line, for messages to the user
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""  # ordinary text without turns, kept as it is
    row: Row | None = None  # tokens as they came, kept as they are


def load_prompts(
    source: str, *, column: str | None = None, keep_responses: bool = False, skipped: Counter[str] | None = None
) -> list[Prompt]:
    """Read conversations from a .jsonl, .json, .csv (also .gz) or .parquet file, or from a hub data set.

    The column is found by name in the first row, unless `column` names it; its values may be texts, lists of user
    turns, or lists of messages with role/content or from/value (columns that are meant for lists may hold them as JSON
    text). A hub data set is `owner/name`, `owner/name:split` (default: train) or `owner/name:configuration:split`.

    skipped: counts the rows that cannot be used by reason; None refuses the first of them.

    Raises:
        UserError: naming file, line and what is wrong.
    """
    name = Path(source).name
    reader = _Reader(name, column, keep_responses)
    prompts, number = [], 0
    for number, (where, record) in enumerate(records(source), 1):  # noqa: B007
        try:
            if isinstance(record, BadRow):
                raise record
            prompts.append(Prompt(source=name, where=where, **reader.read(record)))
        except BadRow as error:
            if skipped is None:
                raise error.at(where) from error
            skipped[error.reason] += 1
    if not number:
        raise UserError(f"{source}: holds no rows; give a file with at least one conversation.")
    if reader.layout and reader.layout.unused:
        unused = ", ".join(sorted(reader.layout.unused))
        log.warning("%s: not used, though it looks like a part of the conversations: %s", name, unused)
    return prompts


@dataclass
class _Reader:
    """The reader of the rows of a file, judged by the first that can be read."""

    source: str
    column: str | None
    keep: bool
    layout: Layout | None = None
    kind: str = ""  # of what a row holds: token ids, a plain text, or a conversation

    def read(self, record: Any) -> dict[str, Any]:
        """Return the fields of a row's `Prompt`; BadRow for a row without them."""
        if not isinstance(record, dict):
            what = f"the row is a {type(record).__name__}, not an object with named columns"
            raise BadRow("a row without columns", what)
        if not self.kind:
            self.kind, self.layout = self._judge(record)
        if self.layout is None:
            return {"row": _token_row(record, self.source)}
        if self.kind == "conversation":
            return self.layout.read(record)
        text = text_of(record.get(self.layout.column), f"column {self.layout.column!r}")
        self.layout.note_unused(record, {self.layout.column}, {text})
        return {"text": text}

    def _judge(self, first: Record) -> tuple[str, Layout | None]:
        """The kind of a file's rows, and the columns of conversations and texts."""
        column, given = self.column, ", ".join(map(str, first))
        if column is None and any(set(names) <= set(first) for names in _TOKEN_COLUMNS):
            if self.keep:
                return "tokens", None
            if not any(name in first for name in COLUMNS):
                raise UserError(
                    f"{self.source}: the rows are token ids with their responses; pass --keep-responses to use them."
                )
        if column is not None and column not in first:
            raise BadRow("no such column", f"no column {column!r} (it has {given})")
        name = column or next((name for name in COLUMNS if name in first), None)
        if name is None:
            what = f"none of the columns {', '.join(COLUMNS)} (it has {given}); name the one to use with --column"
            raise BadRow("no column of conversations", what)
        response = next((other for other in RESPONSES if other in first and other != name), None)
        if self.keep and response is None and isinstance(first[name], str) and name not in CONVERSATIONS:
            if name != "text" and column is None:  # a prompt alone is no text to learn by heart
                raise UserError(
                    f"{self.source}: column {name!r} holds prompts, and --keep-responses finds no column of responses "
                    f"({', '.join(RESPONSES)}) among {given}; rename the one that has them, or name a column of plain "
                    "texts with --column."
                )
            return "text", Layout(name, None, self.keep)
        return "conversation", Layout(name, response, self.keep)


def _token_row(record: Record, source: str) -> Row:
    if "prompt_ids" in record or "response_ids" in record:
        prompt, response = _ids(record, "prompt_ids"), _ids(record, "response_ids")
        ids, mask = prompt + response, [False] * len(prompt) + [True] * len(response)
    else:
        ids, values = _ids(record, "input_ids"), record.get("loss_mask")
        if not isinstance(values, list) or len(values) != len(ids) or any(value not in (0, 1) for value in values):
            what = "column 'loss_mask' is not a list of as many true/false values as there are input_ids"
            raise BadRow("a mask that does not fit", what)
        mask = [bool(value) for value in values]
    length = mask.index(True) if True in mask else len(ids)
    # without a prompt of its own, a row is told apart by all of its tokens
    id = conversation_id(ids[:length] if length > 1 else ids)
    return Row(id, ids, mask, length, _number(record, "temperature"), _number(record, "top_p"), source)


def _ids(record: Record, column: str) -> list[int]:
    value = record.get(column)
    if not isinstance(value, list) or not value or not all(type(token) is int and token >= 0 for token in value):
        raise BadRow("no token ids", f"column {column!r} is not a list of token ids")
    return value


def _number(record: Record, column: str, most: float = 100.0) -> float | None:
    value = record.get(column)
    if value is None or value != value:  # NaN says "unknown" where a format has no null
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < most:
        raise BadRow(f"no {column}", f"column {column!r} is {value!r:.40}, not a number from 0 to below {most}")
    return float(value)


def kept_rows(target: Target, prompt: Prompt) -> list[Row]:
    """A conversation as the file has it, in rows as the target answers it: see `encode_kept`.

    Raises:
        BadRow: where the template does not take it, or it has tokens that the target has not.
    """
    if prompt.row is not None:
        check_ids(target, prompt.row.ids, "use the target that these tokens belong to")
        return [prompt.row]
    kept = prompt.messages
    rows, encoded = [], encode_kept(target, kept, prompt.tools) if kept else [encode_text(target, prompt.text)]
    for ids, mask in encoded:
        check_ids(target, ids)
        length = mask.index(True) if True in mask else len(ids)
        # ordinary text has no prompt that could tell it from another text
        id = conversation_id(ids if length == 1 else ids[:length])
        if prompt.messages:
            id = prompt_id(target, prompt.messages, prompt.tools)
        rows.append(Row(id, ids, mask, length, None, None, prompt.source))
    return rows


# parts of prompts that a template may leave out -> (a prompt's messages, tools) without them
_LEFT_OUT: dict[str, Callable[[Prompt], tuple[list[Message], list[dict[str, Any]]]]] = {
    "tools and their calls": lambda prompt: (
        [{key: value for key, value in each.items() if key != "tool_calls"} for each in prompt.messages],
        [],
    ),
    "system prompts": lambda prompt: ([each for each in prompt.messages if each["role"] != "system"], prompt.tools),
}


def note_left_out(target: Target, prompts: list[Prompt]) -> None:
    """Log once what the template leaves out: a server of the target leaves it out as well."""
    for what, without in _LEFT_OUT.items():
        prompt = next((each for each in prompts if without(each) != (each.messages, each.tools)), None)
        if prompt is None:
            continue
        messages, tools = without(prompt)
        with suppress(BadRow):  # which is told where the row is used
            whole = render(target, prompt.messages, add_generation_prompt=True, tools=prompt.tools)
            if whole == render(target, messages, add_generation_prompt=True, tools=tools):
                log.warning(
                    "%s: the target's chat template leaves out %s; give one that has them with --chat-template, or "
                    "let them be left out as its servers do",
                    *(prompt.where or prompt.source, what),
                )


# Prompts that the target writes.


def self_prompts(
    target: Target,
    wanted: int,
    max_length: int,
    write: Callable[[str, dict[int, Question]], dict[int, Response]],
) -> tuple[list[str], int]:
    """Let the target write user turns of its own until there are enough different ones.

    Returns:
        the texts, and the number of those that were refused.
    """
    before, after = user_turn(target)
    limit = min(_SELF_PROMPT_TOKENS, max_length - len(before))
    if limit < 1:
        raise UserError(
            f"--max-length {max_length} leaves no room for prompts of the target's own, which begin with {len(before)} "
            "tokens; raise it."
        )
    texts: dict[str, str] = {}  # by a form in which near-copies coincide
    refused = 0
    for number in range(_SELF_PROMPT_ROUNDS):
        stage, where = f"prompts-{number}", "a prompt of the target's own"
        questions = {
            index: Question(where, f"{stage}:{index}", before, [], limit, 1.0, _SELF_PROMPT_TOP_P)
            for index in range((wanted - len(texts)) * 3 // 2 + 8)
        }
        for _, response in sorted(write(stage, questions).items()):
            text = written_prompt(target, response.ids, after)
            key = " ".join(text.lower().split()) if text else ""
            if text is None or key in texts:
                refused += 1
            elif len(texts) < wanted:
                texts[key] = text
        if len(texts) == wanted:
            break
    if not texts:
        raise UserError(f"target {target.name!r} wrote no usable prompts of its own; give some with --prompts FILE.")
    if len(texts) < wanted:
        log.warning("the target wrote %d different usable prompts of %d wanted", len(texts), wanted)
    return list(texts.values()), refused


def user_turn(target: Target) -> tuple[list[int], str]:
    """The chat template's token ids before the text of a first user turn, and its text after it."""
    before, after = render(target, [{"role": "user", "content": SENTINEL}], add_generation_prompt=False).split(SENTINEL)
    return tokenise(target, before), after


def written_prompt(target: Target, ids: list[int], after: str) -> str | None:
    """The user's request in what the target wrote from the start of a user turn; None when it is not fit for use."""
    if not ids:
        return None
    text = target.tokenizer.decode(ids[:-1] if ids[-1] in target.eos_token_ids else ids)
    ended = ids[-1] in target.eos_token_ids
    if after.strip() and after.strip() in text:  # templates whose turns end with a text and not with a token
        text, ended = text.split(after.strip())[0], True
    text = text.strip()
    return text if ended and fit(text) else None


def fit(text: str) -> bool:
    """Long enough to be a request, whole characters, and not going round in circles."""
    words = re.findall(r"\w+", text.lower())
    if not 10 <= len(text) <= 2000 or len(words) < 3 or "\ufffd" in text:
        return False
    if len(set(words)) < 0.4 * len(words) or re.search(r"(.)\1{9}", text):
        return False
    pairs = Counter(pairwise(words))
    return max(pairs.values()) <= max(2, len(words) // 8)
