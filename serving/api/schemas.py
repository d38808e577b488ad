"""Request and response models of TGI's API, and the rules that all request models share.

TGI's contract with two deviations: temperature 0 is allowed and greedy, top_p 1 is allowed and off. A request without
`parameters` is greedy, too. A sampling parameter is implemented exactly or refused by name; none is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serving.engine.sampling import NewTokens, Penalty, RepetitionPenalty, Seed, Temperature, TopP
from serving.names import MAX_HEAD_NAME

MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARACTERS = 256
MAX_TEMPERATURE = 100.0
MAX_TOP_N_TOKENS = 5
CAPTURE = "false keeps the request out of what a server with --capture writes"
_MAX_KEYS = 200  # of one object with named fields; each unknown one would be reported


class Refused(ValueError):
    """A field that a validator of the whole body refuses."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"`{field}` {reason}")
        self.field = field


class Strict(BaseModel):
    """Base of request models: no coercion ("5" is not 5, true is not 1), no NaN or infinity, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    # fields that the contract defines and this server does not implement -> the value that, like null and empty ones,
    # means "off": then they are dropped, otherwise refused by name
    unsupported: ClassVar[dict[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if len(body) > _MAX_KEYS:
            raise ValueError(f"has {len(body)} keys; at most {_MAX_KEYS} are read")
        for name in cls.unsupported.keys() & body.keys():
            value, off = body[name], cls.unsupported[name]
            same = value == off and isinstance(value, bool) == isinstance(off, bool)
            if not (value is None or value in ("", [], {}) or same):
                raise Refused(name, "is not implemented by this server; leave it out")
        return {name: value for name, value in body.items() if name not in cls.unsupported}


def off(names: str, **values: Any) -> dict[str, Any]:
    """Return fields with the values that mean "off"; names: of those where it is false, separated by spaces."""
    return dict.fromkeys(names.split(), False) | values


def optional(description: str) -> Any:
    """Return a field whose default is null."""
    return Field(default=None, description=description)


def _check_text(text: str) -> str:
    """Refuse what JSON can carry and tokenizers cannot."""
    if "\0" in text:
        raise ValueError("must not contain NUL characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain unpaired surrogates") from None
    return text


# 1.0 is an integer to languages that have one kind of number
Whole = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
Count = Annotated[int, Field(ge=0), Whole]
Positive = Annotated[int, Field(ge=1), Whole]
Text = Annotated[str, AfterValidator(_check_text)]
Prompt = Annotated[Text, Field(min_length=1)]
HeadName = Annotated[Text, Field(min_length=1, max_length=MAX_HEAD_NAME)]
StopString = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_SEQUENCES)]


class Speculative(Strict):
    """Speculation for one request; it changes the speed and never the distribution of the text."""

    enabled: bool | None = optional("null: on, when the server has a draft head or copies")
    num_tokens: Count | None = optional("speculation length, capped by the server's; 0 is off")
    rule: Literal["shared-noise", "rejection"] | None = optional("null: the server's")
    head: HeadName | None = optional("name of a loaded draft head; null: as the server chooses")


class SpeculativeWithOrigin(Speculative):
    origin: bool | None = optional("report the origin of each token")


class GenerateParameters(Strict):
    """Sampling is on when do_sample is true or any of temperature, top_k and top_p is set; otherwise greedy."""

    unsupported = off("adapter_id decoder_input_details grammar watermark", best_of=1, typical_p=1)

    max_new_tokens: Annotated[NewTokens, Whole] | None = optional("null: 128, or the room that is left")
    temperature: Annotated[Temperature, Field(le=MAX_TEMPERATURE)] | None = optional("0 is greedy; null: 1.0")
    top_p: TopP | None = None
    top_k: Positive | None = None
    repetition_penalty: RepetitionPenalty | None = optional("for tokens in the prompt or the answer")
    frequency_penalty: Penalty | None = None
    seed: Annotated[Seed, Whole] | None = optional("null: drawn, and reported in the details")
    stop: StopStrings | None = optional("the stop string stays in the text")
    do_sample: bool | None = None
    chat: bool | None = optional("the inputs are a user's message for the chat template")
    truncate: Positive | None = optional("keep only that many tokens at the end of the inputs")
    return_full_text: bool | None = optional("put the prompt before the generated text")
    details: bool | None = None
    top_n_tokens: Annotated[Count, Field(le=MAX_TOP_N_TOKENS)] | None = optional("alternatives at each position")
    speculative: SpeculativeWithOrigin | None = None
    capture: bool | None = optional(CAPTURE)

    @property
    def samples(self) -> bool:
        return bool(self.do_sample) or not (self.temperature is None and self.top_k is None and self.top_p is None)

    @property
    def wants_origin(self) -> bool:
        return bool(self.speculative and self.speculative.origin)


class GenerateRequest(Strict):
    """Body of POST /generate, /generate_stream and /."""

    inputs: Prompt = Field(examples=["Once upon a time"])
    parameters: GenerateParameters | None = None
    stream: bool | None = optional("answer with server-sent events; /generate_stream always does")


class GenerateResponse(BaseModel):
    """Answer of POST /generate."""

    generated_text: str
    details: dict[str, Any] | None = optional(
        "with details: finish_reason, generated_tokens, seed, tokens, speculative"
    )


class ErrorResponse(BaseModel):
    error: str
    error_type: str


# of a router's answers in /openapi.json
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
EVENT_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
