"""Conversations in the rows of files: which columns hold them, and their turns, tools, calls and thoughts."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from typing import Any

from draft.data.examples import Message
from draft.data.records import BadRow

log = logging.getLogger(__name__)

Record = dict[str, Any]

COLUMNS = ("messages", "conversations", "conversation", "turns", "prompt", "question", "instruction", "text")
CONVERSATIONS = COLUMNS[:4]  # hold lists of turns
RESPONSES = ("response", "answer", "output", "completion", "code")
_SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "sys_prompt")
_TOOLS = ("tools", "functions")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FLAGS = ("on", "off", "yes", "no", "true", "false")
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLS = ("function_call", "tool_call")  # roles whose text is a call, as JSON
_TEXTS = ("text", "input_text", "output_text")  # kinds of parts that are what was said
_TURN_KEYS = {"role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "function_call", *_REASONING}
# names of columns that a conversation may be in
_ASKED = re.compile(
    "system|prompt|instruction|histor|message|conversation|dialog|turn|question|query|context|input|tool|function|image"
    "|audio|video|document|persona"
)
_ANSWERED = re.compile("response|answer|output|completion|chosen|rejected|reason|think|thought|solution|reply")
_ABOUT = re.compile(
    "(^|_)(id|ids|hash|type|lang|language|source|category|name|length|len|count|num|tokens|fingerprint|index|idx|url"
    "|date|time|score|model)$"
)


@dataclass
class Layout:
    """The columns of a file's conversations, and what was seen that is not used."""

    column: str
    response: str | None  # of answers beside prompts
    keep: bool  # the answers in the file
    unused: set[str] = field(default_factory=set)
    lists_told: bool = False

    def read(self, record: Record) -> dict[str, Any]:
        """Return the messages of a row, and its tools where it has some.

        Raises:
            BadRow: for what is no conversation.
        """
        used = {self.column}
        system, history, tools = (self._first(record, names, used) for names in (_SYSTEM, ("history",), _TOOLS))
        messages = self._messages(_history(history)) + self._turns(record, used)
        system = _joined(system, "the system prompt")
        if isinstance(system, str) and system.strip():
            if messages and messages[0]["role"] == "system":  # the conversation's own is used
                used -= set(_SYSTEM)
            else:
                messages = [{"role": "system", "content": text_of(system, "the system prompt")}, *messages]
        elif system:
            raise BadRow("a system prompt that is not a text", f"the system prompt is a {type(system).__name__}")
        if self.keep:
            messages = self._answered(messages, record, used)
        elif not any(message["role"] == "user" for message in messages):
            raise BadRow("no user turn", "there is no user turn")
        self.note_unused(record, used, {message["content"] for message in messages})
        found = _tools(tools)
        return {"messages": messages, **({"tools": found} if found else {})}

    def _first(self, record: Record, names: tuple[str, ...], used: set[str]) -> Any:
        """The first of these columns that has a value."""
        for name in names:
            value = record.get(name)
            if name != self.column and value and value == value:  # NaN says "none" where a format has no null
                used.add(name)
                return value
        return None

    def _turns(self, record: Record, used: set[str]) -> list[Message]:
        value, column = record.get(self.column), self.column
        if column in CONVERSATIONS and isinstance(value, str) and value.strip():
            if value.lstrip().startswith("["):  # the only form that a list can have in a CSV file
                value = _json(value, f"column {column!r}")
            elif column != "turns":  # which may be a single one
                raise BadRow(
                    "a text where a list of turns belongs",
                    f"column {column!r} is a plain text where a list of turns belongs; call it 'prompt' or 'text' if "
                    "it is one",
                )
        if value == []:
            raise BadRow("no turns", f"column {column!r} is empty")
        if isinstance(value, list):
            if column != "turns" and len(value) > 1 and isinstance(value[0], str) and not self.lists_told:
                log.warning("column %r holds lists of texts: each text is taken for a user's turn", column)
                self.lists_told = True
            return self._messages(value)
        text = text_of(value, f"column {column!r}")
        if column == "instruction" and isinstance(record.get("input"), str) and record["input"].strip():
            text = f"{text}\n\n{text_of(record['input'], 'column ' + repr('input'))}"
            used.add("input")
        return [{"role": "user", "content": text}]

    def _messages(self, items: list[Any], first: int = 1) -> list[Message]:
        """The messages of a list; answers that the target is to write itself are not read."""
        roles = [_role(item, place) for place, item in enumerate(items, first)]
        called_of = [role == "tool" for role in [*roles[1:], ""]][: len(roles)]
        messages = []
        for place, (item, role, called) in enumerate(zip(items, roles, called_of, strict=True), first):
            if role == "assistant" and not (self.keep or called):
                continue
            messages.append(_message(item, role, place))
            if isinstance(item, dict):
                if self.keep and role == "assistant" and not _trained_on(item.get("weight"), place):
                    messages[-1]["weight"] = 0
                self.unused |= {f"{name} of a turn" for name in item if name not in _TURN_KEYS and _telling(name, item)}
        return messages

    def _answered(self, messages: list[Message], record: Record, used: set[str]) -> list[Message]:
        """The messages with the answer of the column of responses, up to the last answer."""
        if messages[-1]["role"] != "assistant" and self.response is not None:
            value = record.get(self.response)
            used.add(self.response)
            if isinstance(value, list):
                messages = messages + self._messages(value, len(messages) + 1)
            else:
                reasoning = self._first(record, _REASONING, used)
                if isinstance(reasoning, bool) or str(reasoning).strip().lower() in _FLAGS:  # switched on, not thoughts
                    reasoning = None
                thought = {"reasoning_content": text_of(reasoning, "the reasoning")} if reasoning else {}
                answer = text_of(value, f"column {self.response!r}", "an empty answer")
                messages = [*messages, {"role": "assistant", **thought, "content": answer}]
        while messages and (messages[-1]["role"] != "assistant" or "weight" in messages[-1]):
            messages = messages[:-1]  # an unanswered end has nothing to train on
        if not messages:
            raise BadRow("no answer", "there is no response to keep")
        # users and the target take turns in all that a server could have seen
        roles = [message["role"] for message in messages if message["role"] != "system"]
        if roles[0] == "assistant":
            raise BadRow(
                "the first turn is the assistant's", "the first turn is the assistant's, which answers nothing"
            )
        if any(pair == ("user", "user") for pair in zip(roles, roles[1:], strict=False)):
            raise BadRow("two user turns in a row", "two user turns follow each other without an answer")
        return messages

    def note_unused(self, record: Record, used: set[str], texts: set[str]) -> None:
        """Remember the columns that look like a part of the conversation beside those that are used."""
        for name, value in record.items():
            answer = name in RESPONSES or _ANSWERED.search(str(name).lower())
            if name in used or (answer and not self.keep) or not _telling(name, record):
                continue
            if not (isinstance(value, str) and value.strip() in {text.strip() for text in texts}):
                self.unused.add(str(name))


