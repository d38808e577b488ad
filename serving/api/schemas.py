"""What goes over the wire on TGI's surface, and what both surfaces share.

TGI's contract with two deviations: temperature 0 is allowed and greedy, top_p 1 is allowed and off. A request without
`parameters` is greedy, too. A sampling parameter is implemented exactly or refused by name; none is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from serving.engine.sampling import SEED_LIMIT

MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARACTERS = 256
MAX_TEMPERATURE = 100.0
MAX_TOP_N_TOKENS = 5
_MAX_KEYS = 200  # of one object with named fields; more would be an error each

# what TGI defines and this server does not implement -> the values that mean "off" (null always does)
NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "adapter_id": (),
    "best_of": (1,),
    "decoder_input_details": (False,),
    "grammar": (),
    "typical_p": (1,),
    "watermark": (False,),
}


def _clean(text: str) -> str:
    """Refuse what JSON can carry and tokenizers trip over."""
    if "\0" in text:
        raise ValueError("must not contain NUL characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain unpaired surrogates") from None
    return text


_PATTERN: dict[str, Any] = {"pattern": r"^[^\u0000]*$"}  # for the schema; `_clean` says it in words
Text = Annotated[str, Field(json_schema_extra=_PATTERN), AfterValidator(_clean)]
Prompt = Annotated[str, Field(min_length=1, json_schema_extra=_PATTERN), AfterValidator(_clean)]
StopString = Annotated[
    str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS, json_schema_extra=_PATTERN), AfterValidator(_clean)
]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_SEQUENCES)]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]


def _whole(value: Any) -> Any:
    match value:
        case float() if value.is_integer() and abs(value) < SEED_LIMIT:
            return int(value)
        case dict():
            return {name: _whole(each) for name, each in value.items()}
        case list():
            return [_whole(each) for each in value]
    return value


class Strict(BaseModel):
    """No coercion ("5" is not 5, true is not 1, but 1.0 is), no NaN or infinity, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, body: Any) -> Any:
        """1.0 is an integer to JSON schema, and to languages that have one kind of number."""
        if isinstance(body, dict) and len(body) > _MAX_KEYS:
            raise ValueError(f"has {len(body)} keys; at most {_MAX_KEYS} are read")
        return _whole(body)


class Refused(ValueError):
    """A field that a validator of the whole body refuses."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"`{field}` {why}")
        self.field = field


def refuse_not_implemented(body: BaseModel, table: dict[str, tuple[Any, ...]]) -> None:
    for name, off in table.items():
        value = getattr(body, name)
        if value is not None and not any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in off
        ):
            raise Refused(name, "is not implemented by this server; leave it out")


def not_implemented(table: dict[str, tuple[Any, ...]], name: str) -> Any:
    """The field of something that is refused unless it is off."""
    off = [*table[name], None]
    return Field(
        default=None, description="not implemented: only what means off is taken", json_schema_extra={"enum": off}
    )


def described(*rules: dict[str, Any], example: dict[str, Any] | None = None) -> ConfigDict:
    """For a model's schema: rules between its fields, which its validators check, and a body that is accepted."""
    extra: dict[str, Any] = {"allOf": list(rules)} if rules else {}
    return ConfigDict(json_schema_extra=extra | ({"examples": [example]} if example else {}))


def either(*alternatives: dict[str, Any]) -> dict[str, Any]:
    """A rule between fields: one of these holds, each of which is fields with their schemas."""
    return {"anyOf": [_holding(fields) for fields in alternatives]}


def _holding(fields: dict[str, Any]) -> dict[str, Any]:
    """A field whose schema is {"const": ...} must be there: left out it would be something else."""
    needed = [name for name, schema in fields.items() if "const" in schema]
    return {"properties": fields} | ({"required": needed} if needed else {})


class Speculative(Strict):
    """Speculation for one request; it changes the speed and never the distribution of the text."""

    enabled: bool | None = Field(default=None, description="null: on, when the server has a head")
    num_tokens: int | None = Field(
        default=None, ge=0, description="tokens drafted at a time, capped by the server's; 0 is off"
    )
    rule: Literal["shared-noise", "rejection"] | None = Field(default=None, description="null: the server's")


class SpeculativeWithOrigin(Speculative):
    origin: bool | None = Field(default=None, description="tell of each token where it came from")


class GenerateParameters(Strict):
    """Sampling is on when do_sample is true or any of temperature, top_k and top_p is set; otherwise greedy."""

    max_new_tokens: int | None = Field(
        default=None, ge=1, description="null: the server's default, or the room that is left"
    )
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE, description="0 is greedy; null: 1.0")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    repetition_penalty: float | None = Field(default=None, gt=0, description="of tokens in the prompt or the answer")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: Seed | None = Field(default=None, description="null: drawn, and reported in the details")
    stop: StopStrings | None = Field(default=None, description="the stop string stays in the text")
    do_sample: bool | None = None
    chat: bool | None = Field(
        default=None, description="the inputs are what a user says: put them into the target's chat template"
    )
    truncate: int | None = Field(default=None, ge=1, description="keep only so many tokens at the end of the inputs")
    return_full_text: bool | None = Field(default=None, description="put the prompt before the generated text")
    details: bool | None = None
    top_n_tokens: int | None = Field(
        default=None, ge=0, le=MAX_TOP_N_TOKENS, description="with details: the most probable tokens at each place"
    )
    speculative: SpeculativeWithOrigin | None = None

    adapter_id: Any = not_implemented(NOT_IMPLEMENTED, "adapter_id")
    best_of: Any = not_implemented(NOT_IMPLEMENTED, "best_of")
    decoder_input_details: Any = not_implemented(NOT_IMPLEMENTED, "decoder_input_details")
    grammar: Any = not_implemented(NOT_IMPLEMENTED, "grammar")
    typical_p: Any = not_implemented(NOT_IMPLEMENTED, "typical_p")
    watermark: Any = not_implemented(NOT_IMPLEMENTED, "watermark")

    @model_validator(mode="after")
    def _refuse_what_is_not_implemented(self) -> GenerateParameters:
        refuse_not_implemented(self, NOT_IMPLEMENTED)
        return self

    @property
    def samples(self) -> bool:
        return bool(self.do_sample) or not (self.temperature is None and self.top_k is None and self.top_p is None)

    @property
    def wants_origin(self) -> bool:
        return bool(self.speculative and self.speculative.origin)


