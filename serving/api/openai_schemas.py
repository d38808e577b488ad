"""What goes over the wire on OpenAI's surface: requests, and the answers' shapes for the schema.

vLLM's extensions are taken where the engine has them: top_k, min_p, repetition_penalty, stop_token_ids, min_tokens,
ignore_eos, include_stop_str_in_output, return_token_ids. A sampling parameter is implemented exactly or refused by
name; none is ignored.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serving.api.schemas import (
    MAX_STOP_SEQUENCES,
    Messages,
    Prompt,
    Refused,
    Seed,
    Speculative,
    StopString,
    StopStrings,
    Strict,
    Text,
    described,
    either,
    not_implemented,
    refuse_not_implemented,
)
from serving.engine.sampling import MAX_LOGPROBS

MAX_CHOICES = 64  # of one request: prompts * n
MAX_BIASES = 1024
MAX_TEMPERATURE = 2.0
TOKEN_KEY = "^(0|[1-9][0-9]{0,8})$"  # one way only to write an id, or two keys might mean the same

NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "best_of": (),
    "suffix": ("",),
    "allowed_token_ids": (),
    "bad_words": (),
    "priority": (0,),
    "prompt_logprobs": (),
    "request_id": (),
    "response_format": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
CHAT_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (),
    "prediction": (),
    "reasoning_effort": (),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


# rules between fields, in JSON schema; the validators say them in words
_OFF: dict[str, Any] = {"enum": [False, None]}
_NULL: dict[str, Any] = {"type": "null"}
_OPTIONS_NEED_A_STREAM = either({"stream_options": _NULL}, {"stream": {"const": True}})
_NO_ECHO_WITH_LOGPROBS = either({"echo": _OFF}, {"logprobs": _NULL})
_BEST_OF_AS_N = either({"best_of": _NULL}, {"n": {"enum": [1, None]}})
_ALTERNATIVES_NEED_LOGPROBS = either({"top_logprobs": {"enum": [0, None]}}, {"logprobs": {"const": True}})
_ONE_LIMIT = either({"max_tokens": _NULL}, {"max_completion_tokens": _NULL})
_SEVERAL = {"type": "array", "items": {"type": ["string", "array"]}}
# prompts * n <= MAX_CHOICES is no rule that JSON schema has; these follow from it
_AS_MANY_CHOICES = [
    {
        "if": {"properties": {"prompt": {**_SEVERAL, "minItems": prompts}}},
        "then": {"properties": {"n": {"maximum": MAX_CHOICES // prompts}}},
    }
    for prompts in (2, 5, 9, 17)
]


def _few(bias: Any) -> Any:
    """Before each of the values is looked at, which may be an error each."""
    if isinstance(bias, dict) and len(bias) > MAX_BIASES:
        raise ValueError(f"must have at most {MAX_BIASES} entries. Given: {len(bias)}")
    return bias


def _token_keys(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not re.fullmatch(TOKEN_KEY, key):
            raise ValueError("its keys must be token ids")
    return bias


def _sendable(metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(metadata, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        raise ValueError("must have finite numbers and no unpaired surrogates") from None
    return metadata


TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Prompts = Annotated[list[Prompt], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]
PromptsOfIds = Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="padding against observers; never added")
    continuous_usage_stats: bool | None = Field(default=None, description="usage in every chunk (vLLM)")


class Sampling(Strict):
    """What both endpoints take."""

    model: Text | None = Field(default=None, description="any name, unless the server is strict")
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description=f"times prompts at most {MAX_CHOICES}")
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE, description="0 is greedy; null: 1.0")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, description="-1 and 0 are off")
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0)
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            BeforeValidator(_few),
            Field(max_length=MAX_BIASES, json_schema_extra={"propertyNames": {"pattern": TOKEN_KEY}}),
            AfterValidator(_token_keys),
        ]
        | None
    ) = Field(default=None, description="token id -> addend of its logit")
    seed: Seed | None = Field(default=None, description="choice i has the seed + i; null: drawn, and reported")
    stop: StopString | StopStrings | None = Field(default=None, description="not in the text")
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=MAX_STOP_SEQUENCES)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculative: Speculative | None = None
    return_token_ids: bool | None = Field(
        default=None, description="a choice's token_ids, its end included, and prompt_token_ids (vLLM)"
    )

    # nothing that they could change exists here
    user: Text | None = None
    metadata: Annotated[dict[str, Any], AfterValidator(_sendable)] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    allowed_token_ids: Any = not_implemented(NOT_IMPLEMENTED, "allowed_token_ids")
    bad_words: Any = not_implemented(NOT_IMPLEMENTED, "bad_words")
    priority: Any = not_implemented(NOT_IMPLEMENTED, "priority")
    prompt_logprobs: Any = not_implemented(NOT_IMPLEMENTED, "prompt_logprobs")
    request_id: Any = not_implemented(NOT_IMPLEMENTED, "request_id")
    response_format: Any = Field(
        default=None, description="plain text only", json_schema_extra={"enum": [{"type": "text"}, None]}
    )
    skip_special_tokens: Any = not_implemented(NOT_IMPLEMENTED, "skip_special_tokens")
    spaces_between_special_tokens: Any = not_implemented(NOT_IMPLEMENTED, "spaces_between_special_tokens")
    structured_outputs: Any = not_implemented(NOT_IMPLEMENTED, "structured_outputs")
    truncate_prompt_tokens: Any = not_implemented(NOT_IMPLEMENTED, "truncate_prompt_tokens")
    use_beam_search: Any = not_implemented(NOT_IMPLEMENTED, "use_beam_search")

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_every_chunk(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def _check(self, table: dict[str, tuple[Any, ...]]) -> None:
        if self.response_format == {"type": "text"}:
            self.response_format = None
        refuse_not_implemented(self, table)
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options", "is for streams; set `stream`, or leave it out")


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    model_config = described(
        _OPTIONS_NEED_A_STREAM,
        _NO_ECHO_WITH_LOGPROBS,
        _BEST_OF_AS_N,
        *_AS_MANY_CHOICES,
        example={"prompt": "Once upon a time", "temperature": 0, "stop": ["\n"]},
    )

    prompt: Prompt | Prompts | TokenIds | PromptsOfIds
    max_tokens: int | None = Field(default=None, ge=1, description="null: 16")
    echo: bool | None = Field(default=None, description="put the prompt before the text; not with logprobs")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    best_of: Any = Field(
        default=None, description="not implemented: the same as n, or null", json_schema_extra={"enum": [1, None]}
    )
    suffix: Any = not_implemented(NOT_IMPLEMENTED, "suffix")

    @model_validator(mode="after")
    def _refuse(self) -> CompletionRequest:
        if type(self.best_of) is int and self.best_of == self.choices:  # then nothing is chosen from
            self.best_of = None
        self._check(NOT_IMPLEMENTED)
        if self.echo and self.logprobs is not None:
            raise Refused("echo", "with `logprobs` is not implemented by this server; leave one of them out")
        return self


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    model_config = described(
        _OPTIONS_NEED_A_STREAM,
        _ALTERNATIVES_NEED_LOGPROBS,
        _ONE_LIMIT,
        example={"messages": [{"role": "user", "content": "Say hello."}], "seed": 1},
    )

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1, description="null: the room that is left")
    max_tokens: int | None = Field(default=None, ge=1, description="the older name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="needs logprobs")

    add_generation_prompt: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "add_generation_prompt")
    audio: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "audio")
    chat_template: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "chat_template")
    chat_template_kwargs: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "chat_template_kwargs")
    continue_final_message: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "continue_final_message")
    echo: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "echo")
    function_call: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "function_call")
    functions: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "functions")
    modalities: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "modalities")
    parallel_tool_calls: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "parallel_tool_calls")
    prediction: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "prediction")
    reasoning_effort: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "reasoning_effort")
    tool_choice: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "tool_choice")
    tools: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "tools")
    verbosity: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "verbosity")
    web_search_options: Any = not_implemented(CHAT_NOT_IMPLEMENTED, "web_search_options")

    @model_validator(mode="after")
    def _refuse(self) -> ChatRequest:
        shared = {name: off for name, off in NOT_IMPLEMENTED.items() if name not in ("best_of", "suffix")}
        self._check(shared | CHAT_NOT_IMPLEMENTED)
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
        description="accepted_ and rejected_prediction_tokens: the drafts"
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
