"""What goes over the wire on OpenAI's surface: requests, and the answers' shapes for the schema.

vLLM's extensions are taken where the engine has them: top_k, min_p, repetition_penalty, stop_token_ids, min_tokens,
ignore_eos, include_stop_str_in_output, return_token_ids. A sampling parameter is implemented exactly or refused by
name; none is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from serving.api.schemas import (
    MAX_STOP_SEQUENCES,
    Prompt,
    Seed,
    Speculative,
    StopString,
    StopStrings,
    Strict,
    Text,
    not_implemented,
    refuse_not_implemented,
)
from serving.engine.params import MAX_LOGPROBS

MAX_CHOICES = 64  # of one request: prompts * n
MAX_BIASES = 1024
MAX_TEMPERATURE = 2.0
MAX_MESSAGES = 4096

NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "allowed_token_ids": (),
    "bad_words": (),
    "prompt_logprobs": (),
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


def _token_keys(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not (key.isascii() and key.isdecimal() and len(key) < 10):
            raise ValueError("its keys must be token ids")
    return bias


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="padding against observers; never added")
    continuous_usage_stats: bool | None = Field(default=None, description="usage in every chunk (vLLM)")


class Sampling(Strict):
    """What both endpoints take."""

    model: Text | None = Field(default=None, description="any name, unless the server is strict")
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
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
            Field(max_length=MAX_BIASES, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
            AfterValidator(_token_keys),
        ]
        | None
    ) = Field(default=None, description="token id -> addend of its logit")
    seed: Seed | None = Field(default=None, description="choice i has the seed + i; null: drawn, and reported")
    stop: StopString | StopStrings | None = Field(default=None, description="not in the text")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, max_length=MAX_STOP_SEQUENCES)
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
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    request_id: Text | None = None
    priority: int | None = None

    allowed_token_ids: Any = not_implemented(NOT_IMPLEMENTED, "allowed_token_ids")
    bad_words: Any = not_implemented(NOT_IMPLEMENTED, "bad_words")
    prompt_logprobs: Any = not_implemented(NOT_IMPLEMENTED, "prompt_logprobs")
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
            raise ValueError("`stream_options` is for streams; set `stream`, or leave it out")


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    prompt: (
        Prompt
        | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_CHOICES)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: int | None = Field(default=None, ge=1, description="null: 16")
    echo: bool | None = Field(default=None, description="put the prompt before the text; not with logprobs")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    best_of: Any = Field(default=None, description="not implemented: as n, or null", json_schema_extra={"enum": [None]})
    suffix: Any = not_implemented(NOT_IMPLEMENTED, "suffix")

    @model_validator(mode="after")
    def _refuse(self) -> CompletionRequest:
        if type(self.best_of) is int and self.best_of == self.choices:  # then nothing is chosen from
            self.best_of = None
        self._check(NOT_IMPLEMENTED)
        if self.echo and self.logprobs is not None:
            raise ValueError("`echo` with `logprobs` is not implemented by this server; leave one of them out")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn; of the kinds of content only text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
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
            raise ValueError("`top_logprobs` needs `logprobs` to be true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("`max_tokens` and `max_completion_tokens` differ; give one of them")
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