class GenerateRequest(Strict):
    """Body of POST /generate, /generate_stream and /."""

    model_config = described(
        example={"inputs": "Once upon a time", "parameters": {"temperature": 0.7, "seed": 1, "details": True}}
    )

    inputs: Prompt
    parameters: GenerateParameters | None = None
    stream: bool | None = Field(
        default=None, description="answer with server-sent events; /generate_stream always does"
    )


class AlternativeToken(BaseModel):
    """logprob: natural log of the target's own probability, before penalties, temperature and truncation."""

    id: int
    text: str
    logprob: float | None
    special: bool


class Origin(BaseModel):
    """Where a token came from."""

    source: Literal["draft", "target"] = Field(
        description="draft: drafted and accepted; target: supplied by the target"
    )
    position: int | None = Field(description="the draft position, from 1, of an accepted token")
    rejected: AlternativeToken | None = Field(
        description="what the head had drafted in the place of a token that the target supplied; logprob is null"
    )
    drafted: int = Field(
        description="tokens in a row that had been drafted for the verification which decided this token"
    )


class TokenDetails(AlternativeToken):
    """One generated token."""

    origin: Origin | None = Field(default=None, description="only with speculative.origin")


class SpeculativeDetails(BaseModel):
    """What speculation did for this request. Tokens that the prefill gave are in neither count."""

    enabled: bool
    rule: str
    speculation_length: int = Field(description="tokens drafted at a time, at most; 0 when speculation was off")
    acceptance_length: float | None = Field(description="emitted / verifications, bonus token included")
    verifications: int
    drafted: int
    accepted: int
    emitted: int
    acceptance_per_position: list[float | None] = Field(description="accepted / drafted at each draft position")


class Details(BaseModel):
    finish_reason: str = Field(description="length, eos_token or stop_sequence")
    generated_tokens: int
    seed: int | None = Field(description="null: the request was greedy")
    prefill: list[AlternativeToken] = Field(description="always empty: the prompt's tokens are not reported")
    tokens: list[TokenDetails]
    top_tokens: list[list[AlternativeToken]] | None = Field(default=None, description="only with top_n_tokens")
    speculative: SpeculativeDetails


class GenerateResponse(BaseModel):
    """Answer of POST /generate; details only when the request asked for them."""

    generated_text: str
    details: Details | None = None


class StreamDetails(BaseModel):
    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int
    speculative: SpeculativeDetails


class StreamEvent(BaseModel):
    """One event a token; the last one has generated_text and details. In place of it, an error: ErrorResponse."""

    index: int = Field(description="from 1")
    token: TokenDetails
    top_tokens: list[AlternativeToken] | None = None
    generated_text: str | None
    details: StreamDetails | None


class ErrorResponse(BaseModel):
    error: str
    error_type: str


# A conversation as OpenAI's surface takes it: text, and nothing of tools, sound or pictures.


MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message

# clients send an answer's message back as they got it, with what it does not have as null or empty
MESSAGE_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "parsed": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "refusal": ("",),
    "tool_call_id": ("",),
    "tool_calls": ([],),
}

# in JSON schema; the validator says it in words
_WITH_TEXT: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "contains": {"required": ["text"], "properties": {"text": {"minLength": 1}}}},
    ]
}
_TEXT_BY_ROLE = {
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {"required": ["content"], "properties": {"role": {"const": "user"}, "content": _WITH_TEXT}},
        {
            "required": ["content"],
            "properties": {
                "role": {"enum": ["system", "developer", "tool"]},
                "content": {"type": ["string", "array"]},
            },
        },
    ]
}


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn; of the kinds of content only text."""

    model_config = described(_TEXT_BY_ROLE)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)] | None = Field(
        default=None, description="null, for no text, is the assistant's only; a user says something"
    )
    name: Text | None = None

    annotations: Any = not_implemented(MESSAGE_NOT_IMPLEMENTED, "annotations")
    audio: Any = not_implemented(MESSAGE_NOT_IMPLEMENTED, "audio")
    function_call: Any = not_implemented(MESSAGE_NOT_IMPLEMENTED, "function_call")
    parsed: Any = not_implemented(MESSAGE_NOT_IMPLEMENTED, "parsed")
    reasoning: Any = not_implemented(MESSAGE_NOT_IMPLEMENTED, "reasoning")
    reasoning_content: Any = not_implemented(MESSAGE_NOT_IMPLEMENTED, "reasoning_content")
    refusal: Any = not_implemented(MESSAGE_NOT_IMPLEMENTED, "refusal")
    tool_call_id: Any = not_implemented(MESSAGE_NOT_IMPLEMENTED, "tool_call_id")
    tool_calls: Any = not_implemented(MESSAGE_NOT_IMPLEMENTED, "tool_calls")

    @model_validator(mode="after")
    def _refuse(self) -> Message:
        refuse_not_implemented(self, MESSAGE_NOT_IMPLEMENTED)
        if self.content is None and self.role != "assistant":
            raise Refused("content", "is needed in a message that is not the assistant's")
        if self.role == "user" and not self.text:
            raise Refused("content", "is empty; what a user says must have at least 1 character")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
