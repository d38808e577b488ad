"""What goes over the wire on the TGI surface: requests, answers and errors.

TGI's contract with two deviations: temperature 0 is allowed and greedy, top_p 1 is allowed and off. A request without
`parameters` is greedy, too. A sampling parameter is implemented exactly or refused by name; none is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from serving.engine.sequence import SEED_LIMIT

MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARACTERS = 256
MAX_TEMPERATURE = 100.0

# what TGI defines and this server does not implement -> the values that mean "off" (null always does)
NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "adapter_id": (),
    "best_of": (1,),
    "decoder_input_details": (False,),
    "frequency_penalty": (0,),
    "grammar": (),
    "repetition_penalty": (1,),
    "top_n_tokens": (0,),
    "truncate": (),
    "typical_p": (1,),
    "watermark": (False,),
}


class ApiError(Exception):
    """An answer that is not 200. The message goes to the client: no paths, prompts or exception text in it."""

    def __init__(self, status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.headers = status, kind, message, headers


def _without_nul(text: str) -> str:
    """Refuse what some tokenizers trip over and JSON can carry; pydantic itself refuses unpaired surrogates."""
    if "\0" in text:
        raise ValueError("must not contain NUL characters")
    return text


class Strict(BaseModel):
    """No coercion ("5" is not 5, true is not 1), no NaN or infinity, no unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class Speculative(Strict):
    """Speculation for one request; it changes the speed and never the distribution of the text."""

    enabled: bool | None = Field(default=None, description="null: on, when the server has a head")
    num_tokens: int | None = Field(
        default=None, ge=0, description="tokens drafted at a time, capped by the server's; 0 is off"
    )
    rule: Literal["shared-noise", "rejection"] | None = Field(default=None, description="null: the server's")


class GenerateParameters(Strict):
    """Sampling is on when do_sample is true or any of temperature, top_k and top_p is set; otherwise greedy."""

    max_new_tokens: int | None = Field(
        default=None, ge=1, description="null: the server's default, or the room that is left"
    )
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE, description="0 is greedy; null: 1.0")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=0, lt=SEED_LIMIT, description="null: drawn, and reported in the details")
    stop: (
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS), AfterValidator(_without_nul)]] | None
    ) = Field(default=None, max_length=MAX_STOP_SEQUENCES, description="the stop string stays in the text")
    do_sample: bool | None = None
    return_full_text: bool | None = Field(default=None, description="put the prompt before the generated text")
    details: bool | None = None
    speculative: Speculative | None = None

    adapter_id: Any = Field(default=None, description="not implemented: null only")
    best_of: Any = Field(default=None, description="not implemented: null or 1 only")
    decoder_input_details: Any = Field(default=None, description="not implemented: null or false only")
    frequency_penalty: Any = Field(default=None, description="not implemented: null or 0 only")
    grammar: Any = Field(default=None, description="not implemented: null only")
    repetition_penalty: Any = Field(default=None, description="not implemented: null or 1 only")
    top_n_tokens: Any = Field(default=None, description="not implemented: null or 0 only")
    truncate: Any = Field(default=None, description="not implemented: null only")
    typical_p: Any = Field(default=None, description="not implemented: null or 1 only")
    watermark: Any = Field(default=None, description="not implemented: null or false only")

    @model_validator(mode="after")
    def _refuse_what_is_not_implemented(self) -> GenerateParameters:
        for name, off in NOT_IMPLEMENTED.items():
            value = getattr(self, name)
            if value is not None and value not in off:
                raise ValueError(f"`{name}` is not implemented by this server; leave it out")
        return self

    @property
    def samples(self) -> bool:
        return bool(self.do_sample) or not (self.temperature is None and self.top_k is None and self.top_p is None)


class GenerateRequest(Strict):
    """Body of POST /generate."""

    inputs: Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
    parameters: GenerateParameters | None = None
    stream: bool | None = Field(default=None, description="streaming is not implemented: null or false only")

    @model_validator(mode="after")
    def _refuse_streaming(self) -> GenerateRequest:
        if self.stream:
            raise ValueError("`stream` is not implemented by this server; leave it out")
        return self


class TokenDetails(BaseModel):
    """One generated token; logprob is the target's own, before temperature and truncation."""

    id: int
    text: str
    logprob: float | None
    special: bool


class SpeculativeDetails(BaseModel):
    """What speculation did for this request. Tokens that the prefill gave are in neither count."""

    enabled: bool
    rule: str
    speculation_length: int = Field(description="tokens drafted at a time; 0 when speculation was off")
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
    prefill: list[TokenDetails] = Field(description="always empty: the prompt's tokens are not reported")
    tokens: list[TokenDetails]
    speculative: SpeculativeDetails


class GenerateResponse(BaseModel):
    """Answer of POST /generate; details only when the request asked for them."""

    generated_text: str
    details: Details | None = None


class ErrorResponse(BaseModel):
    error: str
    error_type: str
