"""The texts of a target: its tokenizer, its chat template and the ids that end an answer, without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from draft.errors import UserError
from draft.target.adapter import Adapter
from draft.target.template import (
    TemplateRefusal,
    check_chat_template,
    generation_spans,
    reads_clock,
    render_template,
    template_hash,
    template_of,
)


class TextTarget:
    """A target as far as its texts go, which is all that is needed of one that another server runs."""

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        config: Any,
        vocab_size: int,
        generation_config: Any = None,
        adapter: Adapter | None = None,
    ) -> None:
        """config: that of the text model. generation_config: None where there is none."""
        self.name, self.adapter = name, adapter
        self.title = repr(name) + (f" with adapter {adapter.name!r}" if adapter else "")  # for messages
        self.tokenizer, self.config, self.generation_config = tokenizer, config, generation_config
        self.vocab_size = vocab_size
        self.chat_template: str | None = None  # that of a file; None: the tokenizer's
        self.rendering_time: datetime | None = None  # that templates read as today's; None: now
        # tokens of context as its configuration says
        self.stated_length = int(getattr(config, "max_position_embeddings", 2048))

    @cached_property
    def fingerprint(self) -> str:
        """The identifier of the weights; empty where they are not here."""
        return ""

    @property
    def architecture(self) -> str:
        """The class of the model."""
        return str((self.config.architectures or ["unknown"])[0])

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        ids: set[int] = set()
        generation = getattr(self.generation_config, "eos_token_id", None)
        for value in (generation, self.config.eos_token_id, self.tokenizer.eos_token_id):
            ids.update(_token_ids(self.name, value))
        # a tokenizer may know tokens that the model has no row for, and never writes
        return frozenset(token for token in ids if isinstance(token, int) and 0 <= token < self.vocab_size)

    def use_chat_template(self, template: str) -> None:
        """Render with this template instead of the tokenizer's; UserError where it renders no user turn."""
        try:
            check_chat_template(self.tokenizer, template)
        except TemplateRefusal as error:
            raise UserError(
                f"the chat template refuses a user's turn ({error.reason}); correct it, or give another."
            ) from error
        self.chat_template = template

    def check_template(self) -> None:
        """Refuse a template that renders no user's turn: UserError, TemplateRefusal where it raises at one."""
        check_chat_template(self.tokenizer, self.template_for())

    def template_for(self, tools: list[Any] | None = None) -> str:
        """The template of a conversation with these tools; UserError where there is none."""
        return self.chat_template or template_of(self.tokenizer, tools)

    @property
    def reads_clock(self) -> bool:
        """True where the chat template writes today's date."""
        templates = self.chat_template or self.tokenizer.chat_template or ""
        return any(map(reads_clock, templates.values() if isinstance(templates, dict) else [templates]))

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        """Token ids of a conversation under the target's chat template."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: list[Any] | None = None,
        at: datetime | None = None,
    ) -> str:
        """A conversation as text; at: the time that the template reads, None for `rendering_time`."""
        return render_template(
            self.tokenizer,
            self.template_for(tools),
            messages,
            generation_prompt=add_generation_prompt,
            tools=tools,
            at=at or self.rendering_time,
        )

    def generation_spans(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[tuple[int, int]]:
        """(first character, end) of what the template's `{% generation %}` marks in the rendered conversation."""
        template = self.template_for(tools)
        return generation_spans(self.tokenizer, template, messages, tools=tools, at=self.rendering_time)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def template_hash(self) -> str:
        return template_hash(self.chat_template or self.tokenizer.chat_template)


def _token_ids(name: str, value: Any) -> list[int]:
    """The ids in an entry of a configuration: one, a list of them, or none. UserError for anything else."""
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise UserError(
            f"target {name!r}: eos_token_id is {value!r:.60}, not a token id or a list of them; correct its "
            "generation_config.json."
        )
    return list(ids)
