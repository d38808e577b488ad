"""Conversations from files and hub data sets, and prompts that the target writes itself."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from draft.data.dataset import Response, Row, conversation_id
from draft.data.examples import SENTINEL, Message, encode_kept, render, tokenise
from draft.data.generate import Question
from draft.data.records import records
from draft.errors import UserError
from draft.target import Target

log = logging.getLogger(__name__)

SELF_PROMPTED = "self-prompted"
_SELF_PROMPT_TOKENS = 80
_SELF_PROMPT_TOP_P = 0.95  # the tail of a prompt's distribution is noise; responses are never cut
_SELF_PROMPT_ROUNDS = 10
_COLUMNS = ("messages", "conversations", "conversation", "turns", "prompt", "question", "instruction", "text")
_CONVERSATIONS = _COLUMNS[:4]  # hold lists of turns
_RESPONSES = ("response", "answer", "output", "completion", "code")
_TOKEN_COLUMNS = (("prompt_ids", "response_ids"), ("input_ids", "loss_mask"))
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}

Record = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One conversation to be answered, or kept as it is."""

    source: str
    where: str = ""  # file and line, for messages to the user
    messages: list[Message] = field(default_factory=list)
    text: str = ""  # ordinary text without turns, kept as it is
    row: Row | None = None  # tokens as they came, kept as they are


def load_prompts(source: str, *, column: str | None = None, keep_responses: bool = False) -> list[Prompt]:
    """Read conversations from a .jsonl, .json, .csv (also .gz) or .parquet file, or from a hub data set.

    The column is found by name in the first row, unless `column` names it; its values may be texts, lists of user
    turns, or lists of messages with role/content or from/value (columns that are meant for lists may hold them as JSON
    text). A hub data set is `owner/name` or `owner/name:split` (default: train).

    Raises:
        UserError: naming file, line and what is wrong.
    """
    name = Path(source).name
    parse: Callable[[Record], dict[str, Any]] | None = None
    prompts = []
    for where, record in records(source):
        try:
            if not isinstance(record, dict):
                raise ValueError(f"the row is a {type(record).__name__}, not an object with named columns")
            parse = parse or _parser(record, column, keep_responses, name)
            prompts.append(Prompt(source=name, where=where, **parse(record)))
        except ValueError as error:
            raise UserError(f"{where}: {error}; mend or remove that row.") from error
    if not prompts:
        raise UserError(f"{source}: holds no rows; give a file with at least one conversation.")
    return prompts


def _parser(first: Record, column: str | None, keep: bool, source: str) -> Callable[[Record], dict[str, Any]]:
    """The reader of the rows of a file, judged by its first one."""
    if column is None and any(set(names) <= set(first) for names in _TOKEN_COLUMNS):
        if keep:
            return lambda record: {"row": _token_row(record, source)}
        if not any(name in first for name in _COLUMNS):
            raise UserError(
                f"{source}: the rows are token ids with their responses; pass --keep-responses to use them."
            )
    if column is not None and column not in first:
        raise ValueError(f"no column {column!r} (it has {', '.join(map(str, first))})")
    name = column or next((name for name in _COLUMNS if name in first), None)
    if name is None:
        raise ValueError(
            f"none of the columns {', '.join(_COLUMNS)} (it has {', '.join(map(str, first))}); "
            "name the one to use with --column"
        )
    if not keep:
        return lambda record: {"messages": _messages(record, name, without_responses=True)}
    response = next((other for other in _RESPONSES if other in first and other != name), None)
    if response is None and isinstance(first[name], str) and name not in _CONVERSATIONS:
        if name != "text" and column is None:  # a prompt alone is no text to learn by heart
            raise UserError(
                f"{source}: column {name!r} holds prompts, and --keep-responses finds no column of responses "
                f"({', '.join(_RESPONSES)}) among {', '.join(map(str, first))}; rename the one that has them, or name "
                "a column of plain texts with --column."
            )
        return lambda record: {"text": _text(record.get(name), f"column {name!r}")}
    return lambda record: {"messages": _answered(_messages(record, name), record, response)}


def _messages(record: Record, column: str, without_responses: bool = False) -> list[Message]:
    value = record.get(column)
    if column in _CONVERSATIONS and isinstance(value, str):
        value = _turns(value, column)
    if value == []:
        raise ValueError(f"column {column!r} is empty")
    if isinstance(value, list):
        messages = [_message(item, place) for place, item in enumerate(value, 1)]
        if without_responses:  # the target writes its own
            messages = [message for message in messages if message["role"] != "assistant"]
            if not any(message["role"] == "user" for message in messages):
                raise ValueError("there is no user turn")
        return messages
    text = _text(value, f"column {column!r}")
    if column == "instruction" and isinstance(record.get("input"), str) and record["input"].strip():
        text = f"{text}\n\n{record['input']}"
    return [{"role": "user", "content": text}]


