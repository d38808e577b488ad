"""Request and response models of OpenAI's API.

vLLM's extensions are taken where the engine has them: top_k, min_p, repetition_penalty, stop_token_ids, min_tokens,
ignore_eos, include_stop_str_in_output, return_token_ids, return_tokens_as_token_ids. A sampling parameter is
implemented exactly or refused by name; none is ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from serving.api.schemas import (
    CAPTURE,
    MAX_STOP_SEQUENCES,
    Count,
    Positive,
    Prompt,
    Refused,
    Speculative,
    StopString,
    StopStrings,
    Strict,
    Text,
    Whole,
    off,
    optional,
)
from serving.engine import sampling

MAX_CHOICES = 64  # of one request: prompts * n
MAX_BIASES = 1024
MAX_TEMPERATURE = 2.0
MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message

_UNSUPPORTED = off(
    "allowed_token_ids bad_words prompt_logprobs request_id structured_outputs truncate_prompt_tokens use_beam_search",
    priority=0,
    response_format={"type": "text"},
    skip_special_tokens=True,
    spaces_between_special_tokens=True,
)
_UNSUPPORTED_IN_CHATS = _UNSUPPORTED | off(
    "audio chat_template chat_template_kwargs continue_final_message echo functions parallel_tool_calls prediction "
    "reasoning_effort tools verbosity web_search_options",
    add_generation_prompt=True,
    function_call="none",
    modalities=["text"],
    tool_choice="none",
)


def _by_token_id(bias: Any) -> Any:
    """Return a mapping with keys that are numbers, once its size and its keys are known to be right."""
    if not isinstance(bias, dict):
        return bias
    if len(bias) > MAX_BIASES:  # each value that is wrong would be reported
        raise ValueError(f"must have at most {MAX_BIASES} entries. Given: {len(bias)}")
    if not all(re.fullmatch("0|[1-9][0-9]{0,8}", key) for key in bias):  # one spelling, or two keys might be one token
        raise ValueError("its keys must be token ids")
    return {int(key): value for key, value in bias.items()}


TokenId = Annotated[sampling.TokenId, Whole]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Prompts = Annotated[list[Prompt], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]
PromptsOfIds = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]
StopIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_SEQUENCES)]
LogitBias = Annotated[dict[sampling.TokenId, sampling.Bias], BeforeValidator(_by_token_id)]
Logprobs = Annotated[sampling.Logprobs, Whole]
NewTokens = Annotated[sampling.NewTokens, Whole]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = optional("padding against observers; never added")
    continuous_usage_stats: bool | None = optional("usage in every chunk (vLLM)")


class SamplingRequest(Strict):
    """Fields of both endpoints."""

    model: Text | None = optional("any name, unless the server is strict")
    n: Annotated[Positive, Field(le=MAX_CHOICES)] | None = optional(f"choices; prompts * n <= {MAX_CHOICES}")
    temperature: Annotated[sampling.Temperature, Field(le=MAX_TEMPERATURE)] | None = optional("0 is greedy; null: 1.0")
    top_p: sampling.TopP | None = None
    top_k: Annotated[int, Field(ge=-1), Whole] | None = optional("-1 and 0 are off")
    min_p: sampling.MinP | None = None
    presence_penalty: sampling.Penalty | None = None
    frequency_penalty: sampling.Penalty | None = None
    repetition_penalty: sampling.RepetitionPenalty | None = None
    logit_bias: LogitBias | None = optional("token id -> addend of its logit")
    seed: Annotated[sampling.Seed, Whole] | None = optional("choice i has the seed + i; null: drawn, and reported")
    stop: StopString | StopStrings | None = optional("not in the text")
    stop_token_ids: StopIds | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculative: Speculative | None = None
    capture: bool | None = optional(CAPTURE)
    return_token_ids: bool | None = optional("a choice's token_ids, its end included, and prompt_token_ids (vLLM)")

    # without effect: nothing that they could change exists here
    user: Text | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def streaming(self) -> StreamOptions:
        return self.stream_options or StreamOptions()

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options", "is for streams; set `stream`, or leave it out")
        return self


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions."""

    unsupported = _UNSUPPORTED | {"suffix": False}

    prompt: Prompt | Prompts | TokenIds | PromptsOfIds = Field(examples=["Once upon a time"])
    max_tokens: NewTokens | None = optional("null: 16")
    echo: bool | None = optional("put the prompt before the text; not with logprobs")
    logprobs: Logprobs | None = None
    return_tokens_as_token_ids: bool | None = optional("in the logprobs: token_id:ID, special ones too (vLLM)")
    best_of: Positive | None = optional("not implemented: the same as n, or null")

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of not in (None, self.choices):  # with the same number nothing is chosen from
            raise Refused("best_of", "is not implemented by this server; leave it out")
        if self.echo and self.logprobs is not None:
            raise Refused("echo", "with `logprobs` is not implemented by this server; leave one of them out")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: Text


TextParts = Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)]


class Message(Strict):
    """One turn of a conversation; its content is text only.

    Clients send an answer's message back as they got it, with what it does not have as null or empty.
    """

    unsupported = off(
        "annotations audio function_call parsed reasoning reasoning_content refusal tool_call_id tool_calls"
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | TextParts | None = optional("null in an assistant's message only")
    name: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise Refused("content", "is needed in a message that is not the assistant's")
        if self.role == "user" and not self.text:
            raise Refused("content", "is empty; a user's message must have at least 1 character")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(SamplingRequest):
    """Body of POST /v1/chat/completions."""

    unsupported = _UNSUPPORTED_IN_CHATS

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] = Field(
        examples=[[{"role": "user", "content": "Say hello."}]]
    )
    max_completion_tokens: NewTokens | None = optional("null: the room that is left")
    max_tokens: NewTokens | None = optional("the older name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = optional("needs logprobs")

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise Refused("top_logprobs", "needs `logprobs` to be true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise Refused("max_tokens", "and `max_completion_tokens` are two names of one thing; give one of them")
        return self


class CompletionResponse(BaseModel):
    """Answer of both endpoints; a choice has `text` or `message`, and `logprobs`."""

    id: str
    object: Literal["text_completion", "chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
    metrics: dict[str, Any] = Field(description="speculative_decoding: in vLLM's shape; null for several choices")


class OpenAiError(BaseModel):
    error: dict[str, str | None] = Field(description="message, type, param and code")
