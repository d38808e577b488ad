"""Request and response models of OpenAI's API.

vLLM's extensions are taken where the engine has them: top_k, min_p, repetition_penalty, stop_token_ids, min_tokens,
ignore_eos, include_stop_str_in_output, return_token_ids. A sampling parameter is implemented exactly or refused by
name; none is ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serving.api.schemas import (
    MAX_STOP_SEQUENCES,
    Count,
    Prompt,
    Refused,
    Speculative,
    StopString,
    StopStrings,
    Strict,
    Text,
    Whole,
)
from serving.engine import sampling

MAX_CHOICES = 64  # of one request: prompts * n
MAX_BIASES = 1024
MAX_TEMPERATURE = 2.0
MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message

_UNSUPPORTED: dict[str, Any] = dict.fromkeys(
    ["allowed_token_ids", "bad_words", "prompt_logprobs", "request_id", "structured_outputs"]
    + ["truncate_prompt_tokens", "use_beam_search"],
    False,
) | {
    "priority": 0,
    "response_format": {"type": "text"},
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
}


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
LogitBias = Annotated[dict[sampling.TokenId, sampling.Bias], BeforeValidator(_by_token_id)]
Logprobs = Annotated[sampling.Logprobs, Whole]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="padding against observers; never added")
    continuous_usage_stats: bool | None = Field(default=None, description="usage in every chunk (vLLM)")


class SamplingRequest(Strict):
    """Fields of both endpoints."""

    model: Text | None = Field(default=None, description="any name, unless the server is strict")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole] | None = Field(
        default=None, description=f"choices per prompt; prompts * n <= {MAX_CHOICES}"
    )
    temperature: Annotated[sampling.Temperature, Field(le=MAX_TEMPERATURE)] | None = Field(
        default=None, description="0 is greedy; null: 1.0"
    )
    top_p: sampling.TopP | None = None
    top_k: Annotated[int, Field(ge=-1), Whole] | None = Field(default=None, description="-1 and 0 are off")
    min_p: sampling.MinP | None = None
    presence_penalty: sampling.Penalty | None = None
    frequency_penalty: sampling.Penalty | None = None
    repetition_penalty: sampling.RepetitionPenalty | None = None
    logit_bias: LogitBias | None = Field(default=None, description="token id -> addend of its logit")
    seed: Annotated[sampling.Seed, Whole] | None = Field(
        default=None, description="choice i has the seed + i; null: drawn, and reported"
    )
    stop: StopString | StopStrings | None = Field(default=None, description="not in the text")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_SEQUENCES)] | None = None
    min_tokens: Annotated[int, Field(ge=0), Whole] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculative: Speculative | None = None
    return_token_ids: bool | None = Field(
        default=None, description="report a choice's token_ids, its end included, and prompt_token_ids (vLLM)"
    )

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
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_every_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options", "is for streams; set `stream`, or leave it out")
        return self


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions."""

    unsupported = _UNSUPPORTED | {"suffix": False}

    prompt: Prompt | Prompts | TokenIds | PromptsOfIds = Field(examples=["Once upon a time"])
    max_tokens: Annotated[sampling.NewTokens, Whole] | None = Field(default=None, description="null: 16")
    echo: bool | None = Field(default=None, description="put the prompt before the text; not with logprobs")
    logprobs: Logprobs | None = None
    best_of: Count | None = Field(default=None, description="not implemented: the same as n, or null")

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

    unsupported = dict.fromkeys(
        ["annotations", "audio", "function_call", "parsed", "reasoning", "reasoning_content", "refusal"]
        + ["tool_call_id", "tool_calls"],
        False,
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | TextParts | None = Field(default=None, description="null in an assistant's message only")
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

    unsupported = (
        _UNSUPPORTED
        | dict.fromkeys(
            ["audio", "chat_template", "chat_template_kwargs", "continue_final_message", "echo", "functions"]
            + ["parallel_tool_calls", "prediction", "reasoning_effort", "tools", "verbosity", "web_search_options"],
            False,
        )
        | {"add_generation_prompt": True, "function_call": "none", "modalities": ["text"], "tool_choice": "none"}
    )

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] = Field(
        examples=[[{"role": "user", "content": "Say hello."}]]
    )
    max_completion_tokens: Annotated[sampling.NewTokens, Whole] | None = Field(
        default=None, description="null: the room that is left"
    )
    max_tokens: Annotated[sampling.NewTokens, Whole] | None = Field(
        default=None, description="the older name of max_completion_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = Field(default=None, description="needs logprobs")

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise Refused("top_logprobs", "needs `logprobs` to be true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise Refused("max_tokens", "and `max_completion_tokens` are two names of one thing; give one of them")
        return self


class Choice(BaseModel):
    model_config = ConfigDict(extra="allow")

    index: int
    finish_reason: str | None
    stop_reason: str | int | None = Field(description="the stop string or token id that ended it")
    seed: int | None = Field(description="null: greedy")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: dict[str, int] = Field(
        description="accepted_prediction_tokens and rejected_prediction_tokens count drafted tokens"
    )


class CompletionResponse(BaseModel):
    """Answer of both endpoints; a choice has `text` or `message`, and `logprobs`."""

    id: str
    object: Literal["text_completion", "chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    metrics: dict[str, Any] = Field(description="speculative_decoding: in vLLM's shape; null for several choices")


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAiError(BaseModel):
    error: Problem
