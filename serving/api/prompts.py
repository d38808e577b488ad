"""Prompts to token ids, and what a prompt leaves room for; in the words of each surface."""

from __future__ import annotations

from dataclasses import dataclass

from draft.errors import UserError
from serving.api.errors import ApiError, echo
from serving.api.service import Service


@dataclass(frozen=True)
class Names:
    """What a surface calls the prompt and the number of tokens to generate."""

    prompt: str
    max_tokens: str


async def encode(
    service: Service, text: str, names: Names, *, special_tokens: bool = True, end_only: bool = False
) -> list[int]:
    """Token ids of a text; end_only: of one that must exceed the context, those of an end that may fill it.

    Raises:
        ApiError: for a text that must exceed the context, before it is tokenised, or that has no tokens.
    """
    limit = service.engine.max_length * service.longest_token
    if len(text) > limit:
        if not end_only:
            raise _too_long(service, f"{len(text)} characters", names)
        text = text[-limit:]
    ids = await service.encode(text, special_tokens=special_tokens)
    if not ids:
        raise ApiError("validation", f"`{names.prompt}` must have at least 1 token. Given: 0", field=names.prompt)
    return ids


def rendered(service: Service, messages: list[dict[str, str]], field: str) -> str:
    """Messages as text under the target's own chat template, up to where its answer begins.

    Raises:
        UserError: there is no template. ApiError: it does not take these messages.
    """
    try:
        return service.engine.target.render_chat(messages, add_generation_prompt=True)
    except UserError:
        raise
    except Exception as error:  # a template is a program: it may raise anything at what it does not expect
        message = "the model's chat template does not take these messages; check the order of their roles"
        raise ApiError("validation", message, field=field) from error


def check_ids(service: Service, ids: list[int] | tuple[int, ...], field: str) -> None:
    """Raises ApiError for ids outside the vocabulary."""
    size = service.engine.target.vocab_size
    for token_id in ids:
        if token_id >= size:
            message = f"`{field}` has token id {echo(token_id)}: the model's go from 0 to {size - 1}"
            raise ApiError("validation", message, field=field)


def new_tokens(service: Service, asked: int | None, prompt_tokens: int, default: int | None, names: Names) -> int:
    """The number of tokens to generate; default: None is the room that is left.

    Raises:
        ApiError: it exceeds the server's limit or the context, with the numbers.
    """
    context, limit = service.engine.max_length, service.max_new_tokens
    room = context - prompt_tokens
    if room < 1:
        raise _too_long(service, str(prompt_tokens), names)
    if asked is None:
        return min(limit, room, default or room)
    field = names.max_tokens
    if asked > limit:
        raise ApiError("validation", f"`{field}` must be <= {limit}. Given: {echo(asked)}", field=field)
    if asked > room:
        message = (
            f"`{names.prompt}` tokens + `{field}` must be <= {context}. "
            f"Given: {prompt_tokens} `{names.prompt}` tokens and {asked} `{field}`"
        )
        raise ApiError("validation", message, field=field, code="context_length_exceeded")
    return asked


def _too_long(service: Service, given: str, names: Names) -> ApiError:
    message = f"`{names.prompt}` must have less than {service.engine.max_length} tokens. Given: {given}"
    return ApiError("validation", message, field=names.prompt, code="context_length_exceeded")