def _telling(name: Any, record: Record) -> bool:
    """True for a field that looks like a part of the conversation: by its name, and since it has a value of words."""
    name, value = str(name).lower(), record[name]
    if not isinstance(value, (str, list, dict)) or not value or (isinstance(value, str) and not value.strip()):
        return False
    return bool((_ASKED.search(name) or _ANSWERED.search(name) or name in RESPONSES) and not _ABOUT.search(name))


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("a text that is not JSON", f"{what} holds text that is not JSON ({error})") from error


def _role(item: Any, place: int) -> str:
    if isinstance(item, str):  # MT-bench's turns
        return "user"
    if not isinstance(item, dict):
        what = f"turn {place} is a {type(item).__name__}, not a text or an object with role and content"
        raise BadRow("a turn that is no object", what)
    role = item.get("role", item.get("from"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise BadRow("an unknown role", f"turn {place} has the role {role!r}, not one of {', '.join(_ROLES)}")
    return _ROLES[role.lower()]


def _message(item: Any, role: str, place: int) -> Message:
    if isinstance(item, str):
        return {"role": role, "content": text_of(item, f"turn {place}", "an empty turn")}
    content = item.get("content", item.get("value"))
    message: Message = {"role": role}
    calls = item.get("tool_calls") or ([item["function_call"]] if item.get("function_call") else None)
    if item.get("role", item.get("from")) in _CALLS:
        calls, content = content, None
    if role == "assistant" and calls:
        message["tool_calls"] = tool_calls(calls, f"turn {place}")
    if role == "assistant" and (reasoning := next((item[name] for name in _REASONING if item.get(name)), None)):
        message["reasoning_content"] = text_of(reasoning, f"the reasoning of turn {place}")
    message |= {name: item[name] for name in ("name", "tool_call_id") if isinstance(item.get(name), str)}
    content = _joined(content, f"turn {place}")
    if content in (None, "") and (role == "tool" or "tool_calls" in message):  # beside a call, or as its result
        return {**message, "content": ""}
    reason = "an empty answer" if role == "assistant" else "an empty turn"
    return {**message, "content": text_of(content, f"turn {place}", reason)}


def _trained_on(weight: Any, place: int) -> bool:
    """False for an answer of weight 0, OpenAI's "not to be trained on"; BadRow for a weight that is not 0 or 1."""
    if weight is None or weight != weight:  # NaN says "none" where a format has no null
        return True
    if str(weight).strip() not in ("0", "0.0", "1", "1.0", "False", "True"):
        raise BadRow("a weight that is not 0 or 1", f"turn {place} has the weight {weight!r:.40}, not 0 or 1")
    return str(weight).strip() in ("1", "1.0", "True")


def _joined(content: Any, where: str) -> Any:
    """The text of a list of parts, as chat APIs write them; anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind not in _TEXTS or not isinstance(part.get("text"), str):
            raise BadRow("a turn with parts that are not text", f"{where} has a part that is not text ({kind})")
    return "".join(part["text"] for part in content)


def tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls as chat templates read them, with arguments as objects: servers give templates the same. BadRow else."""
    if isinstance(calls, str):
        calls = _json(calls, f"the call of {where}")
    if isinstance(calls, dict):
        calls = [calls]
    found = []
    for call in calls if isinstance(calls, list) else [None]:
        call = call if isinstance(call, dict) else {}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise BadRow("a call without a name", f"{where} has a tool call that names no function")
        arguments: Any = next((function[key] for key in ("arguments", "parameters", "input") if key in function), {})
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except (ValueError, RecursionError):
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        id = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({**id, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _tools(value: Any) -> list[dict[str, Any]]:
    """Tools as OpenAI's API describes them."""
    if isinstance(value, str):
        value = _json(value, "the column of tools")
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        if value is None:
            return []
        raise BadRow("tools that are no list", f"the tools are a {type(value).__name__}, not a list of objects")
    value = [_json(each, "a tool") if isinstance(each, str) else each for each in value]
    if not all(isinstance(each, dict) for each in value):
        raise BadRow("tools that are no objects", "a tool is not an object")
    tools = []
    for each in value:
        if "name" in each and "function" not in each:  # named otherwise by other APIs
            names = {"input_schema": "parameters"}
            each = {"type": "function", "function": {names.get(key, key): what for key, what in each.items()}}
        tools.append(each)
    return tools


def _history(value: Any) -> list[Any]:
    """The turns before the first of a row, from pairs of question and answer, or messages."""
    if isinstance(value, str):
        value = _json(value, "column 'history'")
    turns: list[Any] = []
    for place, item in enumerate(value if isinstance(value, list) else [] if value is None else [value], 1):
        if isinstance(item, list) and len(item) == 2:
            turns += [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
        elif isinstance(item, dict) and ("role" in item or "from" in item):
            turns.append(item)
        else:
            what = f"turn {place} of the history is no pair of question and answer, and no message"
            raise BadRow("a history that cannot be read", what)
    return turns


def text_of(value: Any, what: str, reason: str = "") -> str:
    if not isinstance(value, str):
        kind = "missing" if value is None else "a " + type(value).__name__
        raise BadRow(reason if value is None and reason else "no text", f"{what} is {kind}, not a text")
    if not value.strip():
        raise BadRow(reason or "an empty text", f"{what} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # JSON can hold half a character; tokenizers cannot
        raise BadRow("half a surrogate pair", f"{what} holds half a surrogate pair, which is no text")
    return value
