"""Chat templates: the one of a file, several under names, and templates that read today's date."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from draft.errors import UserError

_PROBE = "draftsmith-looks-for-this-text"
# parts of conversations -> (roles before, its own, roles after)
_PARTS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "what a user says": ((), "user", ()),
    "system prompts": ((), "system", ("user",)),
    "earlier answers": (("user",), "assistant", ("user",)),
}
_DIRECTIVES = "aAbBcdeDfFgGHIjklmMnpPrRsStTuUVwWxXyYzZ"
# `strftime_now` of a time that is given: transformers passes no functions to templates
_FROZEN_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set written = namespace(text=format) -%}"
    "{%- for directive, value in draftsmith_clock -%}"
    "{%- set written.text = written.text.replace(directive, value) -%}"
    "{%- endfor -%}{{- written.text -}}{%- endmacro %}\n"  # the newline goes with the block: a line begins after it
)


class TemplateRefusal(UserError):
    """Messages that a chat template raises at, with its reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the chat template refuses these messages ({reason}); correct them, or give another template."
        )
        self.reason = reason


def read_chat_template(path: str | Path) -> str:
    """Read the text of a chat template; UserError where there is no such file, or no text in it."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--chat-template {str(path)!r} is not UTF-8 text; give a file with a Jinja template."
        ) from error
    except OSError as error:
        raise UserError(
            f"--chat-template {str(path)!r} cannot be read ({error.strerror}); give a file with a Jinja template."
        ) from error
    if not text.strip():
        raise UserError(f"--chat-template {str(path)!r} is empty; give a file with a Jinja template.")
    return text


def check_chat_template(tokenizer: Any, template: str) -> None:
    """Refuse a text that does not render a user's turn: UserError, TemplateRefusal where it raises at one."""
    rendered = render_template(tokenizer, template, [{"role": "user", "content": _PROBE}], generation_prompt=True)
    if _PROBE not in rendered:
        raise UserError(
            "the chat template leaves out what a user says; give a Jinja template of chats with --chat-template."
        )


def template_faults(tokenizer: Any, template: str) -> list[str]:
    """Return the parts of conversations that a template refuses or leaves out, each in a few words."""
    faults = []
    for part, (before, role, after) in _PARTS.items():
        turns = [{"role": each, "content": _PROBE if each == role else "Hello."} for each in (*before, role, *after)]
        try:
            if _PROBE not in render_template(tokenizer, template, turns, generation_prompt=True):
                faults.append(f"leaves out {part}")
        except TemplateRefusal as error:
            faults.append(f"refuses {part} ({error.reason})")
    return faults


def template_of(tokenizer: Any, tools: list[Any] | None = None) -> str:
    """Return the tokenizer's template: of several the one called `tool_use` where there are tools, else `default`.

    Raises:
        UserError: when it has none, or none of these names.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        name = "tool_use" if tools and "tool_use" in template else "default"
        if name not in template:
            raise UserError(
                f"the target's tokenizer has several chat templates ({', '.join(sorted(template))}) and none is called "
                "default; give the file of one with --chat-template."
            )
        template = template[name]
    if not template:
        raise UserError(
            "the target's tokenizer has no chat template; give one with --chat-template, or save it as "
            "chat_template.jinja beside it."
        )
    return template


def template_hash(template: str | dict[str, str] | None) -> str:
    """Return 16 hexadecimal digits that tell templates apart."""
    text = json.dumps(template, sort_keys=True) if isinstance(template, dict) else template or ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def reads_clock(template: str) -> bool:
    return "strftime_now" in template


def render_template(
    tokenizer: Any,
    template: str,
    messages: list[dict[str, Any]],
    *,
    generation_prompt: bool,
    tools: list[Any] | None = None,
    at: datetime | None = None,
) -> str:
    """Return a conversation as text; at: the time that the template reads, None for now.

    Raises:
        UserError: for what is no template. TemplateRefusal: for messages that it does not take.
    """
    clock, frozen = _clock(template, at)
    try:
        return tokenizer.apply_chat_template(
            _content_for(tokenizer, template, messages),
            tools=tools or None,
            chat_template=frozen,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **clock,
        )
    except TemplateSyntaxError as error:
        raise UserError(
            f"the target's chat template is no Jinja template ({error}); give one with --chat-template FILE."
        ) from error
    except Exception as error:  # a template is a program: it may raise anything at what it does not expect
        raise TemplateRefusal(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _content_for(tokenizer: Any, template: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with contents of the form that the template reads."""
    if not _reads_parts(tokenizer, template):
        return messages
    return [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]


@lru_cache(maxsize=8)
def _reads_parts(tokenizer: Any, template: str) -> bool:
    """Return True for a template that reads texts from lists of parts only, as those of models of pictures do."""

    def shows(content: Any) -> bool:
        turn = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False)
        except Exception:  # which rendering the messages will raise again
            return False
        return re.search(f"(?<!['\"]){_PROBE}", text) is not None  # in quotes where the list itself is printed

    return not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])


def generation_spans(
    tokenizer: Any, template: str, messages: list[dict[str, Any]], *, tools: list[Any] | None, at: datetime | None
) -> list[tuple[int, int]]:
    """Return (first character, end) of what is inside of `{% generation %}` in the rendered conversation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    clock, frozen = _clock(template, at)
    rendered: Any = render_jinja_template(
        [_content_for(tokenizer, template, messages)],
        tools=tools or None,
        chat_template=frozen,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **clock},
    )
    return [(int(start), int(end)) for start, end in rendered[1][0]]


def _clock(template: str, at: datetime | None) -> tuple[dict[str, Any], str]:
    """Return the arguments and the text of a template whose clock stands at that time."""
    if at is None or not reads_clock(template):
        return {}, template
    directives = [f"%{flag}{letter}" for flag in ("-", "_", "0", "") for letter in _DIRECTIVES]
    return {"draftsmith_clock": [(each, at.strftime(each)) for each in directives]}, _FROZEN_CLOCK + template