def _turns(text: str, column: str) -> Any:
    """The turns in a text: the only form that they can have in a CSV file."""
    is_list = text.lstrip().startswith("[")
    if not text.strip() or (column == "turns" and not is_list):  # a single one
        return text
    if not is_list:
        raise ValueError(
            f"column {column!r} is a plain text where a list of turns belongs; call it 'prompt' or 'text' if it is one"
        )
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"column {column!r} holds text that is not JSON ({error})") from error


def _message(item: Any, place: int) -> Message:
    if isinstance(item, str):  # MT-bench's turns
        return {"role": "user", "content": _text(item, f"turn {place}")}
    if not isinstance(item, dict):
        raise ValueError(f"turn {place} is a {type(item).__name__}, not a text or an object with role and content")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"turn {place} has the role {role!r}, not one of {', '.join(_ROLES)}")
    if isinstance(content, list):  # parts, as chat APIs write them
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"turn {place} has parts that are not text")
        content = "".join(part["text"] for part in content)
    return {"role": _ROLES[role], "content": _text(content, f"turn {place}")}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {'missing' if value is None else 'a ' + type(value).__name__}, not a text")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # JSON can hold half a character; tokenizers cannot
        raise ValueError(f"{what} holds half a surrogate pair, which is no text")
    return value


def _answered(messages: list[Message], record: Record, response: str | None) -> list[Message]:
    if messages[-1]["role"] == "user" and response is not None:
        value = record.get(response)
        if isinstance(value, list):
            messages = messages + [_message(item, place) for place, item in enumerate(value, len(messages) + 1)]
        else:
            messages = [*messages, {"role": "assistant", "content": _text(value, f"column {response!r}")}]
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]  # an unanswered end has nothing to train on
    if not messages:
        raise ValueError("there is no response to keep")
    return messages


def _token_row(record: Record, source: str) -> Row:
    if "prompt_ids" in record or "response_ids" in record:
        prompt, response = _ids(record, "prompt_ids"), _ids(record, "response_ids")
        ids, mask = prompt + response, [False] * len(prompt) + [True] * len(response)
    else:
        ids, values = _ids(record, "input_ids"), record.get("loss_mask")
        if not isinstance(values, list) or len(values) != len(ids) or any(value not in (0, 1) for value in values):
            raise ValueError("column 'loss_mask' is not a list of as many true/false values as there are input_ids")
        mask = [bool(value) for value in values]
    length = mask.index(True) if True in mask else len(ids)
    # without a prompt of its own, a row is told apart by all of its tokens
    id = conversation_id(ids[:length] if length > 1 else ids)
    return Row(id, ids, mask, length, _number(record, "temperature"), _number(record, "top_p"), source)


def _ids(record: Record, column: str) -> list[int]:
    value = record.get(column)
    if not isinstance(value, list) or not value or not all(type(token) is int and token >= 0 for token in value):
        raise ValueError(f"column {column!r} is not a list of token ids")
    return value


def _number(record: Record, column: str) -> float | None:
    value = record.get(column)
    if value is None or value != value:  # NaN says "unknown" where a format has no null
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"column {column!r} is {value!r}, not a number of at least 0")
    return float(value)


def kept_row(target: Target, prompt: Prompt) -> Row:
    """A conversation as the file has it."""
    if prompt.row is not None:
        if max(prompt.row.ids) >= target.vocab_size:
            raise UserError(
                f"{prompt.where}: token {max(prompt.row.ids)} is beyond the target's vocabulary of "
                f"{target.vocab_size}; use the target that these tokens belong to."
            )
        return prompt.row
    if prompt.text:
        # the target's distribution teaches after every token, but has nothing to say on the first
        ids = tokenise(target, prompt.text)
        mask = [False] * min(1, len(ids)) + [True] * (len(ids) - 1)
    else:
        try:
            ids, mask = encode_kept(target, prompt.messages)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from error
    length = mask.index(True) if True in mask else len(ids)
    # ordinary text has no prompt that could tell it from another text
    return Row(conversation_id(ids if prompt.text else ids[:length]), ids, mask, length, None, None, prompt.source)


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
