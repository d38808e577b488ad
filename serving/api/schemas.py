"""Request and response models of TGI's API, and the rules that all request models share.

TGI's contract with two deviations: temperature 0 is allowed and greedy, top_p 1 is allowed and off. A request without
`parameters` is greedy, too. A sampling parameter is implemented exactly or refused by name; none is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serving.engine.sampling import NewTokens, Penalty, RepetitionPenalty, Seed, Temperature, TopP

MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARACTERS = 256
MAX_TEMPERATURE = 100.0
MAX_TOP_N_TOKENS = 5
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


def _check_text(text: str) -> str:
    """Refuse what JSON can carry and tokenizers cannot."""
    if "\0" in text:
        raise ValueError("must not contain NUL characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain unpaired surrogates") from None
    return text


def _whole(value: Any) -> Any:
    """Return 1 for 1.0, which is an integer to languages that have one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
Text = Annotated[str, AfterValidator(_check_text)]
Prompt = Annotated[str, Field(min_length=1), AfterValidator(_check_text)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS), AfterValidator(_check_text)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_SEQUENCES)]
Count = Annotated[int, Field(ge=1), Whole]


class Speculative(Strict):
    """Speculation for one request; it changes the speed and never the distribution of the text."""

    enabled: bool | None = Field(default=None, description="null: on, when the server has a draft head")
    num_tokens: Annotated[int, Field(ge=0), Whole] | None = Field(
        default=None, description="speculation length, capped by the server's; 0 is off"
    )
    rule: Literal["shared-noise", "rejection"] | None = Field(default=None, description="null: the server's")


class SpeculativeWithOrigin(Speculative):
    origin: bool | None = Field(default=None, description="report the origin of each token")


class GenerateParameters(Strict):
    """Sampling is on when do_sample is true or any of temperature, top_k and top_p is set; otherwise greedy."""

    unsupported = dict.fromkeys(["adapter_id", "decoder_input_details", "grammar", "watermark"], False) | {
        "best_of": 1,
        "typical_p": 1,
    }

    max_new_tokens: Annotated[NewTokens, Whole] | None = Field(
        default=None, description="null: the server's default, or the room that is left"
    )
    temperature: Annotated[Temperature, Field(le=MAX_TEMPERATURE)] | None = Field(
        default=None, description="0 is greedy; null: 1.0"
    )
    top_p: TopP | None = None
    top_k: Count | None = None
    repetition_penalty: RepetitionPenalty | None = Field(
        default=None, description="for tokens in the prompt or the answer"
    )
    frequency_penalty: Penalty | None = None
    seed: Annotated[Seed, Whole] | None = Field(default=None, description="null: drawn, and reported in the details")
    stop: StopStrings | None = Field(default=None, description="the stop string stays in the text")
    do_sample: bool | None = None
    chat: bool | None = Field(default=None, description="the inputs are a user's message for the chat template")
    truncate: Count | None = Field(default=None, description="keep only that many tokens at the end of the inputs")
    return_full_text: bool | None = Field(default=None, description="put the prompt before the generated text")
    details: bool | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=MAX_TOP_N_TOKENS), Whole] | None = Field(
        default=None, description="with details: the most probable tokens at each position"
    )
    speculative: SpeculativeWithOrigin | None = None

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
    stream: bool | None = Field(
        default=None, description="answer with server-sent events; /generate_stream always does"
    )


class AlternativeToken(BaseModel):
    """A token; logprob: natural log of the target's probability, before penalties, temperature and truncation."""

    id: int
    text: str
    logprob: float | None
    special: bool


class Origin(BaseModel):
    """Origin of a token."""

    source: Literal["draft", "target"] = Field(
        description="draft: drafted and accepted; target: supplied by the target"
    )
    position: int | None = Field(description="the draft position, from 1, of an accepted token")
    rejected: AlternativeToken | None = Field(
        description="the drafted token in whose place the target supplied this one; its logprob is null"
    )
    drafted: int = Field(description="tokens drafted in a row for the verification which decided this token")


class TokenDetails(AlternativeToken):
    """One generated token."""

    origin: Origin | None = Field(default=None, description="only with speculative.origin")


class SpeculativeDetails(BaseModel):
    """Figures of speculation for this request. The token from the prefill is in none of the counts."""

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
    """Answer of POST /generate; details only when the request has details: true."""

    generated_text: str
    details: Details | None = None


class ErrorResponse(BaseModel):
    error: str
    error_type: str


# of a router's answers in /openapi.json
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
EVENT_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
